"""Packing: whole documents, each once per epoch, with the logits and the loss that each has alone."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.config.arguments import BatchArguments
from minigpt.data import shards as shards_module
from minigpt.data.datamodule import open_data_module
from minigpt.data.packing import PackedDocuments, Packing, Strategy, best_fit, kept_packing, pack, pieces
from minigpt.data.samples import TokenBlocks
from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS, Shard, Tokens, TokenShards
from minigpt.modeling.loss import IGNORE_INDEX
from minigpt.utils.errors import UserError

END = 0
LENGTHS = (7, 1, 0, 20, 3, 33, 2, 12, 5, 5, 8, 16, 15, 4, 1, 50)  # without the end; the last is longer than a row
Document = tuple[list[int], list[bool]]  # ids with their end, and which of them are in the loss


def documents(seed: int = 0) -> list[Document]:
    """Documents of LENGTHS; the loss is on the last part of each."""
    generator = np.random.default_rng(seed)
    result = []
    for length in LENGTHS:
        prompt = int(generator.integers(0, length + 1))
        ids = [*generator.integers(1, 50, length).tolist(), END]
        result.append((ids, [place >= prompt for place in range(length + 1)]))
    return result


def tokens_of(folder: Path, corpus: list[Document], loss_mask: bool) -> Tokens:
    """The documents in two shards; the first one ends inside a document."""
    ids = np.array([token for document, _ in corpus for token in document], dtype="<u2")
    ends = np.array([place == len(document) - 1 for document, _ in corpus for place in range(len(document))])
    in_loss = np.array([flag for _, flags in corpus for flag in flags])
    marks = (IN_LOSS * in_loss + ENDS_DOCUMENT * ends).astype(np.uint8)
    return marked_tokens(folder, ids, marks, loss_mask)


def marked_tokens(folder: Path, ids: np.ndarray, marks: np.ndarray, loss_mask: bool = True) -> Tokens:
    """Ids and, with `loss_mask`, their marks, in two shards."""
    shards = []
    for name, part in (("a", slice(0, 41)), ("b", slice(41, None))):
        ids[part].tofile(folder / f"{name}.bin")
        marks[part].tofile(folder / f"{name}.marks")
        mark_file = folder / f"{name}.marks" if loss_mask else None
        shards.append(Shard(folder / f"{name}.bin", len(ids[part]), marks=mark_file))
    return Tokens(shards, np.dtype("<u2"))


def packed(tokens: Tokens, block_size: int, end_of_text: int, strategy: Strategy) -> PackedDocuments:
    return PackedDocuments(tokens, block_size, strategy, pack(tokens, block_size, end_of_text, strategy))


def documents_in(samples: PackedDocuments, row: int) -> list[tuple[list[int], list[int], slice]]:
    """(inputs, labels, places in the row) of every document in a row, without the padding."""
    batch = samples[row]
    width = len(batch["input_ids"])
    positions = batch.get("position_ids", torch.arange(width))
    starts = [*torch.nonzero(positions == 0).flatten().tolist(), width]
    spans = [slice(start, stop) for start, stop in itertools.pairwise(starts)]
    contents = [(batch["input_ids"][span].tolist(), batch["shift_labels"][span].tolist(), span) for span in spans]
    count = int(samples.packing.row_bounds[row + 1] - samples.packing.row_bounds[row])
    assert all(set(labels) == {IGNORE_INDEX} for _, labels, _ in contents[count:])
    return contents[:count]


def random_bounds(generator: np.random.Generator) -> np.ndarray:
    """The bounds of up to 60 documents of 1 to 80 tokens."""
    return np.concatenate([[0], np.cumsum(generator.integers(1, 81, generator.integers(1, 60)))])


@pytest.mark.parametrize("seed", range(30))
def test_split_pieces_hold_every_target_once_and_no_other(seed: int) -> None:
    generator = np.random.default_rng(seed)
    bounds, block_size = random_bounds(generator), int(generator.integers(1, 50))
    starts, sizes = pieces(bounds, block_size, split=True)
    assert sizes.min(initial=1) >= 1
    assert sizes.max(initial=1) <= block_size
    packed = [
        position for start, size in zip(starts, sizes, strict=True) for position in range(start + 1, start + size + 1)
    ]
    assert packed == [position for first, end in itertools.pairwise(bounds) for position in range(first + 1, end)]


@pytest.mark.parametrize("seed", range(30))
def test_whole_pieces_are_the_beginnings_of_all_documents_with_a_target(seed: int) -> None:
    generator = np.random.default_rng(seed)
    bounds, block_size = random_bounds(generator), int(generator.integers(1, 50))
    starts, sizes = pieces(bounds, block_size, split=False)
    expected = [
        (first, min(end - first - 1, block_size))
        for first, end in itertools.pairwise(bounds.tolist())
        if end - first > 1
    ]
    assert list(zip(starts.tolist(), sizes.tolist(), strict=True)) == expected


def naive_best_fit_decreasing(sizes: list[int], capacity: int) -> list[int]:
    """The room left in every row if pieces are placed one at a time, as textbooks describe it; ascending."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        sufficient = [room for room in rooms if room >= size]
        if sufficient:
            rooms[rooms.index(min(sufficient))] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(40))
