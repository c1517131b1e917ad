"""Read documents from text, JSON lines, Parquet and Arrow files.

A document arrives as one or more (text, ends) pairs, so that a text file of any size needs little memory.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from minigpt.data.chat import Example, example_of, is_example
from minigpt.utils.errors import UserError

READ_BYTES = 1 << 22

ROWS = 256  # rows of a table in memory at a time

Document = str | Example

Pieces = Iterator[tuple[Document, bool]]  # an example is always in one piece


class Source(Protocol):
    """Documents that can be counted, and read from any one on."""

    def count(self) -> int: ...
    def pieces(self, start: int, stop: int) -> Pieces: ...


@dataclass
class Listed:
    """Documents that are made by one call and fit in memory."""

    make: Callable[[], list[str]]

    @cached_property
    def _documents(self) -> list[str]:
        return self.make()

    def count(self) -> int:
        return len(self._documents)

    def pieces(self, start: int, stop: int) -> Pieces:
        return ((text, True) for text in self._documents[start:stop])


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 text file: one document."""

    path: Path

    def count(self) -> int:
        return 1

    def pieces(self, start: int, stop: int) -> Pieces:
        if start < min(stop, 1):
            for text in decoded(self.path):
                yield text, False
            yield "", True


@dataclass
class JsonLines:
    """A file with one JSON object a line: one document a line, the text in one field, or an example in several."""

    path: Path
    column: str

    @cached_property
    def examples(self) -> bool:
        """Whether the rows are examples: the first one has no text, but prompt and completion, or messages."""
        first = next((self._record(number, line) for number, line in self._lines()), {})
        return self.column not in first and is_example(first)

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in self._lines())

    def count(self) -> int:
        return self._count

    def pieces(self, start: int, stop: int) -> Pieces:
        for number, line in islice(self._lines(), start, stop):
            record, where = self._record(number, line), f"{self.path} line {number}"
            yield (example_of(record, where) if self.examples else self._text(record, where)), True

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Line numbers, from 1, and lines; blank ones are left out."""
        rest, number = "", 0
        for text in decoded(self.path):
            *lines, rest = (rest + text).split("\n")  # not splitlines: U+2028 may stand inside a JSON string
            for line in lines:
                number += 1
                if line and not line.isspace():
                    yield number, line
        if rest.strip():
            yield number + 1, rest

    def _record(self, number: int, line: str) -> dict[str, Any]:
        where = f"{self.path} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not a JSON object: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object but {type(record).__name__}")
        return record

    def _text(self, record: dict[str, Any], where: str) -> str:
        if self.column not in record:
            known = ", ".join(record) or "none"
            raise UserError(f"{where}: no field {self.column!r} (its fields: {known}); name one with --text_column")
        return checked_text(record[self.column], where, self.column)


@dataclass
class ParquetFile:
    """A Parquet file, the text in one column: one document a row. Row groups before the first row are not read."""

    path: Path
    column: str

    @cached_property
    def _file(self) -> Any:
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(self.path)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: not a Parquet file: {one_line(error)}") from error
        check_column(self.column, file.schema_arrow.names, str(self.path))
        return file

    def count(self) -> int:
        return self._file.metadata.num_rows

    def pieces(self, start: int, stop: int) -> Pieces:
        metadata, row = self._file.metadata, 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if row < stop and row + rows > start:
                yield from self._group(group, row, start, stop)
            row += rows

    def _group(self, group: int, row: int, start: int, stop: int) -> Pieces:
        try:
            for batch in self._file.iter_batches(batch_size=ROWS, row_groups=[group], columns=[self.column]):
                yield from column_texts(batch.column(0), row, start, stop, str(self.path), self.column)
                row += batch.num_rows
        except OSError as error:
            raise UserError(f"{self.path}: damaged: {one_line(error)}") from error


@dataclass
class ArrowFile:
    """An Arrow file or stream, as `datasets` writes them, the text in one column: one document a row."""

    path: Path
    column: str

    def _batches(self) -> Iterator[Any]:
        import pyarrow

        try:
            with pyarrow.OSFile(str(self.path)) as file:
                try:
                    reader = pyarrow.ipc.open_stream(file)
                except pyarrow.ArrowInvalid:
                    file.seek(0)
                    reader = pyarrow.ipc.open_file(file)
                check_column(self.column, reader.schema.names, str(self.path))
                if isinstance(reader, pyarrow.RecordBatchFileReader):
                    yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
                else:
                    yield from reader
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(f"{self.path}: not an Arrow file, or damaged: {one_line(error)}") from error

    @cached_property
    def _count(self) -> int:
        return sum(batch.num_rows for batch in self._batches())

    def count(self) -> int:
        return self._count

    def pieces(self, start: int, stop: int) -> Pieces:
        row = 0
        for batch in self._batches():
            if row >= stop:
                return
            if row + batch.num_rows > start:
                yield from column_texts(batch.column(self.column), row, start, stop, str(self.path), self.column)
            row += batch.num_rows


class Chain:
    """Several sources, one after the other."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources

    def count(self) -> int:
        return sum(source.count() for source in self.sources)

    def pieces(self, start: int, stop: int) -> Pieces:
        for source in self.sources:
            count = source.count()
            if start < count and stop > 0:
                yield from source.pieces(max(0, start), min(stop, count))
            start, stop = start - count, stop - count


def column_texts(values: Any, row: int, start: int, stop: int, name: str, column: str) -> Pieces:
    """The texts among rows [start, stop) of an Arrow array that begins at `row`."""
    first, last = max(0, start - row), min(len(values), stop - row)
    for index in range(first, last):
        where = f"{name} row {row + index}"
        try:
            value = values[index].as_py()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: column {column!r} is not UTF-8") from error
        yield checked_text(value, where, column), True


def check_column(column: str, known: list[str], name: str) -> None:
    """Raises UserError if a table has no such column."""
    if column not in known:
        raise UserError(f"{name}: no column {column!r} (its columns: {', '.join(known)}); name one with --text_column")


def checked_text(value: Any, where: str, column: str) -> str:
    """`value`, if it is text."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} is {type(value).__name__}, not text")
    return value


def decoded(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in blocks; a byte-order mark is left out, line ends stay as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open_binary(path) as file:
        while True:
            try:
                block = file.read(READ_BYTES)
            except (EOFError, OSError, zlib.error) as error:
                raise UserError(f"{path}: damaged after {offset} bytes of text: {one_line(error)}") from error
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                raise UserError(f"{path}: not UTF-8 at byte {at}; convert it, for example with iconv") from error
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(block)
            if not block:
                return


def open_binary(path: Path) -> BinaryIO:
    """A file to read, decompressed if its name ends in .gz or .zst."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return path.open("rb")


def one_line(error: Exception) -> str:
    """What an error of a library says, short enough to be part of ours."""
    return " ".join(str(error).split())[:300]
