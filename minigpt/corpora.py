"""Which documents are there? Every source of text becomes documents, and a split into training and validation.

A document arrives as one or more (text, ends) pairs, so that a text file of any size needs little memory.

Held out for validation, unless the user or the data set says otherwise: the last `validation_split_percentage` of the
documents (one at least); when there is only one document, the last part of its characters, exactly as nanoGPT does.
"""

import codecs
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from minigpt import python_docs
from minigpt.arguments import DataArguments

READ_BYTES = 1 << 22
TEXT_SUFFIXES = {".txt", ".md", ".text", ".rst", ""}
JSON_SUFFIXES = {".jsonl", ".json", ".ndjson"}

Pieces = Iterator[tuple[str, bool]]


class Source(Protocol):
    """Documents that can be counted, and read from any one on."""

    def __len__(self) -> int: ...
    def pieces(self, start: int, stop: int) -> Pieces: ...


@dataclass(frozen=True)
class Corpus:
    """The documents of both splits. `key` changes with the content; `origin` tells the manifest where it is from."""

    key: str
    origin: dict[str, Any]
    train: Callable[[], Pieces]
    validation: Callable[[], Pieces]


def open_corpus(args: DataArguments) -> Corpus:
    """The text that `args` names. Raises ValueError, here or while it is read, that says what is wrong and where."""
    if args.train_file:
        return _files_corpus(args)
    if args.dataset_name:
        return _dataset_corpus(args)
    if args.corpus == "python-docs":
        key = f"python-docs:{python_docs.RECIPE}:{sys.version}:{args.validation_split_percentage}"
        origin = {"corpus": args.corpus, "python": sys.version.split()[0]}
        return _split(Listed(python_docs.documents), args, key, origin)
    raise ValueError("there is no text to prepare: give --train_file, --dataset_name or --corpus")


def _split(source: Source, args: DataArguments, key: str, origin: dict[str, Any]) -> Corpus:
    """Hold out the end of `source`. Documents are only counted when one is asked for."""
    share = args.validation_split_percentage / 100

    def bounds() -> int:
        count = len(source)
        if count == 0:
            raise ValueError(f"{_name(origin)}: no documents in it")
        return count - min(count - 1, max(1, round(count * share)))

    def train() -> Pieces:
        held_out_from = bounds()
        if len(source) == 1:
            return _characters(source, 0, int(_count_characters(source) * (1 - share)))
        return source.pieces(0, held_out_from)

    def validation() -> Pieces:
        held_out_from = bounds()
        if len(source) == 1:
            return _characters(source, int(_count_characters(source) * (1 - share)), None)
        return source.pieces(held_out_from, len(source))

    return Corpus(key, {**origin, "validation_split_percentage": args.validation_split_percentage}, train, validation)


def _count_characters(source: Source) -> int:
    return sum(len(text) for text, _ in source.pieces(0, 1))


def _characters(source: Source, start: int, stop: int | None) -> Pieces:
    """Characters [start, stop) of a lone document, as a document."""
    position = 0
    for text, _ in source.pieces(0, 1):
        first, last = max(0, start - position), len(text) if stop is None else stop - position
        position += len(text)
        if 0 <= first < last:
            yield text[first:last], False
    yield "", True


def _name(origin: dict[str, Any]) -> str:
    return str(next(iter(origin.values())))


@dataclass
class Listed:
    """Documents that are made by one call and fit in memory."""

    make: Callable[[], list[str]]

    @cached_property
    def _documents(self) -> list[str]:
        return self.make()

    def __len__(self) -> int:
        return len(self._documents)

    def pieces(self, start: int, stop: int) -> Pieces:
        return ((text, True) for text in self._documents[start:stop])


# ---- files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 text file: one document."""

    path: Path

    def __len__(self) -> int:
        return 1

    def pieces(self, start: int, stop: int) -> Pieces:
        if start < stop:
            for text in _decoded(self.path):
                yield text, False
            yield "", True


@dataclass
class JsonLines:
    """A file with one JSON object a line, the text in one field: one document a line."""

    path: Path
    column: str

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in self._lines())

    def __len__(self) -> int:
        return self._count

    def pieces(self, start: int, stop: int) -> Pieces:
        for number, line in islice(self._lines(), start, stop):
            yield self._text(number, line), True

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Line numbers, from 1, and lines; blank ones are left out."""
        rest, number = "", 0
        for text in _decoded(self.path):
            *lines, rest = (rest + text).split("\n")  # not splitlines: U+2028 may stand inside a JSON string
            for line in lines:
                number += 1
                if line.strip():
                    yield number, line
        if rest.strip():
            yield number + 1, rest

    def _text(self, number: int, line: str) -> str:
        where = f"{self.path} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not a JSON object: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: not a JSON object but {type(record).__name__}")
        if self.column not in record:
            known = ", ".join(record) or "none"
            raise ValueError(f"{where}: no field {self.column!r} (its fields: {known}); name one with --text_column")
        if not isinstance(record[self.column], str):
            raise ValueError(f"{where}: field {self.column!r} is {type(record[self.column]).__name__}, not text")
        return record[self.column]


class Chain:
    """Several sources, one after the other."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def pieces(self, start: int, stop: int) -> Pieces:
        for source in self.sources:
            if start < len(source) and stop > 0:
                yield from source.pieces(max(0, start), min(stop, len(source)))
            start, stop = start - len(source), stop - len(source)


