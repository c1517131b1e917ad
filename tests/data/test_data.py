"""Samples, their order and their batches: independent of processes, micro-batches, workers and resumption."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.config.arguments import BatchArguments
from minigpt.data.datamodule import loader, samples_per_step, steps_of_run
from minigpt.data.samplers import BlockOrder, EvaluationBatchSampler, TrainBatchSampler
from minigpt.data.samples import TokenBlocks
from minigpt.data.shards import Shard, Tokens
from minigpt.modeling.loss import IGNORE_INDEX
from minigpt.utils.errors import UserError


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    """Ids 0 … 999 in two shards, so that every id is its position."""
    np.arange(0, 333, dtype="<u2").tofile(tmp_path / "a.bin")
    np.arange(333, 1000, dtype="<u2").tofile(tmp_path / "b.bin")
    return Tokens([Shard(tmp_path / "a.bin", 333), Shard(tmp_path / "b.bin", 667)], np.dtype("<u2"))


def test_targets_are_the_inputs_shifted_by_one_token(tokens: Tokens) -> None:
    starts = [0, 320, 17, 983]  # the second sample crosses from one shard to the next
    batch = TokenBlocks(tokens, 16).__getitems__(starts)
    assert torch.equal(batch["input_ids"], torch.tensor(starts)[:, None] + torch.arange(16))
    assert torch.equal(batch["shift_labels"], batch["input_ids"] + 1)


@pytest.mark.parametrize("block_size", [16, 37, 999, 5000])
def test_evaluation_scores_every_token_but_the_first_exactly_once(tokens: Tokens, block_size: int) -> None:
    scored = []
    for starts in EvaluationBatchSampler(TokenBlocks(tokens, block_size).full_pass(), 4, 0, 1):
        batch = TokenBlocks(tokens, block_size).__getitems__(starts)
        scored += batch["shift_labels"][batch["shift_labels"] != IGNORE_INDEX].tolist()
        assert batch["input_ids"].min() >= 0
    assert scored == list(range(1, 1000))


@pytest.mark.parametrize(("token_count", "stride"), [(1000, None), (1000, 5), (1000, 1), (33, None), (17, None)])
def test_every_epoch_visits_every_sample_once_and_stays_inside_the_text(token_count: int, stride: int | None) -> None:
    order = BlockOrder(token_count, 16, seed=3, stride=stride)
    per_epoch = order.samples_per_epoch
    for epoch in range(20):
        starts = sorted(order[epoch * per_epoch + place] for place in range(per_epoch))
        assert {later - earlier for earlier, later in pairwise(starts)} <= {stride or 16}
        assert 0 <= starts[0] < (stride or 16)
        assert starts[-1] + 16 < token_count


def test_order_and_offset_depend_on_seed_and_epoch_alone() -> None:
    def epochs(seed: int, first: int) -> list[tuple[int, ...]]:
        order = BlockOrder(1000, 16, seed)
        per_epoch = order.samples_per_epoch
        ranges = [range(epoch * per_epoch, (epoch + 1) * per_epoch) for epoch in range(first, 4)]
        return [tuple(order[position] for position in positions) for positions in ranges]

    assert epochs(3, first=2) == epochs(3, first=0)[2:]
    assert len(set(epochs(3, 0) + epochs(4, 0))) == 8
    assert len({min(epoch) for epoch in epochs(3, 0)}) > 1


def samples_of_steps(processes: int, micro_batch: int, accumulation: int, start: int, steps: int) -> list[set[int]]:
    """The sample ids of every step of the whole run, collected from all processes."""
    samples: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(processes):
        batches = iter(TrainBatchSampler(BlockOrder(850, 16, 1), start, micro_batch, rank, processes))
        for step in range(steps):
            for _ in range(accumulation):
                samples[step] += next(batches)
    return [set(of_step) for of_step in samples]


def test_a_step_has_the_same_samples_for_any_division_and_after_resuming() -> None:
    expected = samples_of_steps(1, 8, 1, start=0, steps=12)  # the epoch ends in step 7
    for processes, micro_batch, accumulation in [(1, 1, 8), (2, 4, 1), (2, 2, 2), (4, 2, 1), (8, 1, 1)]:
        assert samples_of_steps(processes, micro_batch, accumulation, 0, 12) == expected
        assert samples_of_steps(processes, micro_batch, accumulation, 5 * 8, 7) == expected[5:]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_batches_are_the_same_for_any_number_of_processes(processes: int) -> None:
    samplers = [EvaluationBatchSampler(range(0, 184, 8), 4, rank, processes) for rank in range(processes)]
    assert len({len(list(sampler)) for sampler in samplers}) == 1, "a process has more forward passes than another"
    batches = sorted(batch for sampler in samplers for batch in list(sampler)[: sampler.counted])
    assert batches == [list(range(first, min(first + 32, 184), 8)) for first in range(0, 184, 32)]


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_change_nothing(tokens: Tokens, workers: int) -> None:
    blocks = TokenBlocks(tokens, 16)
    batches = iter(loader(blocks, TrainBatchSampler(BlockOrder(1000, 16, 0), 0, 4, 0, 1), workers))
    order = BlockOrder(1000, 16, 0)
    for index in range(20):
        starts = [order[position] for position in range(index * 4, index * 4 + 4)]
        assert torch.equal(next(batches)["input_ids"], blocks.__getitems__(starts)["input_ids"])


def test_text_shorter_than_a_block_is_refused_with_a_size_that_works() -> None:
    with pytest.raises(UserError, match=r"1000 tokens.*block_size=1000.*try block_size=999"):
        BlockOrder(1000, 1000, 0)
    assert BlockOrder(1000, 999, 0)[0] == 0


def test_epochs_and_steps_agree() -> None:
    args = BatchArguments(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=3.0)
    assert samples_per_step(args, processes=2) == 16
    assert steps_of_run(args, samples_per_epoch=160, processes=2) == 30
    assert steps_of_run(args.with_values(max_steps=7), samples_per_epoch=160, processes=2) == 7
