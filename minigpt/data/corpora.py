"""Open a corpus: the training and validation documents of every source of text.

The validation split is `validation_file`, or the validation split of the data set. Without either,
`validation_split_percentage` of the text is held out, as `HeldOut` describes.
"""

import hashlib
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minigpt.config.arguments import DataArguments
from minigpt.data import hub_datasets, python_chat, python_docs
from minigpt.data.chat import Example
from minigpt.data.readers import (
    COMPRESSED_SUFFIXES,
    Chain,
    InMemoryDocuments,
    InMemoryRows,
    JsonLines,
    Pieces,
    Source,
    TextFile,
)
from minigpt.data.rows import Columns, RowFormat
from minigpt.data.tables import arrow_rows, parquet_rows
from minigpt.utils.errors import UserError
from minigpt.utils.files import file_sha256

JSON_SUFFIXES = {".jsonl", ".json", ".ndjson"}
TABLE_SUFFIXES = {".parquet", ".arrow"}
TEXT_SUFFIXES = {".txt", ".md", ".text", ".rst", ""}
READABLE_SUFFIXES = JSON_SUFFIXES | TABLE_SUFFIXES | TEXT_SUFFIXES
VALIDATION_SPLIT_NAMES = ("validation", "valid", "val", "dev")
SPLIT_SEED = 0  # part of the format of the split, and not the seed of a run: all runs validate on the same documents


@dataclass(frozen=True)
class Corpus:
    """The documents of both splits.

    `key` changes with the content. `origin` describes the source in the manifest. `text_bytes` is the approximate
    amount of text, None if unknown. `row_format` is the format of the rows if the documents are examples.
    """

    key: str
    origin: dict[str, Any]
    train: "Documents"
    validation: "Documents"
    text_bytes: int | None
    row_format: RowFormat | None = None

    @property
    def is_conversational(self) -> bool:
        """Whether the first training document is a conversation, which needs a chat template."""
        if self.row_format is None:
            return False
        document, _ = next(self.train.pieces(), (None, True))
        return isinstance(document, Example) and document.is_conversational


class Documents(ABC):
    """Some of the documents of a source, in order."""

    @abstractmethod
    def pieces(self, start: int = 0) -> Pieces:
        """The documents from number `start` on, in pieces, each with whether the document ends."""


@dataclass
class AllDocuments(Documents):
    """Every document of a source."""

    source: Source

    def pieces(self, start: int = 0) -> Pieces:
        return self.source.pieces(start, sys.maxsize)


@dataclass
class HeldOut:
    """Which documents of a source are held out for validation. Documents are counted and measured when it is needed.

    `share` of the bytes are held out. A document larger than this share of the text is cut at its end, where nanoGPT
    cuts a single one. Of the other documents whole ones are held out, in an order shuffled with a fixed seed, until
    one more would not bring their bytes nearer to `share`. So every kind of document is in both splits, and half to
    one and a half times `share` is held out. An example is never cut: if each one is larger than `share` of the text,
    the smallest is held out.

    With `place`, `share` of the number of documents are held out instead, the first or the last ones: in a stream,
    because its end is only reached by downloading all of it, and in documents that are shuffled already.
    """

    source: Source
    origin: dict[str, Any]
    share: float
    place: Literal["first", "last"] | None

    @cached_property
    def _marks(self) -> tuple[np.ndarray, np.ndarray]:
        """Which documents are held out as a whole, and which are cut: two bool [documents]."""
        count = self.source.count()
        if count == 0:
            raise UserError(f"no documents in {_name(self.origin)}")
        whole, cut = np.zeros(count, dtype=bool), np.full(count, count == 1)
        if count > 1 and self.place:
            held_out = min(count - 1, max(1, round(count * self.share)))
            whole[slice(held_out) if self.place == "first" else slice(-held_out, None)] = True
        elif count > 1:
            sizes = self.source.sizes()
            is_large = sizes > self.share * sizes.sum()
            if self.source.row_format is None:
                cut = is_large
            order = np.random.default_rng(SPLIT_SEED).permutation(count)
            order = order[~is_large[order]]
            held_out_bytes = np.concatenate([[0], np.cumsum(sizes[order])])
            wanted_bytes = self.share * (sizes.sum() - sizes[cut].sum())
            whole[order[: np.abs(held_out_bytes - wanted_bytes).argmin()]] = True
            if not cut.any() and not whole.any():
                whole[sizes.argmin()] = True
            if whole.all():
                whole[order[0]] = False
        return whole, cut

    def chosen(self, is_validation: bool) -> np.ndarray:
        """The documents of a split, whole or in part: bool [documents]."""
        whole, cut = self._marks
        return whole | cut if is_validation else ~whole

    @property
    def cut(self) -> np.ndarray:
        """The documents that are cut, their start for training and their end for validation: bool [documents]."""
        return self._marks[1]