def _decoded(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in blocks; a byte-order mark is left out, line ends stay as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with path.open("rb") as file:
        while True:
            block = file.read(READ_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                raise ValueError(f"{path}: not UTF-8 at byte {at}; convert it, for example with iconv") from error
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(block)
            if not block:
                return


def list_files(names: list[str]) -> list[Path]:
    """The files that `names` stand for: files as given, folders as their text and JSONL files in sorted order."""
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            known = TEXT_SUFFIXES | JSON_SUFFIXES
            inside = [
                file
                for file in sorted(path.rglob("*"))
                if file.is_file() and file.suffix.lower() in known and not file.name.startswith(".")
            ]
            if not inside:
                raise ValueError(f"{path}: no text or JSONL file in this folder ({', '.join(sorted(known - {''}))})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder")
    return found


def _file_source(names: list[str], column: str) -> tuple[Source, str, list[str]]:
    paths = list_files(names)
    empty = [path for path in paths if path.stat().st_size == 0]
    if len(empty) == len(paths):
        raise ValueError(f"{empty[0]}: the file is empty")
    paths = [path for path in paths if path not in empty]
    sources: list[Source] = [
        JsonLines(path, column) if path.suffix.lower() in JSON_SUFFIXES else TextFile(path) for path in paths
    ]
    digest = hashlib.sha256(column.encode())
    for path in paths:
        digest.update(path.suffix.encode())
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    return (sources[0] if len(sources) == 1 else Chain(sources)), digest.hexdigest(), [str(path) for path in paths]


def _files_corpus(args: DataArguments) -> Corpus:
    assert args.train_file
    source, key, names = _file_source(args.train_file, args.text_column)
    origin = {"train_file": names[0] if len(names) == 1 else names}
    if not args.validation_file:
        return _split(source, args, f"{key}:{args.validation_split_percentage}", origin)
    held_out, held_out_key, held_out_names = _file_source(args.validation_file, args.text_column)
    return Corpus(
        f"{key}:{held_out_key}",
        {**origin, "validation_file": held_out_names},
        lambda: source.pieces(0, len(source)),
        lambda: held_out.pieces(0, len(held_out)),
    )


# ---- Hugging Face data sets -----------------------------------------------------------------------------------------


class DatasetSource:
    """One split of a Hugging Face data set, memory-mapped by `datasets`: one document a row."""

    def __init__(self, dataset: Any, column: str, name: str) -> None:
        if column not in dataset.column_names:
            known = ", ".join(dataset.column_names)
            raise ValueError(f"{name}: no column {column!r} (its columns: {known}); name one with --text_column")
        self.dataset, self.column, self.name = dataset.select_columns([column]), column, name

    def __len__(self) -> int:
        return len(self.dataset)

    def pieces(self, start: int, stop: int) -> Pieces:
        row = start
        for batch in self.dataset.select(range(start, stop)).iter(batch_size=256):
            for text in batch[self.column]:
                if not isinstance(text, str):
                    raise ValueError(
                        f"{self.name} row {row}: column {self.column!r} is {type(text).__name__}, not text"
                    )
                yield text, True
                row += 1


def _load_splits(name: str, config: str | None) -> dict[str, Any]:
    import datasets

    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        elif folder.exists() or not name.startswith((".", "/", "~")):
            loaded = datasets.load_dataset(str(folder) if folder.exists() else name, config)
        else:
            raise FileNotFoundError("no such folder")
    except Exception as error:  # many kinds: no network, no such name, a loading script, damaged files
        raise ValueError(f"dataset_name={name}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _dataset_corpus(args: DataArguments) -> Corpus:
    assert args.dataset_name
    splits = _load_splits(args.dataset_name, args.dataset_config_name)
    if "train" not in splits:
        known = ", ".join(splits)
        raise ValueError(f"dataset_name={args.dataset_name}: has no split 'train' (its splits: {known})")
    origin = {"dataset_name": args.dataset_name, "dataset_config_name": args.dataset_config_name}
    train = DatasetSource(splits["train"], args.text_column, f"{args.dataset_name} split 'train'")
    key = f"{train.dataset._fingerprint}:{args.text_column}"
    if "validation" not in splits:
        return _split(train, args, f"{key}:{args.validation_split_percentage}", origin)
    held_out = DatasetSource(splits["validation"], args.text_column, f"{args.dataset_name} split 'validation'")
    return Corpus(
        f"{key}:{held_out.dataset._fingerprint}",
        origin,
        lambda: train.pieces(0, len(train)),
        lambda: held_out.pieces(0, len(held_out)),
    )
