"""Open a corpus: every source of text becomes training and validation documents.

Held out for validation, unless the user or the data set says otherwise: the last `validation_split_percentage` of the
documents (one at least); when there is only one document, the last part of its characters, exactly as nanoGPT does.
Of a stream, whose end is far away, the first documents are held out instead.
"""

import hashlib
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minigpt.config.arguments import DataArguments
from minigpt.data import hub_datasets, python_docs
from minigpt.data.readers import ArrowFile, Chain, JsonLines, Listed, ParquetFile, Pieces, Source, TextFile
from minigpt.utils.errors import UserError
from minigpt.utils.files import file_sha256

READERS = {
    ".jsonl": JsonLines,
    ".json": JsonLines,
    ".ndjson": JsonLines,
    ".parquet": ParquetFile,
    ".arrow": ArrowFile,
}

TEXT_SUFFIXES = {".txt", ".md", ".text", ".rst", ""}

COMPRESSED = {".gz", ".zst"}

SPLIT_NAMES = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Corpus:
    """The documents of both splits.

    `key` changes with the content, `origin` tells the manifest where it is from, and `text_bytes` is about how much
    text there is (None if nobody knows). `examples` tells whether the documents are prompts with completions.
    """

    key: str
    origin: dict[str, Any]
    train: "Documents"
    validation: "Documents"
    text_bytes: int | None
    examples: bool = False


class Documents(ABC):
    """Some of the documents of a source, in order."""

    @abstractmethod
    def pieces(self, start: int = 0) -> Pieces:
        """The documents from number `start` on, as (text, ends) pairs."""


@dataclass
class All(Documents):
    """Every document."""

    source: Source

    def pieces(self, start: int = 0) -> Pieces:
        return self.source.pieces(start, sys.maxsize)


@dataclass
class Split(Documents):
    """One side of a source that is cut in two. Documents are only counted when one is asked for."""

    source: Source
    origin: dict[str, Any]
    held_out: bool
    share: float
    at_the_end: bool

    @cached_property
    def _bounds(self) -> tuple[int, int]:
        count = self.source.count()
        if count == 0:
            raise UserError(f"no documents in {_name(self.origin)}")
        held_out = min(count - 1, max(1, round(count * self.share)))
        if not self.at_the_end:
            return (0, held_out) if self.held_out else (held_out, count)
        return (count - held_out, count) if self.held_out else (0, count - held_out)

    def pieces(self, start: int = 0) -> Pieces:
        first, last = self._bounds
        if self.source.count() == 1:
            return self._characters() if start == 0 else iter(())
        return self.source.pieces(first + start, last)

    def _characters(self) -> Pieces:
        """This side of a lone document."""
        count = sum(len(text) for text, _ in self.source.pieces(0, 1))
        cut = int(count * (1 - self.share))
        start, stop = (cut, count) if self.held_out else (0, cut)
        position = 0
        for text, _ in self.source.pieces(0, 1):
            if not isinstance(text, str):
                raise UserError(f"{text.where}: the only example; give more, or a --validation_file")
            part = text[max(0, start - position) : max(0, stop - position)]
            position += len(text)
            if part:
                yield part, False
        yield "", True


def open_corpus(args: DataArguments) -> Corpus:
    """The text that `args` names. Raises UserError, here or while it is read, that says what is wrong and where."""
    if args.train_file:
        corpus = _files_corpus(args)
        if corpus.examples or args.completion_only_loss is None:
            return corpus
    if args.completion_only_loss is not None:
        raise UserError(
            "completion_only_loss goes with JSON lines that hold 'prompt' and 'completion', or 'messages', in "
            f"train_file; there are none in {', '.join(args.train_file or [])}"
        )
    if args.corpus == "python-docs":
        key = f"python-docs:{python_docs.RECIPE}:{sys.version}"
        origin = {"corpus": args.corpus, "python": sys.version.split()[0]}
        return _split(Listed(python_docs.documents), args, key, origin, None)
    if args.dataset_name or args.corpus:
        return _dataset_corpus(args)
    raise UserError("there is no text to prepare: give --train_file, --dataset_name or --corpus")


def _split(
    source: Source,
    args: DataArguments,
    key: str,
    origin: dict[str, Any],
    text_bytes: int | None,
    at_the_end: bool = True,
    examples: bool = False,
) -> Corpus:
    share = args.validation_split_percentage / 100
    return Corpus(
        f"{key}:{share}",
        {**origin, "validation_split_percentage": args.validation_split_percentage},
        Split(source, origin, False, share, at_the_end),
        Split(source, origin, True, share, at_the_end),
        text_bytes,
        examples,
    )


