"""Read documents from a Hugging Face data set: a local folder or the Hub, memory-mapped or streamed."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from minigpt.data.readers import ROWS, Pieces, check_column, checked_text, one_line
from minigpt.utils.errors import UserError


@dataclass(frozen=True)
class Named:
    """Where a corpus with a name of its own is found, and how large it is."""

    dataset: str
    config: str | None
    fallback_revision: str | None
    documents: int
    text_gb: float
    download_gb: float


# Published numbers of documents; sizes in units of 10^9 bytes, roughly: the data set's own card, which is asked before
# the download, knows better. openwebtext carried a loading script for years, which `datasets` no longer runs; the
# branch that the Hub converts by itself never had one.
CORPORA = {
    "openwebtext": Named("Skylion007/openwebtext", None, "refs/convert/parquet", 8_013_769, 39.8, 24.0),
    "fineweb-edu": Named("HuggingFaceFW/fineweb-edu", "sample-10BT", None, 9_672_101, 46.0, 28.5),
}


@dataclass
class Rows:
    """One split of a data set that `datasets` maps into memory: one document a row."""

    dataset: Any
    column: str
    name: str

    def __post_init__(self) -> None:
        check_column(self.column, self.dataset.column_names, self.name)
        self.dataset = self.dataset.select_columns([self.column])

    def count(self) -> int:
        return len(self.dataset)

    def pieces(self, start: int, stop: int) -> Pieces:
        row = start
        for batch in self.dataset.select(range(start, min(stop, self.count()))).iter(batch_size=ROWS):
            for text in batch[self.column]:
                yield checked_text(text, f"{self.name} row {row}", self.column), True
                row += 1


@dataclass
class Stream:
    """One split of a data set that is read while it downloads: one document a row.

    `known` is the number of rows if the data set's card tells; else counting them costs one pass.
    """

    dataset: Any
    column: str
    name: str
    known: int | None

    @cached_property
    def _count(self) -> int:
        return self.known if self.known is not None else sum(1 for _ in self.dataset)

    def count(self) -> int:
        return self._count

    def pieces(self, start: int, stop: int) -> Pieces:
        rows: Iterator[dict[str, Any]] = iter(self.dataset.skip(start) if start else self.dataset)
        for row, record in enumerate(islice(rows, stop - start), start):
            check_column(self.column, list(record), self.name)
            yield checked_text(record[self.column], f"{self.name} row {row}", self.column), True


@dataclass(frozen=True)
class Loaded:
    """The splits of a data set by name, what identifies its content, and where it is from."""

    splits: dict[str, Any]
    key: str
    revision: str | None
    rows: dict[str, int]
    text_bytes: int | None


def load(name: str, config: str | None, revision: str | None, streaming: bool) -> Loaded:
    """Load a data set; its size is told before it is downloaded. Raises UserError in one line if it cannot be."""
    import datasets

    folder = Path(name).expanduser()
    if not folder.exists() and name.startswith((".", "/", "~")):
        raise UserError(f"dataset_name={name}: no such folder")
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return _described(datasets.load_from_disk(str(folder)), None, None)
        path = str(folder) if folder.exists() else name
        builder = datasets.load_dataset_builder(path, config, revision=revision)
        if not streaming and not folder.exists():
            _announce(name, builder.info.download_size, builder.info.dataset_size)
        loaded = datasets.load_dataset(path, config, revision=revision, streaming=streaming)
        return _described(loaded, builder, revision)
    except Exception as error:  # many kinds: no network, no such name, a loading script, damaged files
        raise UserError(f"dataset_name={name}: cannot be loaded: {one_line(error)}") from error


def load_named(corpus: str, revision: str | None, streaming: bool) -> Loaded:
    """Load one of CORPORA; its size is told first."""
    named = CORPORA[corpus]
    print(
        f"{corpus}: {named.documents:,} documents, about {named.text_gb:.0f} GB of text; "
        + (
            "streamed, nothing but the shards is kept"
            if streaming
            else f"downloads about {named.download_gb:.0f} GB and unpacks it into the cache of `datasets`; "
            "--streaming keeps nothing but the shards"
        ),
        file=sys.stderr,
    )
    try:
        return load(named.dataset, named.config, revision, streaming)
    except ValueError as error:
        if revision or not named.fallback_revision or "script" not in str(error):
            raise
        return load(named.dataset, named.config, named.fallback_revision, streaming)


def _announce(name: str, download_bytes: int | None, disk_bytes: int | None) -> None:
    if download_bytes and disk_bytes:
        print(
            f"{name}: downloads {download_bytes / 1e9:.1f} GB, {disk_bytes / 1e9:.1f} GB on the disk", file=sys.stderr
        )


def _described(loaded: Any, builder: Any, revision: str | None) -> Loaded:
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    rows, size = {}, None
    if builder is not None and builder.info.splits:
        rows = {name: split.num_examples for name, split in builder.info.splits.items() if split.num_examples}
        size = sum(split.num_bytes or 0 for split in builder.info.splits.values()) or None
    prints = [f"{name}:{getattr(split, '_fingerprint', '')}" for name, split in sorted(splits.items())]
    if builder is not None:
        prints += [builder.name, builder.config.name, builder.hash or "", revision or ""]
        revision = revision or builder.hash
    return Loaded(splits, ":".join(prints), revision, rows, size)


def source(loaded: Loaded, split: str, column: str, name: str) -> Rows | Stream:
    """The documents of one split."""
    import datasets

    where = f"{name} split {split!r}"
    dataset = loaded.splits[split]
    if isinstance(dataset, datasets.IterableDataset):
        return Stream(dataset, column, where, loaded.rows.get(split))
    return Rows(dataset, column, where)
