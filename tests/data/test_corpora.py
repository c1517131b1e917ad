"""Laws of corpora: every document is read once and whole, in one of the splits; errors name the file and the place."""

import dataclasses
import errno
import gzip
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from minigpt.config.arguments import DataArguments
from minigpt.data import hub_datasets, readers
from minigpt.data.corpora import Corpus, open_corpus
from minigpt.data.readers import Document
from minigpt.utils.errors import UserError

TEXT = "It is a truth universally acknowledged, that a — 你好 🙂\r\nsingle man\n" * 10


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which `datasets` keeps its copies."""
    folder = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def whole(pieces: Iterable[tuple[Document, bool]]) -> list[str]:
    """The documents, each joined from its pieces."""
    documents: list[str] = []
    text = ""
    for piece, ends in pieces:
        text += str(piece)
        if ends:
            documents.append(text)
            text = ""
    assert not text, "the last document has no end"
    return documents


def splits(corpus: Corpus) -> tuple[list[str], list[str]]:
    return whole(corpus.train.pieces()), whole(corpus.validation.pieces())


def documents(corpus: Corpus) -> list[str]:
    """Every document of a corpus without a validation split of its own, before it is divided."""
    return whole(corpus.train.split.source.pieces(0, sys.maxsize))


def corpus_of(*files: Path, **options) -> Corpus:
    return open_corpus(DataArguments(train_file=[str(file) for file in files], **options))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def lines(path: Path, texts: list[str], **extra) -> Path:
    return write(path, "".join(json.dumps({"text": text, **extra}, ensure_ascii=False) + "\n" for text in texts))


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_one_text_file_is_split_where_nanogpt_splits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(readers, "READ_BYTES", block)  # characters of 1 to 4 bytes cross the blocks
    train, validation = splits(corpus_of(write(tmp_path / "a.txt", TEXT)))
    assert train == [TEXT[: int(len(TEXT) * 0.9)]]
    assert validation == [TEXT[int(len(TEXT) * 0.9) :]]


def sizes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("percentage", [0.5, 5, 20, 50, 90])
@pytest.mark.parametrize("seed", range(8))
def test_the_held_out_share_of_the_bytes_is_near_the_wanted_one_whatever_the_sizes(
    tmp_path: Path, percentage: float, seed: int
) -> None:
    generator = random.Random(seed)
    # from equal documents to a few that are most of the text
    texts = [
        f"{index} {'é' * int(20 * generator.paretovariate(0.3 + seed / 4))}\n" for index in range(seed * seed + 1)
    ]
    texts = [text[:50_000] for text in texts]
    train, validation = splits(corpus_of(lines(tmp_path / "a.jsonl", texts), validation_split_percentage=percentage))
    share = sizes(validation) / sizes(texts)
    # one character of every document at most is lost to rounding; the rest is the bound of the rule
    assert share >= 0.5 * percentage / 100
    assert share <= 1.5 * percentage / 100 + 2 * len(texts) / sizes(texts)
    assert sizes(train) + sizes(validation) == sizes(texts)


def test_documents_stay_whole_and_in_order_and_belong_to_one_split(tmp_path: Path) -> None:
    texts = [f"document {index}\n" for index in range(100, 300)]
    train, validation = splits(corpus_of(lines(tmp_path / "a.jsonl", texts), validation_split_percentage=20))
    assert len(validation) == 40
    assert sorted(train + validation) == texts
    assert (train, validation) == (sorted(train), sorted(validation))
    assert validation not in (texts[:40], texts[-40:])


def test_a_short_file_and_a_long_one_are_both_in_training_and_the_long_one_is_cut_as_if_alone(tmp_path: Path) -> None:
    long = write(tmp_path / "z.txt", TEXT * 100)
    write(tmp_path / "a.txt", "short")
    train, validation = splits(corpus_of(tmp_path, validation_split_percentage=5))
    assert train[0] == "short"
    assert (train[1:], validation) == splits(corpus_of(long, validation_split_percentage=5))


def test_a_text_and_a_folder_of_pages_are_both_in_both_splits(tmp_path: Path) -> None:
    book = write(tmp_path / "book.txt", TEXT * 1000)
    pages = lines(tmp_path / "pages.jsonl", [f"{index:03} {TEXT}" for index in range(200)])
    train, validation = splits(corpus_of(book, pages))
    assert validation[0] == (TEXT * 1000)[int(len(TEXT) * 1000 * 0.9) :]
    assert len(validation) == 21
    assert len(train) == 181


def test_the_split_depends_on_the_documents_alone(tmp_path: Path) -> None:
    texts = [f"document {index} {'x' * (index % 7)}\n" for index in range(300)]
    file = lines(tmp_path / "a.jsonl", texts)
    as_parquet(tmp_path, texts)
    expected = splits(corpus_of(file))
    assert splits(corpus_of(file, shard_tokens=7, preprocessing_num_workers=3)) == expected
    assert splits(corpus_of(tmp_path / "a.parquet")) == expected
    assert (
        splits(corpus_of(lines(tmp_path / "1.jsonl", texts[:99]), lines(tmp_path / "2.jsonl", texts[99:]))) == expected
    )


@pytest.mark.parametrize("count", [2, 3, 9, 200])
def test_examples_are_never_cut_and_both_splits_have_some(tmp_path: Path, count: int) -> None:
    rows = [{"prompt": f"{index}", "completion": "x" * (index == 1) * 10_000} for index in range(count)]
    file = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    train, validation = splits(corpus_of(file, validation_split_percentage=1))
    assert sorted(train + validation) == sorted(row["prompt"] + row["completion"] for row in rows)
    assert "1" + "x" * 10_000 in train  # it is nearly the whole text
    assert validation


def test_the_readable_files_of_a_folder_are_read_in_sorted_order(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a" / "z.md", "first")
    lines(tmp_path / "c.jsonl", ["third", "fourth", "fifth"])
    write(tmp_path / "picture.png", "not text")
    write(tmp_path / ".hidden.txt", "not read")
    assert documents(corpus_of(tmp_path)) == ["first", "second", "third", "fourth", "fifth"]


def test_validation_files_are_the_validation_split(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "a.txt", TEXT), write(tmp_path / "b.txt", "held out")
    assert splits(corpus_of(train, validation_file=[str(held_out)])) == ([TEXT], ["held out"])


def test_line_separators_inside_json_text_do_not_end_a_line(tmp_path: Path) -> None:
    texts = ["one\u2028two\x85three", "four", "five"]
    assert documents(corpus_of(lines(tmp_path / "a.jsonl", texts))) == texts


def test_a_byte_order_mark_at_the_start_is_not_text(tmp_path: Path) -> None:
    train, validation = splits(corpus_of(write(tmp_path / "a.txt", "\ufeffabc\ufeff")))
    assert train + validation == ["abc", "\ufeff"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"body": "b", "id": 1}\n', r"a\.jsonl line 3: no field 'text' .*body, id.*--text_column"),
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl line 2: not a JSON object"),
        (b'{"text": 5}\n', r"a\.jsonl line 1: 'text' is int, not text"),
        (b"[1]\n", r"a\.jsonl line 1: not a JSON object but list"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl: not UTF-8 at byte 24"),
        (b"", r"a\.jsonl: the file is empty"),
        (b"\n \n", r"no documents in .*a\.jsonl"),
    ],
)
def test_an_error_in_json_lines_names_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        splits(corpus_of(tmp_path / "a.jsonl"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("content", "offset"), [(b"fine \xff", 5), ("né".encode() + b"\xc3(", 3), (b"cut \xf0\x9f", 4)]
)
def test_the_first_byte_that_is_not_utf8_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, content: bytes, offset: int
) -> None:
    monkeypatch.setattr(readers, "READ_BYTES", block)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt: not UTF-8 at byte {offset};"):
        splits(corpus_of(tmp_path / "a.txt"))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.txt: no such file"):
        corpus_of(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="this folder has no readable file"):
        corpus_of(tmp_path)


def test_the_key_depends_on_content_and_options_and_not_on_names(tmp_path: Path) -> None:
    first, same = write(tmp_path / "a.txt", TEXT), write(tmp_path / "b.txt", TEXT)
    other = write(tmp_path / "c.txt", TEXT + " ")
    assert corpus_of(first).key == corpus_of(same).key
    keys = [
        corpus_of(first),
        corpus_of(other),
        corpus_of(first, validation_split_percentage=5),
        corpus_of(first, same),
    ]
    assert len({corpus.key for corpus in keys}) == 4


def rows(texts: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"body": texts, "id": list(range(len(texts)))})


def as_gzip(folder: Path, texts: list[str]) -> None:
    plain = lines(folder / "plain", texts).read_bytes()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))


def as_zstandard(folder: Path, texts: list[str]) -> None:
    plain = lines(folder / "plain", texts).read_bytes()
    parts = [pyarrow.compress(part, "zstd", asbytes=True) for part in (plain[:5000], plain[5000:])]
    (folder / "a.jsonl.zst").write_bytes(b"".join(parts))


def as_parquet(folder: Path, texts: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), folder / "a.parquet", 100)


def as_parquet_of_datasets(folder: Path, texts: list[str]) -> None:
    rows(texts).rename_column("body", "text").to_parquet(folder / "a.parquet", batch_size=77)


def as_large_strings(folder: Path, texts: list[str]) -> None:
    column = pyarrow.array(texts, pyarrow.large_string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), folder / "a.parquet", 100)


def as_arrow_file(folder: Path, texts: list[str]) -> None:
    table = pyarrow.table({"text": texts})
    with pyarrow.ipc.new_file(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=70)


def as_arrow_stream(folder: Path, texts: list[str]) -> None:
    table = pyarrow.table({"text": texts})
    with pyarrow.ipc.new_stream(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=70)


def as_arrow_of_datasets(folder: Path, texts: list[str]) -> None:
    rows(texts).rename_column("body", "text").save_to_disk(folder / "saved")
    (folder / "saved" / "data-00000-of-00001.arrow").rename(folder / "a.arrow")


FORMATS = [
    as_gzip,
    as_zstandard,
    as_parquet,
    as_parquet_of_datasets,
    as_large_strings,
    as_arrow_file,
    as_arrow_stream,
    as_arrow_of_datasets,
]


Save = Callable[[Path, list[str]], None]


@pytest.mark.parametrize("save", FORMATS)
def test_every_format_is_read_as_its_library_wrote_it_from_any_document_on(tmp_path: Path, save: Save) -> None:
    texts = [f"document {index} — 你好\n" for index in range(500)]
    save(tmp_path, texts)
    (file,) = tmp_path.glob("a.*")
    corpus = corpus_of(file)
    assert documents(corpus) == texts
    train, validation = splits(corpus)
    assert len(validation) == 50
    assert sorted(train + validation) == sorted(texts)
    assert corpus.train.split.source.sizes().tolist() == [len(text.encode()) for text in texts]
    for start in (0, 1, 69, 70, 99, 100, 449, 450):
        assert whole(corpus.train.pieces(start)) == train[start:]
        assert whole(corpus.validation.pieces(start)) == validation[start:]


@pytest.mark.parametrize("save", FORMATS[:3] + FORMATS[5:7])
def test_a_truncated_file_is_refused_in_one_line_that_names_it(tmp_path: Path, save: Save) -> None:
    save(tmp_path, [f"document {index} {random.Random(index).random()}" for index in range(2000)])
    (file,) = tmp_path.glob("a.*")
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size * 2 // 3)
    with pytest.raises(UserError, match=rf"{file.name}: ") as caught:
        splits(corpus_of(file))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_damaged_inside_is_refused_in_one_line_and_nothing_else_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    as_parquet(tmp_path, [f"document {index}" for index in range(2000)])
    file = tmp_path / "a.parquet"
    content = bytearray(file.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)  # data pages; the footer with the schema is whole
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file: ") as caught:
        splits(corpus_of(file))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_column_is_named_before_anything_is_converted(tmp_path: Path, datasets_cache: Path) -> None:
    as_parquet(tmp_path, ["one", "two"])
    as_arrow_file(tmp_path, ["one", "two"])
    with pytest.raises(UserError, match=r"parquet: no column 'body' \(its columns: id, text\); name .* --text_column"):
        splits(corpus_of(tmp_path / "a.parquet", text_column="body"))
    with pytest.raises(UserError, match=r"arrow: no column 'body' \(its columns: text\); name one with --text_column"):
        splits(corpus_of(tmp_path / "a.arrow", text_column="body"))
    assert list(datasets_cache.iterdir()) == []


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pyarrow.array([1, 2]), "row 0: 'text' is int, not text"),
        (pyarrow.array(["one", None]), "row 1: 'text' is NoneType, not text"),
        (pyarrow.array([b"one", b"two"]), "row 0: 'text' is bytes, not text"),
        (pyarrow.array([b"one", b"\xff"]).cast(pyarrow.string(), safe=False), "row 1: column 'text' is not UTF-8"),
    ],
)
def test_a_value_that_is_not_text_is_named_by_file_and_row(
    tmp_path: Path, kind: str, column: pyarrow.Array, message: str
) -> None:
    table = pyarrow.table({"text": column})
    if kind == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError, match=rf"a\.{kind} {message}"):
        splits(corpus_of(tmp_path / f"a.{kind}"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_only_the_type_of_the_text_column_matters(tmp_path: Path, name: str) -> None:
    texts = ["one", "two", "one"]
    map_type = pyarrow.map_(pyarrow.string(), pyarrow.int64())  # not supported by `datasets`
    table = pyarrow.table(
        {"text": pyarrow.array(texts).dictionary_encode(), "other": pyarrow.array([[("a", 1)]] * 3, map_type)}
    )
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    assert documents(corpus_of(tmp_path / name)) == texts


def test_tables_without_rows_add_no_documents(tmp_path: Path) -> None:
    as_parquet(tmp_path, ["one", "two", "three"])
    for name, row_groups in (("0.parquet", 0), ("b.parquet", 1)):
        table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
        with pyarrow.parquet.ParquetWriter(tmp_path / name, table.schema) as writer:
            for _ in range(row_groups):
                writer.write_table(table)
    corpus = corpus_of(tmp_path)
    assert documents(corpus) == ["one", "two", "three"]
    assert corpus.train.split.source.sizes().tolist() == [3, 3, 5]
    with pytest.raises(UserError, match=r"no documents in .*b\.parquet"):
        splits(corpus_of(tmp_path / "b.parquet"))


def test_a_parquet_file_is_only_converted_when_its_documents_are_read(tmp_path: Path, datasets_cache: Path) -> None:
    as_parquet(tmp_path, ["one", "two", "three"])
    corpus = corpus_of(tmp_path / "a.parquet")
    assert list(datasets_cache.iterdir()) == []
    splits(corpus)
    copies = {path: path.stat().st_mtime_ns for path in datasets_cache.rglob("*.arrow")}
    splits(corpus_of(tmp_path / "a.parquet"))
    assert {path: path.stat().st_mtime_ns for path in datasets_cache.rglob("*.arrow")} == copies != {}


def test_a_replaced_parquet_file_is_read_anew_even_with_the_same_modification_time(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    for texts in (["one", "two"], ["six", "ten"]):
        as_parquet(tmp_path, texts)
        os.utime(file, (0, 0))
        assert documents(corpus_of(file)) == texts


def test_special_characters_in_a_file_name_are_not_a_pattern(tmp_path: Path) -> None:
    for name in ("dump[12].parquet", "dump1.parquet", "dump*.parquet"):
        as_parquet(tmp_path, [name, "held out"])
        (tmp_path / "a.parquet").rename(tmp_path / name)
    for name in ("dump[12].parquet", "dump*.parquet"):
        assert documents(corpus_of(tmp_path / name)) == [name, "held out"]


def test_a_full_disk_during_conversion_is_an_error_of_the_system_and_not_of_the_file(tmp_path: Path) -> None:
    as_parquet(tmp_path, [f"document {index} {random.Random(index).random()}" for index in range(2000)])
    corpus = corpus_of(tmp_path / "a.parquet")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            corpus.train.split.source.count()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("save", [as_parquet, as_arrow_stream])
def test_without_datasets_the_error_names_the_file_and_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Save
) -> None:
    save(tmp_path, ["one", "two"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"a\.\w+: reading it needs datasets, .*; pip install datasets"):
        splits(corpus_of(tmp_path))
    with pytest.raises(UserError, match="pip install datasets"):
        open_corpus(DataArguments(dataset_name="anything"))


def data_set(folder: Path, **options) -> Corpus:
    return open_corpus(DataArguments(dataset_name=str(folder), text_column="body", **options))


def test_saved_data_sets_are_read_and_keep_their_own_validation_split(tmp_path: Path) -> None:
    texts = [f"document {index}" for index in range(600)]
    rows(texts).save_to_disk(tmp_path / "one")
    splits_of_two = {"train": rows(texts), "validation": rows(["held out"]), "extra": rows(texts[:10])}
    datasets.DatasetDict(splits_of_two).save_to_disk(tmp_path / "two")
    alone, both = data_set(tmp_path / "one"), data_set(tmp_path / "two")
    assert documents(alone) == texts
    train, validation = splits(alone)
    assert sorted(train + validation) == sorted(texts)
    assert whole(alone.train.pieces(257)) == train[257:]
    assert splits(both) == (texts, ["held out"])
    assert whole(data_set(tmp_path / "two", dataset_split="extra").train.pieces()) == texts[:10]
    assert data_set(tmp_path / "two").key == both.key != alone.key
    with pytest.raises(ValueError, match=r"no column 'text' \(its columns: body, id\)"):
        open_corpus(DataArguments(dataset_name=str(tmp_path / "one")))
    with pytest.raises(ValueError, match=r"no split 'test' \(its splits: train, validation, extra\)"):
        data_set(tmp_path / "two", dataset_split="test")


def test_a_folder_of_data_files_is_loaded_as_a_data_set(tmp_path: Path) -> None:
    rows(["one", "two", "three"]).to_parquet(tmp_path / "data" / "train-00000.parquet")
    corpus = data_set(tmp_path / "data")
    assert documents(corpus) == ["one", "two", "three"]
    assert corpus.origin["dataset_revision"]
    with pytest.raises(ValueError, match=r"no such folder") as caught:
        data_set(tmp_path / "missing")
    assert "\n" not in str(caught.value)


def test_a_stream_holds_out_its_first_documents(tmp_path: Path) -> None:
    texts = [f"document {index}" for index in range(600)]
    rows(texts).to_parquet(tmp_path / "data" / "train-00000.parquet", batch_size=100)
    corpus = data_set(tmp_path / "data", streaming=True)
    assert splits(corpus) == (texts[60:], texts[:60])
    assert whole(corpus.train.pieces(250)) == texts[310:]
    assert data_set(tmp_path / "data", streaming=True).key == corpus.key


@pytest.mark.parametrize("name", ["openwebtext", "fineweb-edu"])
def test_a_named_corpus_reads_files_of_its_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The download needs the network; everything after it is the same for a local folder."""
    columns = {"text": ["one", "two", "three"]}
    if name == "fineweb-edu":
        columns |= {"id": ["a", "b", "c"], "dump": ["d"] * 3, "url": ["u"] * 3, "score": [3.0, 3.5, 4.0]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train-00000.parquet")
    local = dataclasses.replace(hub_datasets.CORPORA[name], dataset=str(tmp_path), config=None)
    monkeypatch.setitem(hub_datasets.CORPORA, name, local)
    assert documents(open_corpus(DataArguments(corpus=name))) == ["one", "two", "three"]
    assert "GB of text; downloads about" in capsys.readouterr().err
    assert splits(open_corpus(DataArguments(corpus=name, streaming=True))) == (["two", "three"], ["one"])
    assert "streamed" in capsys.readouterr().err


def test_python_docs_are_the_same_in_every_process() -> None:
    corpus = open_corpus(DataArguments(corpus="python-docs"))
    train, validation = splits(corpus)
    assert len(set(train) | set(validation)) == len(train) + len(validation) > 1000
    assert sum(map(len, train)) > 1_000_000
    assert abs(len(validation) / (len(train) + len(validation)) - 0.1) < 0.01
    assert all(text.strip() for text in train)
    code = (
        "from minigpt.data.python_docs import documents; import hashlib;"
        "print(hashlib.sha256(repr(documents()).encode()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == hashlib.sha256(repr(train + validation).encode()).hexdigest()
