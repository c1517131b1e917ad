"""Measure how fast batches are loaded from token shards."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from minigpt.data.datamodule import loader
from minigpt.data.samplers import BlockOrder, TrainBatchSampler
from minigpt.data.samples import TokenBlocks
from minigpt.data.shards import Shard, Tokens
from minigpt.utils.formatting import markdown_table

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


def write_shards(folder: Path, total_tokens: int, shards: int, sparse: bool) -> Tokens:
    """`total_tokens` tokens in `shards` files of equal size: random ids, or sparse files without content."""
    ends = [total_tokens * index // shards for index in range(shards + 1)]
    written = []
    for index, (start, end) in enumerate(pairwise(ends)):
        path = folder / f"{index}.bin"
        if sparse:
            with path.open("wb") as file:
                file.truncate((end - start) * DTYPE.itemsize)
        else:
            np.random.default_rng(index).integers(50257, size=end - start, dtype=np.uint16).astype(DTYPE).tofile(path)
        written.append(Shard(path, end - start))
    return Tokens(written, DTYPE)


def measure_loading(
    tokens: Tokens, batch_size: int, block_size: int, workers: int, seconds: float
) -> tuple[float, float]:
    """Seconds until the first batch, and batches per second after it."""
    started = time.perf_counter()
    order = BlockOrder(len(tokens), block_size, seed=0)
    sampler = TrainBatchSampler(order, start=0, micro_batch=batch_size, rank=0, processes=1)
    batches = iter(loader(TokenBlocks(tokens, block_size), sampler, workers))
    next(batches)
    first_batch = now = time.perf_counter()
    count = 0
    while now < first_batch + seconds:
        next(batches)
        count, now = count + 1, time.perf_counter()
    return first_batch - started, count / (now - first_batch)


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    head = ("tokens", "shards", "workers", "first batch, s", "batches/s", "million tokens/s")
    cells = (
        (
            f"{row.tokens:,}{' (sparse)' if row.sparse else ''}",
            f"{row.shards:,}",
            str(row.workers),
            f"{row.first_batch_s:.2f}",
            f"{row.batches_per_s:,.0f}",
            f"{row.tokens_per_s / 1e6:,.1f}",
        )
        for row in rows
    )
    return markdown_table(head, cells, numeric=True)
