"""Read documents from memory, text files and JSON lines. Tables are read by `minigpt.data.tables`.

Every reader is a `Source`: it counts its documents, and yields those in a range as `Pieces`. A document may arrive in
several pieces, so that a text file of any size needs little memory.
"""

import codecs
import gzip
import json
import sys
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from minigpt.data.chat import Example
from minigpt.data.rows import MESSAGES, Columns, RowFormat
from minigpt.utils.errors import UserError

if TYPE_CHECKING:
    pass

COMPRESSED_SUFFIXES = {".gz", ".zst"}
READ_BYTES = 1 << 22

Document = str | Example
Pieces = Iterator[tuple[Document, bool]]  # pieces of documents, each with whether the document ends; no Example is cut


class Source(ABC):
    """Documents that can be counted, measured, and read from any position."""

    @property
    def row_format(self) -> RowFormat | None:
        """The format of the rows if the documents are examples; None if they are texts."""
        return None

    @abstractmethod
    def count(self) -> int:
        """The number of documents. This may read the whole source."""

    @abstractmethod
    def pieces(self, start: int, stop: int, chosen: np.ndarray | None = None) -> Pieces:
        """The documents [start, stop), or fewer if the source has fewer.

        With `chosen`, bool [documents], only those of them that it marks.
        """

    def sizes(self) -> np.ndarray:
        """The size of every document in bytes, that of an example in characters: int64 [documents].

        This may read the whole source; 8 bytes per document are in memory.
        """
        sizes, size = array("q"), 0
        for text, ends in self.pieces(0, sys.maxsize):
            # half a surrogate pair is refused when the text is encoded
            size += len(text.encode(errors="surrogatepass")) if isinstance(text, str) else len(text)
            if ends:
                sizes.append(size)
                size = 0
        return np.array(sizes, dtype=np.int64)


@dataclass
class InMemoryDocuments(Source):
    """Texts that one call creates and that fit in memory."""

    create: Callable[[], list[str]]

    @cached_property
    def _documents(self) -> list[str]:
        return self.create()

    def count(self) -> int:
        return len(self._documents)

    def pieces(self, start: int, stop: int, chosen: np.ndarray | None = None) -> Pieces:
        for index, text in enumerate(self._documents[start:stop], start):
            if chosen is None or chosen[index]:
                yield text, True


@dataclass
class InMemoryRows(Source):
    """Rows of `messages` that one call creates and that fit in memory. Error messages start with `name`."""

    create: Callable[[], list[dict[str, Any]]]
    name: str

    @property
    def row_format(self) -> RowFormat:
        return MESSAGES

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return self.create()

    def count(self) -> int:
        return len(self._rows)

    def pieces(self, start: int, stop: int, chosen: np.ndarray | None = None) -> Pieces:
        for index, row in enumerate(self._rows[start:stop], start):
            if chosen is None or chosen[index]:
                yield MESSAGES.parse(row, f"{self.name} row {index}"), True


@dataclass(frozen=True)
class TextFile(Source):
    """A UTF-8 text file, plain or compressed: one document."""

    path: Path

    def count(self) -> int:
        return 1

    def sizes(self) -> np.ndarray:
        return super().sizes() if self.path.suffix in COMPRESSED_SUFFIXES else np.array([self.path.stat().st_size])

    def pieces(self, start: int, stop: int, chosen: np.ndarray | None = None) -> Pieces:
        if start < min(stop, 1) and (chosen is None or chosen[0]):
            for text in read_text(self.path):
                yield text, False
            yield "", True


@dataclass
class JsonLines(Source):
    """A file with one JSON object per line, plain or compressed: one document per line.

    The fields of the first line decide whether the lines hold text or examples. Blank lines are skipped.
    """

    path: Path
    columns: Columns

    @cached_property
    def row_format(self) -> RowFormat | None:
        first_record = next((self._record(number, line) for number, line in self._lines()), {})
        return self.columns.format_of(first_record)

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in self._lines())

    def count(self) -> int:
        return self._count

    def pieces(self, start: int, stop: int, chosen: np.ndarray | None = None) -> Pieces:
        for index, (number, line) in islice(enumerate(self._lines()), start, stop):
            if chosen is None or chosen[index]:
                record, where = self._record(number, line), self._where(number)
                form = self.row_format and (self.columns.format_of(record) or self.row_format)
                yield (form.parse(record, where) if form else self._text(record, where)), True

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Pairs of line number, from 1, and line."""
        rest, number = "", 0
        for text in read_text(self.path):
            # not splitlines, which would also split at a U+2028 inside a JSON string
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                number += 1
                if line and not line.isspace():
                    yield number, line
        if rest.strip():
            yield number + 1, rest

    def _where(self, number: int) -> str:
        return f"{self.path} line {number}"

    def _record(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._where(number)}: not a JSON object: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{self._where(number)}: not a JSON object but {type(record).__name__}")
        if "\\u" in line:
            try:
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:  # \\ud800 without the \\udc00 that belongs to it
                raise UserError(f"{self._where(number)}: half of a surrogate pair, which is no character") from error
        return record

    def _text(self, record: dict[str, Any], where: str) -> str:
        column = self.columns.text
        if column not in record:
            fields = ", ".join(record) or "none"
            raise UserError(f"{where}: no field {column!r} (its fields: {fields}); name one with --text_column")
        return require_text(record[column], where, column)


class Chain(Source):
    """Several sources, one after the other."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources

    @property
    def row_format(self) -> RowFormat | None:
        return self.sources[0].row_format

    def count(self) -> int:
        return sum(source.count() for source in self.sources)

    def sizes(self) -> np.ndarray:
        return np.concatenate([source.sizes() for source in self.sources])

    def pieces(self, start: int, stop: int, chosen: np.ndarray | None = None) -> Pieces:
        for source in self.sources:
            count = source.count()
            if start < count and stop > 0:
                yield from source.pieces(max(0, start), min(stop, count), chosen)
            start, stop = start - count, stop - count
            chosen = None if chosen is None else chosen[count:]


def require_library(name: str, needed_by: str) -> None:
    """Raises UserError if a library that is only imported when it is used is not installed."""
    try:
        import_module(name)
    except ImportError as error:
        raise UserError(
            f"{needed_by}: reading it needs {name}, which cannot be imported ({one_line(error)}); pip install {name}"
        ) from error


def require_text(value: Any, where: str, column: str) -> str:
    """`value`, which is that of `column` at `where`. Raises UserError if it is not a string."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} is {type(value).__name__}, not text")
    return value


def read_text(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in blocks. A byte-order mark is dropped; line ends stay as they are.

    Raises UserError if the file is damaged or not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open_binary(path) as file:
        while True:
            try:
                block = file.read(READ_BYTES)
            except (EOFError, OSError, zlib.error) as error:
                raise UserError(f"{path}: damaged after {offset} bytes of text: {one_line(error)}") from error
            undecoded_bytes = len(decoder.getstate()[0])  # the start of a character, from the block before
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                position = offset - undecoded_bytes + error.start
                raise UserError(f"{path}: not UTF-8 at byte {position}; convert it, for example with iconv") from error
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(block)
            if not block:
                return


def open_binary(path: Path) -> BinaryIO:
    """A file to read, decompressed if its name ends in .gz or .zst."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        require_library("pyarrow", str(path))
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return path.open("rb")


def one_line(error: BaseException) -> str:
    """The message of a library's error in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
