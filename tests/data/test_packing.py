"""Laws of packing: whole documents, each exactly once an epoch, with the logits and the loss that each has alone."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.config.arguments import BatchArguments
from minigpt.data import packing
from minigpt.data.datamodule import open_data_module
from minigpt.data.packing import PackedDocuments, best_fit
from minigpt.data.samples import TokenBlocks
from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS, Shard, Tokens, TokenShards
from minigpt.modeling.loss import IGNORE_INDEX

END = 0
LENGTHS = (7, 1, 0, 20, 3, 33, 2, 12, 5, 5, 8, 16, 15, 4, 1, 50)  # without the end; the last is longer than a row
Document = tuple[list[int], list[bool]]


def documents(seed: int = 0) -> list[Document]:
    """Ids with their end, and which of them are targets: the latter part of each document."""
    generator = np.random.default_rng(seed)
    made = []
    for length in LENGTHS:
        prompt = int(generator.integers(0, length + 1))
        made.append(
            ([*generator.integers(1, 50, length).tolist(), END], [place >= prompt for place in range(length + 1)])
        )
    return made


def tokens_of(folder: Path, made: list[Document], marked: bool) -> Tokens:
    """The documents in two shards that are cut inside of one."""
    ids = np.array([token for document, _ in made for token in document], dtype="<u2")
    ends = np.array([place == len(of) - 1 for of, _ in made for place in range(len(of))])
    marks = (IN_LOSS * np.array([learned for _, of in made for learned in of]) + ENDS_DOCUMENT * ends).astype(np.uint8)
    shards = []
    for name, part in (("a", slice(0, 41)), ("b", slice(41, None))):
        ids[part].tofile(folder / f"{name}.bin")
        marks[part].tofile(folder / f"{name}.marks")
        shards.append(
            Shard(folder / f"{name}.bin", len(ids[part]), marks=folder / f"{name}.marks" if marked else None)
        )
    return Tokens(shards, np.dtype("<u2"))


def documents_in(samples: PackedDocuments, row: int) -> list[tuple[list[int], list[int], slice]]:
    """(inputs, labels, where they are) of every document in a row, padding left out."""
    batch = samples[row]
    width = len(batch["input_ids"])
    positions = batch.get("position_ids", torch.arange(width))
    starts = [*torch.nonzero(positions == 0).flatten().tolist(), width]
    spans = [slice(start, stop) for start, stop in itertools.pairwise(starts)]
    found = [(batch["input_ids"][span].tolist(), batch["shift_labels"][span].tolist(), span) for span in spans]
    number = int(samples.bounds[row + 1] - samples.bounds[row])
    assert all(set(labels) == {IGNORE_INDEX} for _, labels, _ in found[number:])
    return found[:number]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("largest", [3, 16, 100])
def test_rows_are_those_of_best_fit_decreasing(seed: int, largest: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, largest + 1, 400)
    rooms: list[int] = []
    for size in sorted(sizes.tolist(), reverse=True):  # the textbook, one piece at a time
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(100 - size)
    rows = best_fit(sizes, 100)
    filled = np.bincount(rows, weights=sizes)
    assert sorted(100 - filled) == sorted(rooms)


def test_millions_of_documents_are_packed_in_seconds() -> None:
    sizes = np.random.default_rng(0).lognormal(5, 1, 2_000_000).clip(1, 1024).astype(np.int32)
    rows = best_fit(sizes, 1024)
    assert np.bincount(rows, weights=sizes).max() <= 1024
    assert sizes.sum() / (1024 * (rows.max() + 1)) > 0.999


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("strategy", ["bfd", "none", "bfd_split"])
def test_every_document_is_there_exactly_once_an_epoch_and_alone(tmp_path: Path, strategy: str, marked: bool) -> None:
    made = documents()
    tokens = tokens_of(tmp_path, made, marked)
    shards = TokenShards(tmp_path, {}, tokens, None, "")
    data_module = open_data_module(BatchArguments(block_size=40, packing_strategy=strategy), shards, END)
    wanted = []
    for ids, learned in made:
        labels = [token if not marked or of else IGNORE_INDEX for token, of in zip(ids, learned, strict=True)]
        for start in range(0, len(ids) - 1, 40)[: None if strategy == "bfd_split" else 1]:
            wanted.append((ids[:-1][start : start + 40], labels[1:][start : start + 40]))
    for epoch in range(3):
        rows = [
            data_module.order[position]
            for position in range(epoch * data_module.order.samples, (epoch + 1) * data_module.order.samples)
        ]
        assert sorted(rows) == list(data_module.train.every())
        found = [document[:2] for row in rows for document in documents_in(data_module.train, row)]
        assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("strategy", ["wrapped", "bfd", "none", "bfd_split"])
def test_the_number_of_targets_is_known_without_reading_a_batch(tmp_path: Path, strategy: str) -> None:
    shards = TokenShards(tmp_path, {}, tokens_of(tmp_path, documents(), marked=True), None, "")
    data_module = open_data_module(BatchArguments(block_size=40, packing_strategy=strategy), shards, END)
    for start in range(2 * data_module.order.samples):
        samples = [data_module.order[position] for position in (start, start + 1, start + 2)]
        labels = [data_module.train[sample]["shift_labels"] for sample in samples]
        assert data_module.targets(start, 3) == sum(int((of != IGNORE_INDEX).sum()) for of in labels)


@pytest.mark.parametrize("strategy", ["bfd", "none"])
def test_logits_and_loss_are_those_of_each_document_alone(model, tmp_path: Path, strategy: str) -> None:
    made = documents()
    samples = PackedDocuments(tokens_of(tmp_path, made, marked=True), 60, END, strategy)
    rows = list(samples.every())
    batch = samples.__getitems__(rows)
    with torch.inference_mode():
        logits = model(**{name: of for name, of in batch.items() if name != "shift_labels"}, use_cache=False).logits
        loss = model(**batch, num_items_in_batch=samples.targets(rows), use_cache=False).loss
        for row in rows:
            for ids, _, span in documents_in(samples, row):
                alone = model(torch.tensor([ids]), use_cache=False).logits[0]
                assert (logits[row, span] - alone).abs().max() <= 1e-5
        nats, targets = 0.0, 0
        for ids, learned in made:  # labels as TRL makes them: unshifted, -100 in the prompt
            labels = torch.tensor([token if of else IGNORE_INDEX for token, of in zip(ids, learned, strict=True)])
            shifted = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
            nats += torch.nn.functional.cross_entropy(shifted, labels[1:], reduction="sum").item()
            targets += int((labels[1:] != IGNORE_INDEX).sum())
    assert loss.item() == pytest.approx(nats / targets, rel=1e-5)


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_documents_are_found_across_blocks(tmp_path: Path, monkeypatch, block: int) -> None:
    tokens = tokens_of(tmp_path, documents(), marked=True)
    whole = PackedDocuments(tokens, 40, END, "bfd_split")
    monkeypatch.setattr(packing, "READ_TOKENS", block)
    in_blocks = PackedDocuments(tokens, 40, END, "bfd_split")
    assert np.array_equal(whole.starts, in_blocks.starts)
    assert np.array_equal(whole.row_targets, in_blocks.row_targets)


def test_documents_without_a_target_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no document of the text has two tokens"):
        PackedDocuments(tokens_of(tmp_path, [([END], [True])] * 3, marked=False), 8, END, "bfd")
    long_prompt = ([*range(1, 20), END], [False] * 19 + [True])
    with pytest.raises(ValueError, match="every prompt is longer than block_size=8"):
        PackedDocuments(tokens_of(tmp_path, [long_prompt] * 3, marked=True), 8, END, "bfd")


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    shards = TokenShards(tmp_path, {}, tokens_of(tmp_path, documents(), marked=True), None, "")
    args = BatchArguments(block_size=40, packing_strategy="bfd", per_device_train_batch_size=3)
    alone = open_data_module(args, shards, END).batches(args, 5, 0, 1)
    helped = open_data_module(args, shards, END).batches(args.with_values(dataloader_num_workers=2), 5, 0, 1)
    for batch, same, _ in zip(alone, helped, range(8), strict=False):
        assert all(torch.equal(batch[name], same[name]) for name in ("input_ids", "shift_labels", "position_ids"))


def test_padding_is_as_wide_as_the_longest_document_of_the_batch(tmp_path: Path) -> None:
    samples = PackedDocuments(tokens_of(tmp_path, documents(), marked=False), 40, END, "none")
    assert samples.__getitems__([0, 2])["input_ids"].shape == (2, 20)
    assert "longer than a row" in str(samples)


def test_marks_take_targets_out_of_wrapped_samples_too(tmp_path: Path) -> None:
    made = documents()
    tokens = tokens_of(tmp_path, made, marked=True)
    ids = [token for document, _ in made for token in document]
    learned = [of for _, document in made for of in document]
    labels = TokenBlocks(tokens, 30).__getitems__([25])["shift_labels"][0].tolist()
    assert labels == [ids[at] if learned[at] else IGNORE_INDEX for at in range(26, 56)]
