"""Prepared shards hold the tokenizer's ids of every document once, and a failure leaves nothing on the disk."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minigpt.config.arguments import DataArguments
from minigpt.data import prepare as prepare_module
from minigpt.data.prepare import prepare, prepared_folder
from minigpt.data.shards import open_shards
from minigpt.data.tokenizer import load_tokenizer, tokenizer_hash, train_bpe
from minigpt.utils.errors import UserError
from minigpt.utils.lock import locked

DOCUMENTS = [f"Document {index}: it is — number {index}.\n\nEnd<|endoftext|>\n" for index in range(30)]


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    return str(file)


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> str:
    train_bpe(DOCUMENTS, 300).save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def minigpt(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "minigpt", *words], capture_output=True, text=True, **options)


def test_shards_are_the_tokenizers_ids_of_each_document_and_its_end(
    jsonl: str, tokenizer_folder: str, tmp_path: Path
) -> None:
    shards = open_shards(prepare(DataArguments(train_file=[jsonl], tokenizer=tokenizer_folder), tmp_path / "out"))
    tokenizer = load_tokenizer(shards.tokenizer_dir)

    def ids(texts: list[str]) -> list[int]:
        encoded = tokenizer(texts, split_special_tokens=True)["input_ids"]
        return [token for document in encoded for token in [*document, tokenizer.eos_token_id]]

    validation = shards.validation.read(0, len(shards.validation)).tolist()
    held_out = [text for text in DOCUMENTS if tokenizer.decode(validation).count(text)]
    train = [text for text in DOCUMENTS if text not in held_out]
    assert validation == ids(held_out)
    assert shards.train.read(0, len(shards.train)).tolist() == ids(train)
    assert (shards.train.documents, shards.validation.documents) == (27, 3)
    assert shards.train.text_bytes == sum(len(text.encode()) for text in train)
    assert shards.tokenizer_hash == tokenizer_hash(tokenizer) == tokenizer_hash(load_tokenizer(tokenizer_folder))
    assert shards.vocab_size == len(tokenizer)


def test_shards_do_not_depend_on_how_text_is_batched(jsonl: str, tmp_path: Path, monkeypatch) -> None:
    args = DataArguments(train_file=[jsonl], tokenizer="char")
    first = open_shards(prepare(args, tmp_path / "a"))
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 100)
    assert open_shards(prepare(args, tmp_path / "b")).fingerprint == first.fingerprint


def test_characters_of_validation_text_alone_have_ids(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc" * 30 + "é", encoding="utf-8")
    shards = open_shards(
        prepare(DataArguments(train_file=[str(tmp_path / "text.txt")], tokenizer="char"), tmp_path / "o")
    )
    assert shards.validation.read(0, len(shards.validation)).tolist()[-2:] == [3, 4]


def test_the_cache_prepares_the_same_content_once(jsonl: str, tmp_path: Path) -> None:
    args = DataArguments(train_file=[jsonl], tokenizer="char", cache_dir=str(tmp_path / "cache"))
    folder = prepared_folder(args)
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert prepared_folder(args) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == written
    other = DataArguments(train_file=[jsonl], cache_dir=str(tmp_path / "cache"), validation_split_percentage=50)
    assert prepared_folder(other) != folder
    with Path(jsonl).open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    assert prepared_folder(args) != folder


def test_concurrent_processes_prepare_once_and_use_the_same_folder(jsonl: str, tmp_path: Path) -> None:
    code = (
        "import sys; from minigpt.config.arguments import DataArguments;"
        "from minigpt.data.prepare import prepared_folder;"
        "print(prepared_folder(DataArguments(train_file=[sys.argv[1]], tokenizer='char', cache_dir=sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, jsonl, str(tmp_path / "cache")]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert sum("prepared in" in err for _, err in outputs) == 1
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_the_cache_is_in_xdg_cache_home(jsonl: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert prepared_folder(DataArguments(train_file=[jsonl], tokenizer="char")).parent == tmp_path / "xdg" / "minigpt"


def test_a_vocabulary_beyond_16_bits_gets_32_bit_shards(tmp_path: Path) -> None:
    text = "".join(chr(point) for point in range(70_000) if not 0xD800 <= point < 0xE000) + "a" * 8_000
    (tmp_path / "text.txt").write_bytes(text.encode())
    shards = open_shards(
        prepare(DataArguments(train_file=[str(tmp_path / "text.txt")], tokenizer="char"), tmp_path / "o")
    )
    assert shards.train.dtype == np.dtype("<u4")
    assert shards.train.read(0, 10).tolist() == list(range(10))


def test_a_folder_that_cannot_be_written_is_refused_before_text_is_read(tmp_path: Path) -> None:
    for folder, place in (("/proc/x", "/proc"), ("/dev/null/x", "/dev/null")):
        with pytest.raises(UserError, match=rf"output_dir={folder}: nothing can be written into {place} \("):
            prepare(DataArguments(train_file=["missing"]), folder)


def test_the_summary_shows_the_shares_of_the_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("x" * 1000, encoding="utf-8")
    prepare(DataArguments(train_file=[str(tmp_path / "a.txt")], tokenizer="char"), tmp_path / "out")
    summary = capsys.readouterr().err
    assert "train: 1 document, 901 tokens, 900 bytes of text (90.0%)" in summary
    assert "validation: 1 document, 101 tokens, 100 bytes of text (10.0%)" in summary


def bad_line(tmp_path: Path) -> list[str]:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"other": "field"}\n')
    return ["--train_file", str(tmp_path / "a.jsonl")]


def not_utf8(tmp_path: Path) -> list[str]:
    (tmp_path / "a.txt").write_bytes(b"abc" * 1000 + b"\xff")
    return ["--train_file", str(tmp_path / "a.txt")]


def empty(tmp_path: Path) -> list[str]:
    (tmp_path / "a.txt").write_bytes(b"")
    return ["--train_file", str(tmp_path / "a.txt")]


def missing_tokenizer(tmp_path: Path) -> list[str]:
    (tmp_path / "a.txt").write_text("text " * 100)
    return ["--train_file", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "nowhere")]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (bad_line, "a.jsonl line 2: no field 'text'"),
        (not_utf8, "a.txt: not UTF-8 at byte 3000"),
        (empty, "a.txt: the file is empty"),
        (missing_tokenizer, "nowhere: no such folder"),
    ],
)
def test_bad_input_prints_one_line_exits_with_2_and_leaves_nothing(tmp_path: Path, bad, message: str) -> None:
    words = bad(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run = minigpt("prepare", *words, "--output_dir", str(tmp_path / "new" / "out"))
    assert run.returncode == 2
    assert message in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_prints_a_summary_and_overwrites_only_on_request(jsonl: str, tmp_path: Path) -> None:
    words = ["prepare", "--train_file", jsonl, "--tokenizer", "char", "--output_dir", str(tmp_path / "out")]
    first = minigpt(*words)
    assert first.returncode == 0, first.stderr
    assert "27 documents" in first.stderr
    assert str(tmp_path / "out") in first.stderr
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    again = minigpt(*words)
    assert again.returncode == 2
    assert "is not empty; give another folder, or --overwrite_cache" in again.stderr
    assert minigpt(*words, "--overwrite_cache").returncode == 0
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_overwriting_replaces_shards_only_and_never_an_input(tmp_path: Path) -> None:
    own, thesis, nanogpt = tmp_path / "own", tmp_path / "thesis", tmp_path / "nanogpt"
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night. " * 40, encoding="utf-8")
    prepare(DataArguments(train_file=[str(text)], tokenizer="char"), own)
    (own / "input.txt").write_text("a b c " * 100, encoding="utf-8")
    thesis.mkdir()
    (thesis / "chapter1.tex").write_text("years of work", encoding="utf-8")
    nanogpt.mkdir()
    np.arange(100, dtype=np.uint16).tofile(nanogpt / "train.bin")
    cases = [
        (own, own / "input.txt", "train_file=.* is in output_dir"),
        (own, own, "train_file=.* is in output_dir"),
        (thesis, text, "holds no prepared token shards"),
        (nanogpt, text, "holds no prepared token shards"),
    ]
    for output_dir, source, message in cases:
        before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
        args = DataArguments(train_file=[str(source)], tokenizer="char", overwrite_cache=True)
        with pytest.raises(UserError, match=message):
            prepare(args, output_dir)
        assert {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()} == before


def test_a_linked_output_folder_stays_a_link_when_it_is_overwritten(tmp_path: Path) -> None:
    text, large_disk, link = tmp_path / "text.txt", tmp_path / "large_disk", tmp_path / "shards"
    text.write_text("It was a dark and stormy night. " * 40, encoding="utf-8")
    large_disk.mkdir()
    link.symlink_to(large_disk)
    for overwrite in (False, True):
        prepare(DataArguments(train_file=[str(text)], tokenizer="char", overwrite_cache=overwrite), link)
        assert link.is_symlink()
        assert (large_disk / "manifest.json").is_file()


def test_two_preparations_into_one_folder_do_not_replace_each_other(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night. " * 40, encoding="utf-8")
    args = DataArguments(train_file=[str(text)], tokenizer="char")
    with locked(tmp_path / ".shards.lock", "shards"), pytest.raises(UserError, match="is in use by process"):
        prepare(args, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    prepare(args, tmp_path / "shards")
    with pytest.raises(UserError, match="is not empty"):
        prepare(args, tmp_path / "shards")
