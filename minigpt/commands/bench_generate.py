"""Measure decoding beside transformers' GPT-2."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from minigpt.commands.bench_train import add_machine_arguments
from minigpt.utils.errors import CommandParser, UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt bench generate`."""
    parser = CommandParser("minigpt bench generate", __doc__)
    add = parser.add_argument
    add("--batch_sizes", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"])
    add("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"], help="default: both")
    add("--no_packing", action="store_true", help="on a CPU: leave our matrices as `from_pretrained` loads them")
    add("--new_tokens", type=int, default=48, metavar="N", help="tokens a turn (default: %(default)s)")
    add("--turns", type=int, default=7, metavar="N", help="times each model speaks (default: %(default)s)")
    add("--layers", type=int, default=12, help=argparse.SUPPRESS)  # a small model, for tests
    add_machine_arguments(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """`minigpt bench generate`. Raises UserError on numbers that cannot be."""
    from minigpt.benchmarks.generate import describe, markdown, measure, memory_bandwidth, twins
    from minigpt.benchmarks.report import machine, show

    for name in ("new_tokens", "turns", "layers"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}={getattr(args, name)} must be at least 1")
    if min(args.batch_sizes) < 1:
        raise UserError(f"batch_sizes={min(args.batch_sizes)} must be at least 1")

    import torch
    from transformers.utils import logging

    from minigpt.modeling.packed_linear import pack_linears

    logging.set_verbosity_error()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = memory_bandwidth(device)
    rows = []
    for dtype in args.dtypes:
        ours, theirs = twins(dtype, device, args.layers)
        if not args.no_packing:
            pack_linears(ours)
        for mode in args.modes:
            for batch_size in args.batch_sizes:
                rows.append(measure(ours, theirs, mode, batch_size, args.new_tokens, args.turns))
                # the best of many: a busy machine only ever shows too little
                bandwidth = max(bandwidth, memory_bandwidth(device))
                print(markdown([rows[-1]], bandwidth).splitlines()[-1], flush=True)
    report = {"machine": machine(device), "bandwidth_gb_per_s": bandwidth, "rows": [asdict(row) for row in rows]}
    text = describe(report) + "\n\n" + markdown(rows, bandwidth)
    show(report, text, args.output)
