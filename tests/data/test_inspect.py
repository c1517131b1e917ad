"""Laws of inspection: what is said of shards is what is in them, and no changed byte is overlooked."""

import json
from pathlib import Path

import numpy as np
import pytest

from minigpt.cli import main
from minigpt.config.arguments import DataArguments
from minigpt.data import inspect
from minigpt.data.inspect import documents, verify_folder
from minigpt.data.prepare import prepare
from minigpt.data.shards import open_shards
from minigpt.data.tokenizer import load_tokenizer, train_bpe

DOCUMENTS = ["one and two", "", "three 🙂", "one and two", "", *(f"document {index}" for index in range(45))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    args = DataArguments(train_file=[str(file)], tokenizer_vocab_size=300, shard_tokens=100)
    return prepare(args, tmp_path / "out")


def test_inspect_counts_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "inspect", str(folder), "--samples", "4"])
    said = capsys.readouterr().out
    assert "documents: 45, 2 of them empty, 2 copies of another one" in said
    assert "document 0, " in said
    assert '"one and two"' in said
    assert "pieces of a character that is split over several ids: 0." in said
    assert str(folder.parent / "data.jsonl") in said


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_documents_are_found_again_across_blocks_and_shards(folder: Path, monkeypatch, block: int) -> None:
    monkeypatch.setattr(inspect, "READ_TOKENS", block)
    shards = open_shards(folder)
    tokenizer = load_tokenizer(shards.tokenizer_dir)
    found = list(documents(shards.train, tokenizer.eos_token_id))
    assert [tokenizer.decode(ids) for _, ids in found] == DOCUMENTS[:45]
    for start, ids in found:
        assert np.array_equal(shards.train.read(start, start + len(ids)), ids)


def test_whole_shards_are_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "verify", str(folder)])
    assert "whole; " in capsys.readouterr().out


@pytest.mark.parametrize("position", [0, 57, 105])
def test_a_changed_byte_is_found(folder: Path, position: int) -> None:
    path = folder / "train-00001.bin"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00001\.bin is not what was written"):
        verify_folder(folder)


def test_another_tokenizer_beside_the_shards_is_found(folder: Path) -> None:
    train_bpe(DOCUMENTS[5:], 280).save_pretrained(folder / "tokenizer")
    with pytest.raises(ValueError, match="the tokenizer is not the one that made the shards"):
        verify_folder(folder)


def test_shards_without_a_manifest_are_described_but_not_verified(tmp_path: Path, capsys, folder: Path) -> None:
    (tmp_path / "bins").mkdir()
    shards = open_shards(folder)
    shards.train.read(0, len(shards.train)).tofile(tmp_path / "bins" / "train.bin")
    main(["data", "inspect", str(tmp_path / "bins")])
    assert "no tokenizer lies beside the shards" in capsys.readouterr().out
    main(["data", "inspect", str(tmp_path / "bins"), "--tokenizer", str(folder / "tokenizer")])
    assert "documents: 45, 2 of them empty" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no manifest"):
        verify_folder(tmp_path / "bins")
