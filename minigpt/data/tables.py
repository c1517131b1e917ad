"""Read documents from tables: Parquet files, Arrow files, and data sets of the `datasets` library."""

import glob
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt.data.readers import Document, Pieces, Source, one_line, require_library, require_text
from minigpt.data.rows import Columns, RowFormat
from minigpt.utils.errors import UserError
from minigpt.utils.formatting import format_bytes

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Table

ROWS_IN_MEMORY = 256  # rows of a data set that are converted to Python objects at a time
ROWS_PER_CONVERSION = 1000  # rows of a Parquet file that are in memory while it is converted
LARGE_PARQUET_BYTES = 100_000_000  # the copy of a larger file is announced: it takes time and space


@dataclass
class DatasetRows(Source):
    """The rows of a memory-mapped `datasets.Dataset`: one document per row.

    `open_dataset` is called when the rows are first needed. `fields` are the columns of the table. `name` is the start
    of error messages.
    """

    open_dataset: Callable[[], "Dataset"]
    columns: Columns
    fields: Sequence[str]
    name: str

    @property
    def row_format(self) -> RowFormat | None:
        return self.columns.format_of(self.fields)

    @cached_property
    def _dataset(self) -> "Dataset":
        return self.open_dataset().select_columns(self.columns.names(self.fields))

    def count(self) -> int:
        return len(self._dataset)

    def sizes(self) -> np.ndarray:
        """The UTF-8 bytes of every text, from the offsets of the column: no text is read. Examples are read."""
        import pyarrow
        import pyarrow.compute

        if self.row_format is not None:
            return super().sizes()
        sizes = np.zeros(self.count(), dtype=np.int64)
        tables = self._dataset.with_format("arrow")
        for first in range(0, len(sizes), ROWS_PER_CONVERSION):
            column = tables[first : first + ROWS_PER_CONVERSION][self.columns.text]
            try:
                lengths = pyarrow.compute.binary_length(column)
            except pyarrow.ArrowNotImplementedError:  # not a column of text, or a dictionary of texts
                return super().sizes()
            sizes[first : first + ROWS_PER_CONVERSION] = lengths.fill_null(0).to_numpy()
        return sizes

    def pieces(self, start: int, stop: int, chosen: np.ndarray | None = None) -> Pieces:
        stop = min(stop, self.count())
        for first in range(start, stop, ROWS_IN_MEMORY):
            block = range(first, min(first + ROWS_IN_MEMORY, stop))
            rows = block if chosen is None else (first + np.flatnonzero(chosen[block.start : block.stop])).tolist()
            records = self._records(rows if len(rows) < len(block) else block)
            for row, record in zip(rows, records, strict=True):
                yield document_of(record, self.columns.text, self.row_format, f"{self.name} row {row}"), True

    def _records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        if not rows:
            return []
        try:
            values = self._dataset[rows]
        except UnicodeDecodeError as error:
            if len(rows) > 1:  # look for the row
                return [record for row in rows for record in self._records([row])]
            names = ", ".join(map(repr, self.columns.names(self.fields)))
            raise UserError(f"{self.name} row {rows[0]}: column {names} is not UTF-8") from error
        return [dict(zip(values, record, strict=True)) for record in zip(*values.values(), strict=True)]


def document_of(record: dict[str, Any], text_column: str, row_format: RowFormat | None, where: str) -> Document:
    """The document in a row: an example if the rows have such a format, else the text."""
    if row_format is not None:
        return row_format.parse(record, where)
    return require_text(record[text_column], where, text_column)


def parquet_rows(path: Path, columns: Columns, sha256: str) -> DatasetRows:
    """The rows of a Parquet file. `datasets` copies the columns into its cache and maps that copy into memory.

    `sha256` is the hash of the file. It is part of the name of the copy, because `datasets` itself only compares the
    path and the modification time.
    """
    require_library("datasets", str(path))
    import pyarrow.parquet

    with _errors_name_the_file(path, "Parquet"):
        fields = pyarrow.parquet.read_schema(path).names
    require_columns(columns, fields, str(path))
    return DatasetRows(lambda: _open_parquet(path, columns.names(fields), sha256), columns, fields, str(path))


def arrow_rows(path: Path, columns: Columns) -> DatasetRows:
    """The rows of an Arrow file, in the stream format (as `datasets` writes it) or the file format, without a copy.

    A file with compressed buffers is decompressed into memory.
    """
    require_library("datasets", str(path))
    fields = _read_arrow(path).schema.names
    require_columns(columns, fields, str(path))
    return DatasetRows(lambda: _open_arrow(path, columns.names(fields)), columns, fields, str(path))


def _open_parquet(path: Path, names: list[str], sha256: str) -> "Dataset":
    import datasets
    import pyarrow
    import pyarrow.parquet

    with _errors_name_the_file(path, "Parquet"), path.open("rb") as file:
        metadata = pyarrow.parquet.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
    if metadata.num_rows == 0:  # from_parquet fails on such a file
        return datasets.Dataset.from_dict({name: [] for name in names})
    if path.stat().st_size > LARGE_PARQUET_BYTES:
        size = format_bytes(path.stat().st_size)
        print(f"{path}: {size}, read through a copy in {datasets.config.HF_DATASETS_CACHE}", file=sys.stderr)
    with _errors_name_the_file(path, "Parquet"), _quiet_datasets():
        return datasets.Dataset.from_parquet(
            glob.escape(str(path.absolute())),  # from_parquet would expand a * or [ in the name of a file
            columns=names,
            # of these columns alone: another column may have a type that `datasets` does not support
            features=datasets.Features.from_arrow_schema(pyarrow.schema([schema.field(name) for name in names])),
            config_name=f"sha256-{sha256[:16]}",
            batch_size=ROWS_PER_CONVERSION,
        )


def _open_arrow(path: Path, names: list[str]) -> "Dataset":
    import datasets

    table = _read_arrow(path)
    with _errors_name_the_file(path, "Arrow"):
        # without a fingerprint `datasets` would hash, and for that copy, the whole table
        return datasets.Dataset(table.select(names).replace_schema_metadata(None), fingerprint=str(path))


def _read_arrow(path: Path) -> "Table":
    """The whole table, mapped into memory."""
    import pyarrow

    with _errors_name_the_file(path, "Arrow"):
        mapped_file = pyarrow.memory_map(str(path))
        try:
            return pyarrow.ipc.open_stream(mapped_file).read_all()
        except pyarrow.ArrowInvalid:
            # the file format, which Dataset.from_file cannot read
            mapped_file.seek(0)
            return pyarrow.ipc.open_file(mapped_file).read_all()


@contextmanager
def _errors_name_the_file(path: Path, file_format: str) -> Iterator[None]:
    """Turn what pyarrow and `datasets` raise for a file that they cannot read into a UserError.

    Errors of the operating system, such as a full disk, stay what they are.
    """
    import datasets
    import pyarrow

    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # `datasets` wraps the original error in its own
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from None
        raise UserError(f"{path}: not a readable {file_format} file: {one_line(cause)}") from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets`, and no log lines about an error that it also raises."""
    import datasets

    had_progress_bars = datasets.is_progress_bar_enabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_progress_bars:
            datasets.enable_progress_bars()


def require_columns(columns: Columns, fields: Sequence[str], name: str) -> None:
    """Raises UserError if the table `name` with these fields holds neither text nor examples."""
    if columns.text not in fields and columns.format_of(fields) is None:
        raise UserError(
            f"{name}: no column {columns.text!r} (its columns: {', '.join(fields)}); name one with --text_column"
        )
