"""Loading gives the same samples for any number and size of shards, and at positions beyond 32 bits."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.data.datamodule import loader
from minigpt.data.samplers import BlockOrder, TrainBatchSampler
from minigpt.data.samples import TokenBlocks
from minigpt.data.shards import Shard, Tokens


def tokens_in_shards(folder: Path, ids: np.ndarray, number: int) -> Tokens:
    shards = []
    for index, part in enumerate(np.array_split(ids, number)):
        part.astype("<u2").tofile(folder / f"{number}-{index}.bin")
        shards.append(Shard(folder / f"{number}-{index}.bin", len(part)))
    return Tokens(shards, np.dtype("<u2"))


def first_batches(tokens: Tokens, number: int, workers: int = 0) -> list[torch.Tensor]:
    order = BlockOrder(len(tokens), 64, seed=1)
    batches = TrainBatchSampler(order, start=0, micro_batch=8, rank=0, processes=1)
    return [batch["input_ids"] for batch in islice(loader(TokenBlocks(tokens, 64), batches, workers), number)]


@pytest.mark.parametrize(("shards", "workers"), [(10, 0), (1000, 0), (1000, 2)])
def test_batches_do_not_depend_on_how_the_tokens_are_sharded(tmp_path: Path, shards: int, workers: int) -> None:
    ids = np.random.default_rng(0).integers(0, 60_000, 100_000)
    one = first_batches(tokens_in_shards(tmp_path, ids, 1), 50)
    many = first_batches(tokens_in_shards(tmp_path, ids, shards), 50, workers)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.slow
def test_ten_billion_tokens_are_sampled_from_end_to_end(tmp_path: Path) -> None:
    """Five sparse files, with a marker every 400 million tokens."""
    per_shard, step = 2_000_000_000, 400_000_000
    shards = []
    for index in range(5):
        path = tmp_path / f"{index}.bin"
        with path.open("wb") as file:
            file.truncate(2 * per_shard)
            for place in range(0, per_shard, step):
                file.seek(2 * place)
                file.write(np.array([(index * per_shard + place) // step + 1], "<u2").tobytes())
        shards.append(Shard(path, per_shard))
    tokens = Tokens(shards, np.dtype("<u2"))
    order = BlockOrder(len(tokens), 1024, seed=0)
    starts = np.array([order[position] for position in range(1000)])
    assert order.samples_per_epoch == (10**10 - 1 - 1024) // 1024
    assert starts.min() < 2**28
    assert starts.max() > 2**33
    assert len(first_batches(tokens, 5)) == 5
    for marker in range(25):
        batch = TokenBlocks(tokens, 4).__getitems__([marker * step])
        assert batch["input_ids"].tolist() == [[marker + 1, 0, 0, 0]]