def list_files(names: list[str]) -> list[Path]:
    """The files that `names` stand for: files as given, folders as the files in them that can be read, sorted."""
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_readable(file)]
            if not inside:
                known = ", ".join(sorted((TEXT_SUFFIXES | set(READERS)) - {""}))
                raise UserError(f"{path}: no file in this folder that can be read ({known}; .gz and .zst of them)")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return found


def _name(origin: dict[str, Any]) -> str:
    """What the user called the text."""
    files = ", ".join(record["path"] for record in origin.get("train_file", []))
    return files or str(origin.get("dataset_name") or origin.get("corpus"))


def _kind(path: Path) -> str:
    """The suffix that tells how to read a file."""
    return (Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix).lower()


def _is_readable(path: Path) -> bool:
    return not path.name.startswith(".") and (_kind(path) in READERS or _kind(path) in TEXT_SUFFIXES)


@dataclass(frozen=True)
class Files:
    """The documents of files, a hash of their content, what the manifest says of them, and the bytes of text."""

    source: Source
    key: str
    records: list[dict[str, Any]]
    text_bytes: int | None
    examples: bool


def _open_files(names: list[str], column: str) -> Files:
    paths = list_files(names)
    empty = [path for path in paths if path.stat().st_size == 0]
    if len(empty) == len(paths):
        raise UserError(f"{empty[0]}: the file is empty")
    sources: list[Source] = []
    records: list[dict[str, Any]] = []
    known = True
    for path in paths:
        if path in empty:
            continue
        reader: Any = READERS.get(_kind(path))
        sources.append(reader(path, column) if reader else TextFile(path))
        records.append({"path": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path)})
        known = known and path.suffix not in COMPRESSED and path.suffix != ".parquet"
    content = [(_kind(Path(record["path"])), record["sha256"]) for record in records]
    key = hashlib.sha256(repr((column, content)).encode()).hexdigest()
    size = sum(record["bytes"] for record in records) if known else None
    kinds = [isinstance(source, JsonLines) and source.examples for source in sources]
    if len(set(kinds)) > 1:
        texts, examples = (records[kinds.index(kind)]["path"] for kind in (False, True))
        raise UserError(f"{examples} holds prompts and completions, {texts} plain text; prepare them apart")
    return Files(sources[0] if len(sources) == 1 else Chain(sources), key, records, size, kinds[0])


def _files_corpus(args: DataArguments) -> Corpus:
    assert args.train_file
    files = _open_files(args.train_file, args.text_column)
    origin: dict[str, Any] = {"train_file": files.records}
    if not args.validation_file:
        return _split(files.source, args, files.key, origin, files.text_bytes, examples=files.examples)
    held_out = _open_files(args.validation_file, args.text_column)
    if held_out.examples != files.examples:
        raise UserError("train_file and validation_file: only one of them holds prompts and completions")
    known = files.text_bytes is not None and held_out.text_bytes is not None
    size = (files.text_bytes or 0) + (held_out.text_bytes or 0) if known else None
    origin["validation_file"] = held_out.records
    key = f"{files.key}:{held_out.key}"
    return Corpus(key, origin, All(files.source), All(held_out.source), size, files.examples)


def _dataset_corpus(args: DataArguments) -> Corpus:
    if args.corpus:
        loaded = hub_datasets.load_named(args.corpus, args.dataset_revision, args.streaming)
        named = hub_datasets.CORPORA[args.corpus]
        name, config = named.dataset, named.config
        size: int | None = int(named.text_gb * 1e9)
    else:
        assert args.dataset_name
        name, config = args.dataset_name, args.dataset_config_name
        loaded = hub_datasets.load(name, config, args.dataset_revision, args.streaming)
        size = loaded.text_bytes
    if args.dataset_split not in loaded.splits:
        known = ", ".join(loaded.splits)
        raise UserError(f"dataset_name={name}: no split {args.dataset_split!r} (its splits: {known}); --dataset_split")
    origin = {
        "dataset_name": name,
        "dataset_config_name": config,
        "dataset_split": args.dataset_split,
        "dataset_revision": loaded.revision,
    }
    train = hub_datasets.source(loaded, args.dataset_split, args.text_column, name)
    key = f"{loaded.key}:{args.dataset_split}:{args.text_column}"
    own = next((split for split in SPLIT_NAMES if split in loaded.splits and split != args.dataset_split), None)
    if own is None:
        return _split(train, args, key, origin, size, at_the_end=not args.streaming)
    held_out = hub_datasets.source(loaded, own, args.text_column, name)
    return Corpus(f"{key}:{own}", {**origin, "validation_split": own}, All(train), All(held_out), size)
