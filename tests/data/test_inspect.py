"""Inspection of shards reports what is in them, and verification finds every changed byte."""

import json
from pathlib import Path

import pytest

from minigpt.cli import main
from minigpt.config.arguments import DataArguments
from minigpt.data import shards as shards_module
from minigpt.data.inspect import documents, verify_folder
from minigpt.data.prepare import prepare
from minigpt.data.shards import open_shards
from minigpt.data.tokenizer import load_tokenizer, train_bpe
from minigpt.utils.errors import UserError

DOCUMENTS = ["one and two", "", "three 🙂", "one and two", "", *(f"document {index}" for index in range(45))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, texts in (("data", DOCUMENTS[:45]), ("validation", DOCUMENTS[45:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = {"train_file": [str(tmp_path / "data.jsonl")], "validation_file": [str(tmp_path / "validation.jsonl")]}
    args = DataArguments(**files, tokenizer_vocab_size=300, shard_tokens=100)
    return prepare(args, tmp_path / "out")


def test_inspect_counts_documents_and_characters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "inspect", str(folder), "--samples", "4"])
    printed = capsys.readouterr().out
    assert "documents: 45, 2 of them empty, 2 copies of another one" in printed
    assert "document 0, " in printed
    assert '"one and two"' in printed
    assert "pieces of a character that is split over several ids: 0." in printed
    assert "control characters: 0.0000% of the tokens" in printed
    assert str(folder.parent / "data.jsonl") in printed


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_documents_are_found_across_blocks_and_shards(folder: Path, monkeypatch, block: int) -> None:
    monkeypatch.setattr(shards_module, "READ_TOKENS", block)
    shards = open_shards(folder)
    tokenizer = load_tokenizer(shards.tokenizer_dir)
    spans = list(zip(*documents(shards.train, tokenizer.eos_token_id), strict=True))
    texts = [tokenizer.decode(shards.train.read(start, start + length)) for start, length in spans]
    assert texts == DOCUMENTS[:45]
    assert all(
        shards.train.read(start + length, start + length + 1) == tokenizer.eos_token_id for start, length in spans
    )


def test_a_last_document_without_an_end_counts(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "bins").mkdir()
    train = open_shards(folder).train
    train.read(0, len(train) - 1).tofile(tmp_path / "bins" / "train.bin")  # without the last end of text
    end_of_text = int(train.read(len(train) - 1, len(train))[0])
    starts, lengths = documents(train, end_of_text)
    open_starts, open_lengths = documents(open_shards(tmp_path / "bins").train, end_of_text)
    assert open_starts.tolist() == starts.tolist()
    assert open_lengths.tolist() == lengths.tolist()


def test_intact_shards_are_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "verify", str(folder)])
    assert "intact; all " in capsys.readouterr().out


@pytest.mark.parametrize("position", [0, 57, 105])
def test_a_changed_byte_is_found(folder: Path, position: int) -> None:
    path = folder / "train-00001.bin"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00001\.bin is not what was written"):
        verify_folder(folder)


@pytest.mark.parametrize("name", ["tokens", "documents"])
def test_a_changed_count_is_found(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    written = manifest["splits"]["train"][name]
    manifest["splits"]["train"][name] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"train has {written} {name} where the manifest says {written + 1}"):
        verify_folder(folder)


def test_a_manifest_without_a_field_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["eos_token_id"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="eos_token_id is missing in the manifest"):
        verify_folder(folder)


def test_another_tokenizer_in_the_folder_is_found(folder: Path) -> None:
    train_bpe(DOCUMENTS[5:], 280).save_pretrained(folder / "tokenizer")
    with pytest.raises(UserError, match="the tokenizer is not the one that made the shards"):
        verify_folder(folder)


def test_shards_without_a_manifest_are_described_but_not_verified(tmp_path: Path, capsys, folder: Path) -> None:
    (tmp_path / "bins").mkdir()
    shards = open_shards(folder)
    shards.train.read(0, len(shards.train)).tofile(tmp_path / "bins" / "train.bin")
    main(["data", "inspect", str(tmp_path / "bins")])
    assert "the shards have no tokenizer" in capsys.readouterr().out
    main(["data", "inspect", str(tmp_path / "bins"), "--tokenizer", str(folder / "tokenizer")])
    assert "documents: 45, 2 of them empty" in capsys.readouterr().out
    with pytest.raises(UserError, match="no manifest"):
        verify_folder(tmp_path / "bins")
