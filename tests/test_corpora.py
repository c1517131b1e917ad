"""Laws of corpora: every document arrives once and whole, on one side of the split; bad input is named and located."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import datasets
import pytest

from minigpt import corpora
from minigpt.arguments import DataArguments
from minigpt.corpora import Corpus, open_corpus

TEXT = "It is a truth universally acknowledged, that a — 你好 🙂\r\nsingle man\n" * 10


def whole(pieces: Iterable[tuple[str, bool]]) -> list[str]:
    documents, text = [], ""
    for part, ends in pieces:
        text += part
        if ends:
            documents.append(text)
            text = ""
    assert not text, "the last document has no end"
    return documents


def splits(corpus: Corpus) -> tuple[list[str], list[str]]:
    return whole(corpus.train()), whole(corpus.validation())


def corpus_of(*files: Path, **options) -> Corpus:
    return open_corpus(DataArguments(train_file=[str(file) for file in files], **options))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def lines(path: Path, texts: list[str], **extra) -> Path:
    return write(path, "".join(json.dumps({"text": text, **extra}, ensure_ascii=False) + "\n" for text in texts))


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_one_text_file_is_split_where_nanogpt_splits_it(tmp_path: Path, monkeypatch, block: int) -> None:
    monkeypatch.setattr(corpora, "READ_BYTES", block)  # characters of 1 to 4 bytes fall across the blocks
    train, validation = splits(corpus_of(write(tmp_path / "a.txt", TEXT)))
    assert train == [TEXT[: int(len(TEXT) * 0.9)]]
    assert validation == [TEXT[int(len(TEXT) * 0.9) :]]


def test_the_last_documents_are_held_out(tmp_path: Path) -> None:
    texts = [f"document {index}\n" for index in range(25)]
    train, validation = splits(corpus_of(lines(tmp_path / "a.jsonl", texts), validation_split_percentage=20))
    assert (train, validation) == (texts[:20], texts[20:])


def test_both_splits_have_a_document_whatever_the_percentage(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", ["one", "two"])
    assert splits(corpus_of(file, validation_split_percentage=0.1)) == (["one"], ["two"])
    assert splits(corpus_of(file, validation_split_percentage=99)) == (["one"], ["two"])


def test_a_folder_gives_its_text_and_jsonl_files_in_sorted_order(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a" / "z.md", "first")
    lines(tmp_path / "c.jsonl", ["third", "fourth", "fifth"])
    write(tmp_path / "picture.png", "not text")
    write(tmp_path / ".hidden.txt", "not shown")
    assert splits(corpus_of(tmp_path)) == (["first", "second", "third", "fourth"], ["fifth"])


def test_validation_files_are_held_out_whole(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "a.txt", TEXT), write(tmp_path / "b.txt", "held out")
    assert splits(corpus_of(train, validation_file=[str(held_out)])) == ([TEXT], ["held out"])


def test_line_separators_inside_json_text_do_not_end_a_line(tmp_path: Path) -> None:
    texts = ["one\u2028two\x85three", "four", "five"]
    assert splits(corpus_of(lines(tmp_path / "a.jsonl", texts))) == (texts[:2], texts[2:])


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    train, validation = splits(corpus_of(write(tmp_path / "a.txt", "\ufeffabc\ufeff")))
    assert train + validation == ["abc", "\ufeff"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"body": "b", "id": 1}\n', r"a\.jsonl line 3: no field 'text' .*body, id.*--text_column"),
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl line 2: not a JSON object"),
        (b'{"text": 5}\n', r"a\.jsonl line 1: field 'text' is int, not text"),
        (b"[1]\n", r"a\.jsonl line 1: not a JSON object but list"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl: not UTF-8 at byte 24"),
        (b"", r"a\.jsonl: the file is empty"),
        (b"\n \n", r"a\.jsonl: no documents in it"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        splits(corpus_of(tmp_path / "a.jsonl"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("content", "offset"), [(b"fine \xff", 5), ("né".encode() + b"\xc3(", 3), (b"cut \xf0\x9f", 4)]
)
def test_text_that_is_not_utf8_is_located(
    tmp_path: Path, monkeypatch, block: int, content: bytes, offset: int
) -> None:
    monkeypatch.setattr(corpora, "READ_BYTES", block)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt: not UTF-8 at byte {offset};"):
        splits(corpus_of(tmp_path / "a.txt"))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.txt: no such file"):
        corpus_of(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="no text or JSONL file in this folder"):
        corpus_of(tmp_path)


def test_the_key_follows_content_and_options(tmp_path: Path) -> None:
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


def test_data_sets_are_read_from_disk_and_keep_their_own_validation_split(tmp_path: Path) -> None:
    train = datasets.Dataset.from_dict({"body": [f"document {i}" for i in range(600)], "id": list(range(600))})
    held_out = datasets.Dataset.from_dict({"body": ["held out"], "id": [0]})
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "validation": held_out}).save_to_disk(tmp_path / "two")
    alone = open_corpus(DataArguments(dataset_name=str(tmp_path / "one"), text_column="body"))
    assert splits(alone) == (train["body"][:540], train["body"][540:])
    both = open_corpus(DataArguments(dataset_name=str(tmp_path / "two"), text_column="body"))
    assert splits(both) == (list(train["body"]), ["held out"])
    again = open_corpus(DataArguments(dataset_name=str(tmp_path / "two"), text_column="body"))
    assert again.key == both.key != alone.key
    with pytest.raises(ValueError, match=r"no column 'text' \(its columns: body, id\)"):
        open_corpus(DataArguments(dataset_name=str(tmp_path / "one")))


def test_a_folder_of_data_files_loads_as_a_data_set(tmp_path: Path) -> None:
    lines(tmp_path / "data" / "train.jsonl", ["one", "two", "three"])
    corpus = open_corpus(DataArguments(dataset_name=str(tmp_path / "data")))
    assert splits(corpus) == (["one", "two"], ["three"])
    with pytest.raises(ValueError, match=r"cannot be loaded") as caught:
        open_corpus(DataArguments(dataset_name=str(tmp_path / "missing")))
    assert "\n" not in str(caught.value)


def test_python_docs_are_the_same_english_in_every_process() -> None:
    corpus = open_corpus(DataArguments(corpus="python-docs"))
    train, validation = splits(corpus)
    assert len(set(train) | set(validation)) == len(train) + len(validation) > 1000
    assert sum(map(len, train)) > 1_000_000
    assert abs(len(validation) / (len(train) + len(validation)) - 0.1) < 0.01
    assert all(text.strip() for text in train)
    code = (
        "from minigpt.python_docs import documents; import hashlib;"
        "print(hashlib.sha256(repr(documents()).encode()).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
