"""Accuracy on HellaSwag, in three normalizations."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.errors import CommandParser, UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt hellaswag`."""
    parser = CommandParser("minigpt hellaswag", __doc__)
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--data_file", help="JSONL file of items (default: the validation split of Rowan/hellaswag)")
    parser.add_argument("--limit", type=int, help="only the first items")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences a batch of one process")
    parser.add_argument("--items", type=Path, help="write one JSON line an item here")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="keep the accuracies here as `evaluate.save` writes them; RUN/evaluations/hellaswag.json is on the card",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--use_cpu", action="store_true", help="evaluate on the CPU even where there is a GPU")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that a foreign model brings")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """`minigpt hellaswag`; under `accelerate launch -m minigpt hellaswag …` all processes share the items."""
    from minigpt.evaluation.hellaswag import evaluate, summarize
    from minigpt.evaluation.hellaswag_items import load_rows

    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    rows = load_rows(args.data_file, args.limit)
    import time

    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    import modeling_minigpt  # noqa: F401 - registers MiniGPT with the Auto classes, so no trust is needed
    from minigpt.data.tokenizer import load_tokenizer
    from minigpt.modeling.packed_linear import pack_linears

    accelerator = Accelerator(cpu=args.use_cpu or not torch.accelerator.is_available())
    tokenizer = load_tokenizer(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), trust_remote_code=args.trust_remote_code
    ).to(accelerator.device)
    model = pack_linears(model)
    started = time.perf_counter()
    answers = evaluate(model, tokenizer, rows, args.batch_size, accelerator)
    seconds = time.perf_counter() - started
    if not accelerator.is_main_process:
        return
    if args.items:
        names = ("item", "acc", "acc_norm", "acc_norm_tokens", "loglikelihoods")
        lines = [json.dumps({name: getattr(answer, name) for name in names}) for answer in answers]
        args.items.write_text("\n".join(lines) + "\n", encoding="utf-8")
    accuracies = summarize(answers)
    if args.output:
        from evaluate import save

        save(args.output, model=args.model, items=len(answers), **accuracies)
    for name, value in accuracies.items():
        error = (value * (1 - value) / max(1, len(answers) - 1)) ** 0.5
        print(f"{name:<26} {value:.4f} ± {error:.4f}")
    print(f"{len(answers)} items in {seconds:.1f} s, {len(answers) / seconds:.1f} items/s")