@dataclass
class SplitDocuments(Documents):
    """The training or the validation documents of a source, as `split` divides them."""

    split: HeldOut
    is_validation: bool

    def pieces(self, start: int = 0) -> Pieces:
        chosen = self.split.chosen(self.is_validation)
        numbers = np.flatnonzero(chosen)[start:]
        if not len(numbers):
            return iter(())
        pieces = self.split.source.pieces(int(numbers[0]), int(numbers[-1]) + 1, chosen)
        return self._parts_of_cut_documents(pieces, numbers) if self.split.cut.any() else pieces

    def _parts_of_cut_documents(self, pieces: Pieces, numbers: np.ndarray) -> Pieces:
        """The pieces of the documents `numbers`, without what belongs to the other split."""
        documents = iter(numbers)
        number, position, bounds = next(documents), 0, None
        for text, ends in pieces:
            if self.split.cut[number]:
                if not isinstance(text, str):
                    raise UserError(f"{text.where}: the only example; give more, or a --validation_file")
                first, stop = bounds = bounds or self._characters(number, len(text) if ends else None)
                yield text[max(0, first - position) : max(0, stop - position)], ends
                position += len(text)
            else:
                yield text, ends
            if ends:
                number, position, bounds = next(documents, -1), 0, None

    def _characters(self, number: int, length: int | None) -> tuple[int, int]:
        """The first character of a cut document that belongs to this split, and the one after the last.

        `length` is the number of its characters; None if they have to be counted.
        """
        if length is None:
            length = sum(len(text) for text, _ in self.split.source.pieces(number, number + 1))
        cut = int(length * (1 - self.split.share))
        return (cut, length) if self.is_validation else (0, cut)


def open_corpus(args: DataArguments) -> Corpus:
    """The corpus that `args` describe.

    Raises UserError, in this function or while documents are read, if the text is missing or damaged.
    """
    columns = Columns(args.text_column, prefer_examples=bool(args.chat_template or args.completion_only_loss))
    if args.train_file:
        corpus = _files_corpus(args.train_file, args, columns)
    elif args.corpus == "python-docs":
        origin = {"corpus": args.corpus, "python": sys.version.split()[0]}
        key = f"python-docs:{python_docs.RECIPE}:{sys.version}"
        corpus = _split(
            InMemoryDocuments(python_docs.documents), args, key, origin, python_docs.TEXT_BYTES, place="last"
        )
    elif args.corpus == "python-chat":
        origin = {"corpus": args.corpus, "python": sys.version.split()[0]}
        key = f"python-chat:{python_chat.RECIPE}:{sys.version}"
        rows = InMemoryRows(python_chat.documents, args.corpus)
        corpus = _split(rows, args, key, origin, python_chat.TEXT_BYTES, place="last")
    elif args.dataset_name or args.corpus:
        corpus = _dataset_corpus(args, columns)
    else:
        raise UserError("no text to prepare: give --train_file, --dataset_name or --corpus")
    for name in ("completion_only_loss", "chat_template"):
        if getattr(args, name) is not None and corpus.row_format is None:
            raise UserError(
                f"{name}={getattr(args, name)} needs rows with prompts and completions or with conversations; "
                f"{_name(corpus.origin)} holds text"
            )
    return corpus


def _split(
    source: Source,
    args: DataArguments,
    key: str,
    origin: dict[str, Any],
    text_bytes: int | None,
    place: Literal["first", "last"] | None = None,
) -> Corpus:
    """A corpus with `validation_split_percentage` of the source held out for validation."""
    split = HeldOut(source, origin, args.validation_split_percentage / 100, place)
    return Corpus(
        key=f"{key}:{split.share}:{place or f'seed {SPLIT_SEED}'}",
        origin={**origin, "validation_split_percentage": args.validation_split_percentage},
        train=SplitDocuments(split, is_validation=False),
        validation=SplitDocuments(split, is_validation=True),
        text_bytes=text_bytes,
        row_format=source.row_format,
    )


def _list_files(names: list[str]) -> list[Path]:
    """The given files; a folder gives the readable files in it, sorted."""
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_readable(file)]
            if not files:
                suffixes = ", ".join(sorted(READABLE_SUFFIXES - {""}))
                raise UserError(f"{path}: this folder has no readable file ({suffixes}; text also as .gz and .zst)")
            paths += files
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return paths


def _name(origin: dict[str, Any]) -> str:
    """The name under which the user gave the text."""
    files = ", ".join(record["path"] for record in origin.get("train_file", []))
    return files or str(origin.get("dataset_name") or origin.get("corpus"))