def test_rows_have_the_number_and_fill_of_best_fit_decreasing(seed: int) -> None:
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(1, 120))
    largest = int(generator.integers(1, capacity + 1))
    sizes = generator.integers(1, largest + 1, generator.integers(1, 400))
    rows = best_fit(sizes, capacity)
    assert len(rows) == len(sizes)
    assert set(rows.tolist()) == set(range(rows.max() + 1))
    room = capacity - np.bincount(rows, weights=sizes).astype(int)
    assert room.min() >= 0
    assert sorted(room.tolist()) == naive_best_fit_decreasing(sizes.tolist(), capacity)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "none"])
@pytest.mark.parametrize("seed", range(8))
def test_rows_hold_every_target_once(tmp_path: Path, seed: int, strategy: Strategy) -> None:
    generator = np.random.default_rng(seed)
    bounds, block_size = random_bounds(generator), int(generator.integers(2, 50))
    positions = np.arange(bounds[-1])  # every id is its position
    marks = (IN_LOSS * generator.integers(0, 2, len(positions))).astype(np.uint8)
    marks[bounds[1:] - 1] |= ENDS_DOCUMENT | IN_LOSS
    marks[bounds[:-1] + 1 - (np.diff(bounds) == 1)] |= IN_LOSS  # so that truncation leaves a target
    samples = packed(marked_tokens(tmp_path, positions.astype("<u2"), marks), block_size, -1, strategy)
    labels = np.concatenate([samples[row]["shift_labels"].numpy() for row in samples.full_pass()])
    limit = len(positions) if strategy == "bfd_split" else block_size
    in_row = np.concatenate(
        [np.arange(first + 1, min(end, first + 1 + limit)) for first, end in itertools.pairwise(bounds)]
    )
    assert sorted(labels[labels != IGNORE_INDEX].tolist()) == in_row[marks[in_row] & IN_LOSS > 0].tolist()


def test_millions_of_documents_are_packed_in_seconds() -> None:
    sizes = np.random.default_rng(0).lognormal(5, 1, 2_000_000).clip(1, 1024).astype(np.int32)
    rows = best_fit(sizes, 1024)
    assert np.bincount(rows, weights=sizes).max() <= 1024
    assert sizes.sum() / (1024 * (rows.max() + 1)) > 0.999


@pytest.mark.parametrize("loss_mask", [False, True])
@pytest.mark.parametrize("strategy", ["bfd", "none", "bfd_split"])
def test_every_epoch_has_every_document_exactly_once(tmp_path: Path, strategy: str, loss_mask: bool) -> None:
    corpus = documents()
    tokens = tokens_of(tmp_path, corpus, loss_mask)
    shards = TokenShards(tmp_path, {}, tokens, None, "")
    data_module = open_data_module(BatchArguments(block_size=40, packing_strategy=strategy), shards, END)
    expected = []
    for ids, in_loss in corpus:
        labels = [token if flag or not loss_mask else IGNORE_INDEX for token, flag in zip(ids, in_loss, strict=True)]
        for start in range(0, len(ids) - 1, 40)[: None if strategy == "bfd_split" else 1]:
            expected.append((ids[:-1][start : start + 40], labels[1:][start : start + 40]))
    per_epoch = data_module.order.samples_per_epoch
    for epoch in range(3):
        rows = data_module.sample_ids(epoch * per_epoch, per_epoch)
        assert sorted(rows) == list(data_module.train.full_pass())
        contents = [document[:2] for row in rows for document in documents_in(data_module.train, row)]
        assert sorted(contents) == sorted(expected)


@pytest.mark.parametrize("strategy", ["wrapped", "bfd", "none", "bfd_split"])
def test_the_target_count_is_that_of_the_batches(tmp_path: Path, strategy: str) -> None:
    shards = TokenShards(tmp_path, {}, tokens_of(tmp_path, documents(), loss_mask=True), None, "")
    data_module = open_data_module(BatchArguments(block_size=40, packing_strategy=strategy), shards, END)
    for start in range(2 * data_module.order.samples_per_epoch):
        batch = data_module.train.__getitems__(data_module.sample_ids(start, 3))
        assert data_module.target_count(start, 3) == int((batch["shift_labels"] != IGNORE_INDEX).sum())


