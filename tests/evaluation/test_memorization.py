"""Laws of `minigpt memorization`: every planted copy is found with its document, and nothing that is none."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minigpt.cli import main
from minigpt.data.copy_index import build_copy_index
from minigpt.data.shards import Shard, Tokens
from minigpt.evaluation import memorization
from minigpt.evaluation.memorization import copied, measure, share_continued, spans, tokens_in_copies
from support.tiny import byte_tokenizer

END, VOCABULARY = 0, 250
PASSAGES = [20, 21, 35, 50, 64, 99, 100, 150, 200]  # tokens


def tokens_of(path: Path, ids: np.ndarray) -> Tokens:
    ids.astype("<u2").tofile(path)
    return Tokens([Shard(path, len(ids))], np.dtype("<u2"))


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Tokens, list[np.ndarray]]:
    """Fifty documents of random tokens, and passages of them, each from another document."""
    generator = np.random.default_rng(0)
    documents = [np.append(generator.integers(1, VOCABULARY, 400), END) for _ in range(50)]
    passages = [documents[5 * number][37 : 37 + length] for number, length in enumerate(PASSAGES)]
    return tokens_of(tmp_path / "train.bin", np.concatenate(documents)), passages


def test_every_planted_copy_is_found_and_nothing_else(
    corpus: tuple[Tokens, list[np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, passages = corpus
    index = build_copy_index(train, END, tmp_path / "index")
    generator = np.random.default_rng(1)
    texts, is_copied = [], []
    for passage in passages:
        before, after = (generator.integers(1, VOCABULARY, 30) for _ in range(2))
        texts.append(np.concatenate([before, passage, after]))
        is_copied.append(np.concatenate([np.zeros(30), np.ones(len(passage)), np.zeros(30)]).astype(bool))
    texts.append(np.concatenate([passages[2][:15], [END], passages[2][15:]]))  # two short copies, not a long one
    is_copied.append(np.concatenate([np.zeros(16), np.ones(20)]).astype(bool))
    for ids, expected in zip(texts, is_copied, strict=True):
        lengths, _ = copied(index, ids, END)
        assert np.array_equal(tokens_in_copies(lengths, 20), expected)

    completions = [SimpleNamespace(token_ids=ids.tolist()) for ids in texts]
    monkeypatch.setattr(memorization, "complete", lambda *_: completions)
    monkeypatch.setattr(memorization, "share_continued", lambda *_: None)
    model: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=128))
    options = {"max_new_tokens": 300, "temperature": 1.0, "prompts": 3, "prompt_tokens": None, "seed": 0}
    report = measure(model, byte_tokenizer(eos_token="<|endoftext|>"), index, train, None, samples=10, **options)
    total = sum(map(len, texts))
    for least in (20, 50, 100):
        expected_share = sum(length for length in [*PASSAGES, 20] if length >= least) / total
        assert report.shares[least] == pytest.approx(expected_share)
    assert [copy.tokens for copy in report.worst] == sorted(PASSAGES, reverse=True)[:5]
    assert [copy.document for copy in report.worst] == [5 * PASSAGES.index(copy.tokens) for copy in report.worst]


def test_copies_inside_other_copies_are_not_listed() -> None:
    assert spans(np.array([0, 30, 29, 28, *range(27, 0, -1), 0, 25, 24]), 20) == [1, 32]
    assert spans(np.array([25, 24, 40, 39]), 20) == [0, 2]  # the second one overlaps the first and goes on
    assert tokens_in_copies(np.array([], dtype=np.int64), 20).tolist() == []


class Reciter:
    """Continues what is in a text with what follows there, and anything else with zeros."""

    device = torch.device("cpu")

    def __init__(self, text: np.ndarray) -> None:
        self.text = text

    def generate(self, prompts: torch.Tensor, max_new_tokens: int, **options: Any) -> torch.Tensor:
        return torch.stack([torch.cat([row, self.follow(row, max_new_tokens)]) for row in prompts])

    def follow(self, prompt: torch.Tensor, count: int) -> torch.Tensor:
        windows = np.lib.stride_tricks.sliding_window_view(self.text, len(prompt) + count)
        hits = np.flatnonzero((windows[:, : len(prompt)] == prompt.numpy()).all(axis=1))
        return torch.from_numpy(windows[hits[0]][len(prompt) :].copy()) if len(hits) else torch.ones(count).long()


def test_prompts_that_are_continued_exactly_are_counted(
    corpus: tuple[Tokens, list[np.ndarray]], tmp_path: Path
) -> None:
    train, _ = corpus
    text = train.read(0, len(train)).astype(np.int64)
    unseen = tokens_of(tmp_path / "validation.bin", np.random.default_rng(2).integers(1, VOCABULARY, 2000))
    half = Reciter(text[: len(text) // 2])
    assert share_continued(Reciter(text), train, END, 40, 10, 0) == 1.0  # type: ignore[arg-type]
    assert share_continued(Reciter(text), unseen, END, 40, 10, 0) == 0.0  # type: ignore[arg-type]
    assert 0.3 < (share_continued(half, train, END, 100, 10, 0) or 0) < 0.7  # type: ignore[arg-type]
    assert share_continued(Reciter(text), train, END, 40, 300, 0) is None  # type: ignore[arg-type]


@pytest.fixture
def run_dir(tiny_run: list[str], train_here: Any, tmp_path: Path) -> Path:
    assert train_here(tiny_run) == 0
    return tmp_path / "run"


def test_the_command_reports_and_the_card_has_the_figures(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run_dir / "evaluations" / "memorization.json"
    words = ["memorization", "--model", str(run_dir), "--samples", "3", "--max_new_tokens", "20", "--prompts", "4"]
    main([*words, "--output", str(output)])
    printed = capsys.readouterr().out
    assert "3 texts of the model" in printed
    assert "of the validation prompts of 8 tokens are continued with exactly the next 8" in printed
    report = json.loads(output.read_text())
    assert 0 <= report["memorization/copied_20"] <= 1
    assert report["prompt_tokens"] == 8

    from minigpt.hub.model_card import write_card

    write_card(run_dir)
    card = (run_dir / "README.md").read_text()
    assert "| Share of training prompts continued verbatim" in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt_tokens", "100"], "prompt_tokens=100 and as many to continue are more than the context"),
        (["--samples", "0"], "samples=0"),
        (["--temperature", "-1"], "temperature=-1.0 must be at least 0"),
    ],
)
def test_impossible_options_are_one_line(
    run_dir: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["memorization", "--model", str(run_dir), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
