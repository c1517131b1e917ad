"""Read documents from a Hugging Face data set: a local folder or the Hub, memory-mapped or streamed."""

import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt.data.readers import Pieces, Source, one_line, require_library
from minigpt.data.rows import Columns, RowFormat
from minigpt.data.tables import DatasetRows, document_of, require_columns
from minigpt.utils.errors import UserError
from minigpt.utils.hub_names import refuse_missing_folder

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, DatasetDict, IterableDataset, IterableDatasetDict


@dataclass(frozen=True)
class NamedCorpus:
    """A data set on the Hub that has a short name here, and its size. The sizes are in 10^9 bytes."""

    dataset: str
    config: str | None
    fallback_revision: str | None
    documents: int
    text_gb: float
    download_gb: float


# Published numbers of documents, and approximate sizes. The data set's own card has exact ones, which are printed
# before the download. openwebtext had a loading script for years, and `datasets` no longer runs scripts; the branch
# that the Hub converts to Parquet never had one.
CORPORA = {
    "openwebtext": NamedCorpus("Skylion007/openwebtext", None, "refs/convert/parquet", 8_013_769, 39.8, 24.0),
    "fineweb-edu": NamedCorpus("HuggingFaceFW/fineweb-edu", "sample-10BT", None, 9_672_101, 46.0, 28.5),
}


@dataclass
class StreamedRows(Source):
    """One split of a data set that is read while it downloads: one document per row.

    `known_count` is the number of rows from the data set's card. Without it, counting reads the stream once.
    """

    dataset: "IterableDataset"
    columns: Columns
    name: str
    known_count: int | None

    @cached_property
    def row_format(self) -> RowFormat | None:
        first_row: dict[str, Any] = {}
        return self.columns.format_of(self.dataset.column_names or list(next(iter(self.dataset), first_row)))

    @cached_property
    def _count(self) -> int:
        return self.known_count if self.known_count is not None else sum(1 for _ in self.dataset)

    def count(self) -> int:
        return self._count

    def pieces(self, start: int, stop: int, chosen: np.ndarray | None = None) -> Pieces:
        rows = self.dataset.skip(start) if start else self.dataset
        for row, record in enumerate(islice(rows, stop - start), start):
            if chosen is None or chosen[row]:
                form = self.row_format
                if form is None:
                    require_columns(self.columns, list(record), self.name)
                yield document_of(record, self.columns.text, form, f"{self.name} row {row}"), True


@dataclass(frozen=True)
class LoadedDataset:
    """The splits of a data set by name.

    `key` identifies the content. `rows` and `text_bytes` come from the card, as far as it has them: the number of rows
    per split, and the size of all splits together.
    """

    splits: "dict[str, Dataset | IterableDataset]"
    key: str
    revision: str | None
    rows: dict[str, int]
    text_bytes: int | None


def load(name: str, config: str | None, revision: str | None, streaming: bool) -> LoadedDataset:
    """Load a data set by Hub name or local folder. The size of a download is printed before it starts.

    Raises UserError if it cannot be loaded.
    """
    require_library("datasets", f"dataset_name={name}")
    import datasets

    folder = Path(name).expanduser()
    refuse_missing_folder("dataset_name", name)
    builder = None
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        else:
            path = str(folder) if folder.exists() else name
            builder = datasets.load_dataset_builder(path, config, revision=revision)
            if not streaming and not folder.exists():
                _print_size(name, builder.info.download_size, builder.info.dataset_size)
            loaded = datasets.load_dataset(path, config, revision=revision, streaming=streaming)
    except Exception as error:  # of many types: no network, no such name, a loading script, damaged files
        raise UserError(f"dataset_name={name}: cannot be loaded: {one_line(error)}") from error
    return _describe(loaded, builder, revision)


def load_named(corpus: str, revision: str | None, streaming: bool) -> LoadedDataset:
    """Load one of CORPORA. Its size is printed first. Raises UserError if it cannot be loaded."""
    named = CORPORA[corpus]
    storage = (
        "streamed, only the shards are stored"
        if streaming
        else f"downloads about {named.download_gb:.0f} GB and unpacks it in the cache of `datasets`; "
        "with --streaming only the shards are stored"
    )
    print(f"{corpus}: {named.documents:,} documents, about {named.text_gb:.0f} GB of text; {storage}", file=sys.stderr)
    try:
        return load(named.dataset, named.config, revision, streaming)
    except UserError as error:
        if revision or not named.fallback_revision or "script" not in str(error):
            raise
        return load(named.dataset, named.config, named.fallback_revision, streaming)


def _print_size(name: str, download_bytes: int | None, disk_bytes: int | None) -> None:
    if download_bytes and disk_bytes:
        print(f"{name}: downloads {download_bytes / 1e9:.1f} GB, {disk_bytes / 1e9:.1f} GB on disk", file=sys.stderr)


def _describe(
    loaded: "Dataset | DatasetDict | IterableDataset | IterableDatasetDict",
    builder: "DatasetBuilder | None",
    revision: str | None,
) -> LoadedDataset:
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    rows: dict[str, int] = {}
    text_bytes = None
    if builder is not None and builder.info.splits:
        rows = {name: split.num_examples for name, split in builder.info.splits.items() if split.num_examples}
        text_bytes = sum(split.num_bytes or 0 for split in builder.info.splits.values()) or None
    identity = [f"{name}:{getattr(split, '_fingerprint', '')}" for name, split in sorted(splits.items())]
    if builder is not None:
        identity += [builder.name, builder.config.name, builder.hash or "", revision or ""]
        revision = revision or builder.hash
    return LoadedDataset(splits, ":".join(identity), revision, rows, text_bytes)


def split_source(loaded: LoadedDataset, split: str, columns: Columns, name: str) -> DatasetRows | StreamedRows:
    """The documents of one split. Raises UserError if a memory-mapped split holds neither text nor examples."""
    import datasets

    split_name = f"{name} split {split!r}"
    dataset = loaded.splits[split]
    if isinstance(dataset, datasets.IterableDataset):
        return StreamedRows(dataset, columns, split_name, loaded.rows.get(split))
    require_columns(columns, dataset.column_names, split_name)
    return DatasetRows(lambda: dataset, columns, dataset.column_names, split_name)