@pytest.mark.parametrize("strategy", ["bfd", "none"])
def test_logits_and_loss_are_those_of_each_document_alone(model, tmp_path: Path, strategy: str) -> None:
    corpus = documents()
    samples = packed(tokens_of(tmp_path, corpus, loss_mask=True), 60, END, strategy)
    rows = list(samples.full_pass())
    batch = samples.__getitems__(rows)
    with torch.inference_mode():
        inputs = {name: values for name, values in batch.items() if name != "shift_labels"}
        logits = model(**inputs, use_cache=False).logits
        loss = model(**batch, num_items_in_batch=samples.target_count(rows), use_cache=False).loss
        for row in rows:
            for ids, _, span in documents_in(samples, row):
                alone = model(torch.tensor([ids]), use_cache=False).logits[0]
                assert (logits[row, span] - alone).abs().max() <= 1e-5
        nats, targets = 0.0, 0
        for ids, in_loss in corpus:  # labels as TRL makes them: unshifted, -100 in the prompt
            labels = torch.tensor([token if flag else IGNORE_INDEX for token, flag in zip(ids, in_loss, strict=True)])
            shifted = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
            nats += torch.nn.functional.cross_entropy(shifted, labels[1:], reduction="sum").item()
            targets += int((labels[1:] != IGNORE_INDEX).sum())
    assert loss.item() == pytest.approx(nats / targets, rel=1e-5)


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_documents_are_found_across_blocks(tmp_path: Path, monkeypatch, block: int) -> None:
    tokens = tokens_of(tmp_path, documents(), loss_mask=True)
    whole = packed(tokens, 40, END, "bfd_split")
    monkeypatch.setattr(shards_module, "READ_TOKENS", block)
    in_blocks = packed(tokens, 40, END, "bfd_split")
    assert np.array_equal(whole.packing.starts, in_blocks.packing.starts)
    assert np.array_equal(whole.packing.row_targets, in_blocks.packing.row_targets)


def test_documents_without_a_target_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no document of the text has two tokens"):
        packed(tokens_of(tmp_path, [([END], [True])] * 3, loss_mask=False), 8, END, "bfd")
    long_prompt = ([*range(1, 20), END], [False] * 19 + [True])
    with pytest.raises(UserError, match="block_size=8 is shorter than every prompt"):
        packed(tokens_of(tmp_path, [long_prompt] * 3, loss_mask=True), 8, END, "bfd")


def test_conversations_that_are_cut_before_their_first_answer_are_counted(tmp_path: Path) -> None:
    corpus = [([*range(1, length), END], [False] * (length - 1) + [True]) for length in (5, 20, 8, 30)]
    tokens = tokens_of(tmp_path, corpus, loss_mask=True)
    summary = str(packed(tokens, 8, END, "bfd"))
    assert (
        "2 documents are longer than a row and are truncated, 2 of them before the first token in the loss" in summary
    )
    assert "before the first" not in str(packed(tokens, 8, END, "bfd_split"))


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    shards = TokenShards(tmp_path, {}, tokens_of(tmp_path, documents(), loss_mask=True), None, "")
    args = BatchArguments(block_size=40, packing_strategy="bfd", per_device_train_batch_size=3)
    alone = open_data_module(args, shards, END).batches(args, 5, 0, 1)
    with_workers = open_data_module(args, shards, END).batches(args.with_values(dataloader_num_workers=2), 5, 0, 1)
    for batch, same, _ in zip(alone, with_workers, range(8), strict=False):
        assert all(torch.equal(batch[name], same[name]) for name in ("input_ids", "shift_labels", "position_ids"))


def test_padding_is_as_wide_as_the_longest_document_of_the_batch(tmp_path: Path) -> None:
    samples = packed(tokens_of(tmp_path, documents(), loss_mask=False), 40, END, "none")
    assert samples.__getitems__([0, 2])["input_ids"].shape == (2, 20)
    assert "longer than a row" in str(samples)


def test_the_loss_mask_applies_to_wrapped_samples_too(tmp_path: Path) -> None:
    corpus = documents()
    tokens = tokens_of(tmp_path, corpus, loss_mask=True)
    ids = [token for document, _ in corpus for token in document]
    in_loss = [flag for _, flags in corpus for flag in flags]
    labels = TokenBlocks(tokens, 30).__getitems__([25])["shift_labels"][0].tolist()
    assert labels == [ids[place] if in_loss[place] else IGNORE_INDEX for place in range(26, 56)]


def test_a_packing_that_is_kept_is_computed_once_and_gives_the_same_batches(tmp_path: Path) -> None:
    tokens = tokens_of(tmp_path, documents(), loss_mask=True)
    computed: list[Packing] = []

    def compute() -> Packing:
        computed.append(pack(tokens, 40, END, "bfd_split"))
        return computed[-1]

    expected = packed(tokens, 40, END, "bfd_split")
    for _ in range(2):
        kept = PackedDocuments(tokens, 40, "bfd_split", kept_packing(tmp_path / "cache" / "packing", compute))
        assert str(kept) == str(expected)
        for row in expected.full_pass():
            batch = kept[row]
            assert all(torch.equal(values, batch[name]) for name, values in expected[row].items())
        assert kept.target_count([0, 1]) == expected.target_count([0, 1])
    assert len(computed) == 1
