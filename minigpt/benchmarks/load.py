"""Benchmark loading batches from token shards."""

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from minigpt.data.datamodule import loader
from minigpt.data.samplers import SampleOrder, TrainBatches
from minigpt.data.samples import TokenBlocks
from minigpt.data.shards import Shard, Tokens

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
