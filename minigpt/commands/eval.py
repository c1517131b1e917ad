"""Loss, perplexity and bits per byte over a whole text."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.errors import CommandParser, UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt eval`."""
    parser = CommandParser("minigpt eval", __doc__)
    parser.add_argument("--model", nargs="+", required=True, help="folders or Hub names; several make a table")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="folder of prepared shards")
    source.add_argument("--text_file", type=Path, help="raw UTF-8 text, encoded with each model's own tokenizer")
    parser.add_argument("--split", choices=["validation", "train"], default="validation", help="split of --data")
    parser.add_argument("--block_size", type=int, help="tokens a window (default: the model's longest context)")
    parser.add_argument("--stride", type=int, help="tokens between the starts of windows (default: block_size)")
    parser.add_argument("--batch_size", type=int, default=8, help="windows a batch of one process")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--use_cpu", action="store_true", help="evaluate on the CPU even where there is a GPU")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", metavar="FILE", help="keep the results here, JSON as `evaluate.save` writes it")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that a foreign model brings")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """`minigpt eval`; under `accelerate launch -m minigpt eval …` the windows are shared by all processes."""
    from minigpt.evaluation.perplexity import evaluate

    for name in ("block_size", "stride", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=args.use_cpu or not torch.accelerator.is_available())
    results = {name: evaluate(name, args, accelerator).as_dict() for name in args.model}
    if accelerator.is_main_process:
        print(json.dumps(results, indent=2) if args.json else markdown_table(results))
        if args.output:
            from evaluate import save

            save(args.output, text=args.data or str(args.text_file), results=results)


def markdown_table(results: dict[str, dict[str, float]]) -> str:
    columns = ("loss", "± (se)", "perplexity", "word ppl", "bits/byte", "tokens")
    width = max(len("model"), *map(len, results))
    lines = [f"{'model':<{width}}  " + "  ".join(f"{column:>11}" for column in columns)]
    for name, result in results.items():
        cells = [f"{result['loss']:.4f}", f"{result['standard_error']:.4f}", f"{result['perplexity']:.3f}"]
        cells += [f"{result['word_perplexity']:.2f}", f"{result['bits_per_byte']:.4f}", f"{result['tokens']:,}"]
        lines.append(f"{name:<{width}}  " + "  ".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)
