"""Measure how fast batches are loaded from token shards."""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from minigpt.utils.command_line import CommandParser
from minigpt.utils.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt bench load`."""
    from minigpt.benchmarks.report import add_report_option, check_options

    parser = CommandParser("minigpt bench load", __doc__)
    add = parser.add_argument
    add("--tokens", type=int, default=10**8, metavar="N", help="random tokens to load from (default: %(default)s)")
    add(
        "--shards",
        type=int,
        nargs="+",
        default=[1, 10, 1000],
        metavar="N",
        help="numbers of shards (default: 1 10 1000)",
    )
    add("--sparse_tokens", type=int, default=10**10, metavar="N", help="tokens of sparse files (default: %(default)s)")
    add("--batch_size", type=int, default=12, metavar="N", help="samples per batch (default: %(default)s)")
    add("--block_size", type=int, default=1024, metavar="N", help="tokens per sample (default: %(default)s)")
    add("--workers", type=int, nargs="+", default=[0, 2], metavar="N", help="worker processes (default: 0 2)")
    add("--seconds", type=float, default=3.0, metavar="S", help="time of each row (default: %(default)s)")
    add_report_option(parser)
    args = parser.parse_args(argv)
    check_options(args, "tokens", "shards", "sparse_tokens", "batch_size", "block_size", "seconds")
    if min(args.workers) < 0:
        raise UserError(f"workers={min(args.workers)} must be at least 0")
    return args


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    from minigpt.benchmarks.load import SPARSE_SHARDS, Row, markdown, measure_loading, write_shards
    from minigpt.benchmarks.report import write_report

    rows = []
    data_sets = [(args.tokens, shards, False) for shards in args.shards] + [(args.sparse_tokens, SPARSE_SHARDS, True)]
    for total_tokens, shards, sparse in data_sets:
        with tempfile.TemporaryDirectory() as folder:
            tokens = write_shards(Path(folder), total_tokens, shards, sparse)
            for workers in args.workers:
                first_batch_s, batches_per_s = measure_loading(
                    tokens, args.batch_size, args.block_size, workers, args.seconds
                )
                tokens_per_s = batches_per_s * args.batch_size * args.block_size
                rows.append(Row(total_tokens, shards, sparse, workers, first_batch_s, batches_per_s, tokens_per_s))
                print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    figures = {"options": vars(args), "rows": [asdict(row) for row in rows]}
    conditions = f"Batches of {args.batch_size} x {args.block_size:,} tokens."
    write_report(figures, markdown(rows), device="cpu", output=args.output, conditions=conditions)
