"""How fast do batches come? `minigpt bench load`: the loader alone, in random order, from few and many shards.

The shards are written to a temporary folder first: random ids, and one set that is as long as you say but sparse, so
that its positions are real and its bytes need no disk. Each row reads batches for some seconds, the first one apart:
it starts the workers and draws the order.
"""

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from minigpt.benchmark_report import describe_machine, machine, show
from minigpt.data import SampleOrder, TokenBlocks, TrainBatches, loader
from minigpt.shards import Shard, Tokens

DTYPE = np.dtype("<u2")
SPARSE_SHARDS = 100


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    tokens: int
    shards: int
    sparse: bool
    workers: int
    first_batch_s: float
    batches_per_s: float
    tokens_per_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `minigpt bench load`."""
    add = parser.add_argument
    add("--tokens", type=int, default=10**8, metavar="N", help="of random ids (default: %(default)s)")
    add("--shards", type=int, nargs="+", default=[1, 10, 1000], metavar="N", help="default: 1 10 1000")
    add("--sparse_tokens", type=int, default=10**10, metavar="N", help="in sparse files (default: %(default)s)")
    add("--batch_size", type=int, default=12, metavar="N", help="samples a batch (default: %(default)s)")
    add("--block_size", type=int, default=1024, metavar="N", help="tokens a sample (default: %(default)s)")
    add("--workers", type=int, nargs="+", default=[0, 2], metavar="N", help="worker processes (default: 0 2)")
    add("--seconds", type=float, default=3.0, metavar="S", help="of each row (default: %(default)s)")
    add("--output", metavar="FILE", help="write FILE.json and FILE.md too")


def main(args: argparse.Namespace) -> None:
    """`minigpt bench load`. Raises ValueError on numbers that cannot be."""
    for name in ("tokens", "sparse_tokens", "batch_size", "block_size", "seconds"):
        if getattr(args, name) <= 0:
            raise ValueError(f"{name}={getattr(args, name)} must be above 0")
    if min(args.shards) < 1 or min(args.workers) < 0:
        raise ValueError(f"shards={args.shards} must be at least 1, and workers={args.workers} at least 0")
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


def write_shards(folder: Path, total: int, number: int, sparse: bool) -> Tokens:
    """`total` tokens in `number` files: random ids, or holes."""
    ends = [total * index // number for index in range(number + 1)]
    shards = []
    for index, (start, end) in enumerate(pairwise(ends)):
        path = folder / f"{index}.bin"
        if sparse:
            with path.open("wb") as file:
                file.truncate((end - start) * DTYPE.itemsize)
        else:
            np.random.default_rng(index).integers(50257, size=end - start, dtype=np.uint16).astype(DTYPE).tofile(path)
        shards.append(Shard(path, end - start))
    return Tokens(shards, DTYPE)


def rate(tokens: Tokens, batch_size: int, block_size: int, workers: int, seconds: float) -> tuple[float, float]:
    """Seconds until the first batch, and batches a second behind it."""
    begin = time.perf_counter()
    order = SampleOrder(len(tokens), block_size, seed=0)
    batches = TrainBatches(order, start=0, micro_batch=batch_size, rank=0, processes=1)
    source = iter(loader(TokenBlocks(tokens, block_size), batches, workers))
    next(source)
    started = time.perf_counter()
    count, now = 0, started
    while now < started + seconds:
        next(source)
        count, now = count + 1, time.perf_counter()
    return started - begin, count / (now - started)


def markdown(rows: list[Row]) -> str:
    """The table."""
    lines = [
        "| tokens | shards | workers | first batch, s | batches/s | million tokens/s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        kind = " (sparse)" if row.sparse else ""
        lines.append(
            f"| {row.tokens:,}{kind} | {row.shards:,} | {row.workers} | {row.first_batch_s:.2f} "
            f"| {row.batches_per_s:,.0f} | {row.tokens_per_s / 1e6:,.1f} |"
        )
    return "\n".join(lines)
