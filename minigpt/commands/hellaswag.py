"""Accuracy on HellaSwag, in three normalizations."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.command_line import (
    CommandParser,
    add_model_options,
    check_output_file,
    check_positive,
    write_result,
)
from minigpt.utils.files import write_atomically


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt hellaswag`."""
    parser = CommandParser("minigpt hellaswag", __doc__)
    add = parser.add_argument
    add_model_options(parser)
    add("--data_file", metavar="FILE", help="JSONL file of items (default: the validation split of Rowan/hellaswag)")
    add("--limit", type=int, metavar="N", help="use only the first N items (default: all)")
    add(
        "--batch_size",
        type=int,
        default=32,
        metavar="N",
        help="sequences per batch and process (default: %(default)s)",
    )
    add("--items", type=Path, metavar="FILE", help="write one JSON line per item to this file")
    add(
        "--output",
        metavar="FILE",
        help="also write the accuracies to this file, as JSON; the model card shows those in "
        "RUN/evaluations/hellaswag.json",
    )
    add("--use_cpu", action="store_true", help="use the CPU even if there is an accelerator")
    args = parser.parse_args(argv)
    check_positive(args, "limit", "batch_size")
    check_output_file(args, "items", "output")
    return args


def run(args: argparse.Namespace) -> None:
    """`minigpt hellaswag`; under `accelerate launch -m minigpt hellaswag ...` all processes share the items.

    Raises UserError if the items or the model cannot be loaded.
    """
    import torch
    from accelerate import Accelerator
    from transformers.utils import logging

    from minigpt.data.tokenizer import load_tokenizer
    from minigpt.evaluation.hellaswag import evaluate, summarize
    from minigpt.evaluation.hellaswag_items import check_encodable, load_rows
    from minigpt.modeling.loading import find_model, load_model

    logging.set_verbosity_error()  # otherwise transformers warns about every item longer than the context
    rows = load_rows(args.data_file, args.limit)
    accelerator = Accelerator(cpu=args.use_cpu or not torch.accelerator.is_available())
    source = find_model(args.model)
    tokenizer = load_tokenizer(source, trust_remote_code=args.trust_remote_code)
    check_encodable(rows, tokenizer, args.data_file)
    model = load_model(
        source, dtype=args.dtype, device=accelerator.device, trust_remote_code=args.trust_remote_code, pack=True
    )
    start = time.perf_counter()
    answers = evaluate(model, tokenizer, rows, args.batch_size, accelerator)
    elapsed_s = time.perf_counter() - start
    if not accelerator.is_main_process:
        return
    if args.items:
        names = ("item", "acc", "acc_norm", "acc_norm_tokens", "loglikelihoods")
        lines = [json.dumps({name: getattr(answer, name) for name in names}) for answer in answers]
        write_atomically(args.items, "\n".join(lines) + "\n")
    accuracies = summarize(answers)
    if args.output:
        record = {"model": args.model, "items": len(answers), **accuracies}
        write_result(args.output, record)
    for name, value in accuracies.items():
        standard_error = (value * (1 - value) / max(1, len(answers) - 1)) ** 0.5
        print(f"{name:<26} {value:.4f} ± {standard_error:.4f}")
    print(f"{len(answers)} items in {elapsed_s:.1f} s, {len(answers) / elapsed_s:.1f} items/s")