def _format_suffix(path: Path) -> str:
    """The suffix that decides how a file is read: `.jsonl` for `a.jsonl.gz`."""
    return (Path(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix).lower()


def _is_readable(path: Path) -> bool:
    return not path.name.startswith(".") and _format_suffix(path) in READABLE_SUFFIXES


def _open_file(path: Path, columns: Columns, sha256: str) -> Source:
    suffix = _format_suffix(path)
    if suffix in JSON_SUFFIXES:
        return JsonLines(path, columns)
    if suffix == ".parquet":
        return parquet_rows(path, columns, sha256)
    if suffix == ".arrow":
        return arrow_rows(path, columns)
    return TextFile(path)


@dataclass(frozen=True)
class FileSet:
    """The documents of one or more files, a hash of their content, and a record of each file for the manifest.

    `text_bytes` is the amount of text, None if unknown.
    """

    source: Source
    key: str
    records: list[dict[str, Any]]
    text_bytes: int | None


def _open_files(names: list[str], columns: Columns) -> FileSet:
    paths = _list_files(names)
    not_empty = [path for path in paths if path.stat().st_size > 0]
    if not not_empty:
        raise UserError(f"{paths[0]}: the file is empty")
    sources: list[Source] = []
    records: list[dict[str, Any]] = []
    is_size_known = True
    for path in not_empty:
        sha256 = file_sha256(path)
        sources.append(_open_file(path, columns, sha256))
        records.append({"path": str(path), "bytes": path.stat().st_size, "sha256": sha256})
        is_size_known = is_size_known and path.suffix not in COMPRESSED_SUFFIXES and path.suffix != ".parquet"
    content = [(_format_suffix(Path(record["path"])), record["sha256"]) for record in records]
    key = hashlib.sha256(repr((columns.text, content)).encode()).hexdigest()
    text_bytes = sum(record["bytes"] for record in records) if is_size_known else None
    holds_examples = [source.row_format is not None for source in sources]
    if len(set(holds_examples)) > 1:
        text_file, example_file = (records[holds_examples.index(kind)]["path"] for kind in (False, True))
        raise UserError(
            f"{example_file} holds prompts and completions or conversations, {text_file} plain text; prepare them "
            "separately"
        )
    return FileSet(sources[0] if len(sources) == 1 else Chain(sources), key, records, text_bytes)


def _files_corpus(train_file: list[str], args: DataArguments, columns: Columns) -> Corpus:
    train = _open_files(train_file, columns)
    origin: dict[str, Any] = {"train_file": train.records}
    if not args.validation_file:
        return _split(train.source, args, train.key, origin, train.text_bytes)
    validation = _open_files(args.validation_file, columns)
    _check_same_kind(train.source, validation.source, "train_file and validation_file")
    text_bytes = None
    if train.text_bytes is not None and validation.text_bytes is not None:
        text_bytes = train.text_bytes + validation.text_bytes
    return Corpus(
        key=f"{train.key}:{validation.key}",
        origin={**origin, "validation_file": validation.records},
        train=AllDocuments(train.source),
        validation=AllDocuments(validation.source),
        text_bytes=text_bytes,
        row_format=train.source.row_format,
    )


def _check_same_kind(train: Source, validation: Source, names: str) -> None:
    if (validation.row_format is None) != (train.row_format is None):
        raise UserError(f"{names}: only one of them holds prompts and completions or conversations")


def _dataset_corpus(args: DataArguments, columns: Columns) -> Corpus:
    if args.corpus:
        loaded = hub_datasets.load_named(args.corpus, args.dataset_revision, args.streaming)
        named = hub_datasets.CORPORA[args.corpus]
        name, config = named.dataset, named.config
        text_bytes: int | None = int(named.text_gb * 1e9)
    else:
        assert args.dataset_name
        name, config = args.dataset_name, args.dataset_config_name
        loaded = hub_datasets.load(name, config, args.dataset_revision, args.streaming)
        text_bytes = loaded.text_bytes
    if args.dataset_split not in loaded.splits:
        splits = ", ".join(loaded.splits)
        raise UserError(
            f"dataset_name={name}: no split {args.dataset_split!r} (its splits: {splits}); --dataset_split"
        )
    origin = {
        "dataset_name": name,
        "dataset_config_name": config,
        "dataset_split": args.dataset_split,
        "dataset_revision": loaded.revision,
    }
    train = hub_datasets.split_source(loaded, args.dataset_split, columns, name)
    key = f"{loaded.key}:{args.dataset_split}:{args.text_column}"
    validation_split = next(
        (split for split in VALIDATION_SPLIT_NAMES if split in loaded.splits and split != args.dataset_split), None
    )
    if validation_split is None:
        return _split(train, args, key, origin, text_bytes, place="first" if args.streaming else None)
    validation = hub_datasets.split_source(loaded, validation_split, columns, name)
    _check_same_kind(train, validation, f"{name}, splits {args.dataset_split} and {validation_split}")
    return Corpus(
        key=f"{key}:{validation_split}",
        origin={**origin, "validation_split": validation_split},
        train=AllDocuments(train),
        validation=AllDocuments(validation),
        text_bytes=text_bytes,
        row_format=train.row_format,
    )
