"""`minigpt bench tokenize`: all encoders give the same ids, and the report holds what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from minigpt import cli
from minigpt.benchmarks.tokenize import build_encoders, measure, take_texts
from minigpt.config.arguments import DataArguments
from minigpt.data.corpora import open_corpus
from minigpt.data.tokenizer import train_bpe


def test_every_encoder_gives_the_ids_of_the_tokenizer_and_ends_each_document() -> None:
    texts = ["one  two\n three", "", "<|endoftext|> is text here", "it's 12345 ünïcödé"] * 3
    tokenizer = train_bpe(texts, 300)
    documents = [tokenizer.encode(text, split_special_tokens=True) for text in texts]
    expected = [token for ids in documents for token in (*ids, tokenizer.eos_token_id)]
    encoders = build_encoders(tokenizer, workers=1)
    assert len(encoders) >= 2
    for name, encode in encoders.items():
        assert encode(texts).tolist() == expected, name


def test_texts_are_repeated_up_to_the_size(text_file: Path) -> None:
    corpus = open_corpus(DataArguments(train_file=[str(text_file)]))
    texts = take_texts(corpus, 50_000)
    assert 50_000 <= sum(map(len, texts)) < 50_000 + max(map(len, texts))
    assert texts[-1] == texts[0]


def test_encoder_with_other_ids_is_an_error() -> None:
    encoders = {"minigpt": lambda texts: np.array([1, 2]), "other": lambda texts: np.array([1, 3])}
    with pytest.raises(RuntimeError, match="other gave other ids than minigpt"):
        measure(encoders, ["text"], turns=1)


def test_report_compares_every_encoder_with_minigpt(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--train_file", str(text_file), "--tokenizer", "char", "--megabytes", "0.1", "--workers", "1"]
    cli.main(["bench", "tokenize", *options, "--turns", "1", "--output", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    minigpt, *baselines = report["rows"]
    assert minigpt["ratio"] == 1.0
    for row in baselines:
        assert row["ratio"] == pytest.approx(minigpt["tokens_per_s"] / row["tokens_per_s"])
    assert "tokenizers encode_batch" in capsys.readouterr().out
