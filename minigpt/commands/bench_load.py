"""Measure loading batches."""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from minigpt.utils.errors import CommandParser, UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt bench load`."""
    parser = CommandParser("minigpt bench load", __doc__)
    add = parser.add_argument
    add("--tokens", type=int, default=10**8, metavar="N", help="of random ids (default: %(default)s)")
    add("--shards", type=int, nargs="+", default=[1, 10, 1000], metavar="N", help="default: 1 10 1000")
    add("--sparse_tokens", type=int, default=10**10, metavar="N", help="in sparse files (default: %(default)s)")
    add("--batch_size", type=int, default=12, metavar="N", help="samples a batch (default: %(default)s)")
    add("--block_size", type=int, default=1024, metavar="N", help="tokens a sample (default: %(default)s)")
    add("--workers", type=int, nargs="+", default=[0, 2], metavar="N", help="worker processes (default: 0 2)")
    add("--seconds", type=float, default=3.0, metavar="S", help="of each row (default: %(default)s)")
    add("--output", metavar="FILE", help="write FILE.json and FILE.md too")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """`minigpt bench load`. Raises UserError on numbers that cannot be."""
    from minigpt.benchmarks.load import SPARSE_SHARDS, Row, markdown, rate, write_shards
    from minigpt.benchmarks.report import describe_machine, machine, show

    for name in ("tokens", "sparse_tokens", "batch_size", "block_size", "seconds"):
        if getattr(args, name) <= 0:
            raise UserError(f"{name}={getattr(args, name)} must be above 0")
    if min(args.shards) < 1 or min(args.workers) < 0:
        raise UserError(f"shards={args.shards} must be at least 1, and workers={args.workers} at least 0")
    rows = []
    sets = [(args.tokens, number, False) for number in args.shards] + [(args.sparse_tokens, SPARSE_SHARDS, True)]
    for total, number, sparse in sets:
        with tempfile.TemporaryDirectory() as folder:
            tokens = write_shards(Path(folder), total, number, sparse)
            for workers in args.workers:
                first_s, batches_per_s = rate(tokens, args.batch_size, args.block_size, workers, args.seconds)
                tokens_per_s = batches_per_s * args.batch_size * args.block_size
                rows.append(Row(total, number, sparse, workers, first_s, batches_per_s, tokens_per_s))
                print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    about = machine("cpu")
    text = f"{describe_machine(about)} Batches of {args.batch_size} x {args.block_size:,} tokens.\n\n{markdown(rows)}"
    show({"machine": about, "options": vars(args), "rows": [asdict(row) for row in rows]}, text, args.output)
