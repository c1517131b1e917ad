"""Laws of the playground's marks: they are the copies of `minigpt memorization`, also while a text grows."""

import html
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minigpt.data.copy_index import build_copy_index, building_bytes
from minigpt.data.run_data import find_run_data
from minigpt.data.shards import Shard, Tokens
from minigpt.data.tokenizer import load_tokenizer
from minigpt.evaluation.memorization import Copy, copied, describe_copies
from minigpt.playground.copies import LEAST, CopyMarker, MarkedText
from minigpt.utils.errors import UserError
from support.tiny import byte_tokenizer

END = 0
UNSEEN = 256  # an id that is not in the training text


@pytest.fixture
def marker(tmp_path: Path) -> Any:
    """What `MarkedText` needs of a marker: an index of forty documents of random bytes."""
    random = np.random.default_rng(0)
    ids = np.concatenate([np.append(random.integers(1, UNSEEN, 300), END) for _ in range(40)])
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    train = Tokens([Shard(tmp_path / "train.bin", len(ids))], np.dtype("<u2"))
    index = build_copy_index(train, END, tmp_path / "index")
    return SimpleNamespace(index=index, train=train, tokenizer=byte_tokenizer(eos_token="<|endoftext|>"))


def of_whole_text(marker: Any, ids: list[int]) -> list[Copy]:
    """The copies as `minigpt memorization` finds them."""
    return describe_copies(marker.index, marker.train, marker.tokenizer, ids, copied(marker.index, ids, END))


def text_with_copies(marker: Any, random: np.random.Generator) -> list[int]:
    """Copies of 5 to 60 tokens, some next to each other or around an end of text, and tokens of no training text."""
    parts: list[Any] = []
    for length in random.integers(5, 61, 8):
        start = int(random.integers(len(marker.train) - length))
        parts.append(marker.train.read(start, start + int(length)).tolist())
        parts.append([UNSEEN] * int(random.integers(0, 4)))
    return [int(token) for part in parts for token in part]


@pytest.mark.parametrize("seed", range(4))
def test_marks_of_a_growing_text_are_always_those_of_the_memorization_report(marker: Any, seed: int) -> None:
    random = np.random.default_rng(seed)
    ids = text_with_copies(marker, random)
    growing, length = MarkedText(marker), 0
    while length < len(ids):
        length += int(random.integers(1, 7))
        assert growing.copies(ids[:length]) == of_whole_text(marker, ids[:length])
    assert growing.copies(ids)
    assert all(copy.tokens >= LEAST for copy in growing.copies(ids))
    growing.copies([*ids, END])
    assert growing.copies(ids) == of_whole_text(marker, ids)  # the page drops the end of text


def test_nothing_is_marked_in_a_text_that_is_not_in_the_data(marker: Any) -> None:
    random = np.random.default_rng(5)
    strange, shuffled = [UNSEEN] * 100, random.integers(1, UNSEEN, 400).tolist()
    for ids in ([], [END], strange, shuffled):
        page = MarkedText(marker).html(ids)
        assert "<mark" not in page
        assert not of_whole_text(marker, ids)


def test_the_page_shows_the_text_unchanged_and_marks_its_copies_with_their_sources(marker: Any) -> None:
    tokenizer = marker.tokenizer
    ids = tokenizer("<b> & \N{LATIN SMALL LETTER E WITH ACUTE}, 'then' ")["input_ids"]
    # letters only, since other bytes are no characters
    letters = np.array(tokenizer("abcdefghijklmnopqrstuvwxyz<&>")["input_ids"])
    random = np.random.default_rng(0)
    training = letters[random.integers(0, len(letters), 500)]
    passage = training[100:140].tolist()
    training[200:240] = passage
    training.astype("<u2").tofile(marker.train.shards[0].path.with_name("letters.bin"))
    marker.train = Tokens([Shard(marker.train.shards[0].path.with_name("letters.bin"), 500)], np.dtype("<u2"))
    marker.index = build_copy_index(marker.train, END, marker.train.shards[0].path.with_name("letters"))
    page = MarkedText(marker).html([END, *ids, *passage, *ids])
    (shown,) = re.findall('<div class="marked">(.*)</div>', page, re.DOTALL)
    (sources,) = re.findall('<ul class="copies">(.*)</ul>', page, re.DOTALL)
    assert html.unescape(re.sub("</?mark.*?>", "", shown)) == tokenizer.decode([*ids, *passage, *ids])
    assert [html.unescape(mark) for mark in re.findall("<mark .*?>(.*?)</mark>", shown)] == [tokenizer.decode(passage)]
    assert "40 tokens, 2 times in the training text, from document 0" in sources
    assert html.escape(tokenizer.decode(training[:16].tolist())) in sources


@pytest.fixture
def run_dir(tiny_run: list[str], train_here: Callable[[list[str]], int], tmp_path: Path) -> Path:
    assert train_here([*tiny_run, "--cache_dir", str(tmp_path / "cache")]) == 0
    return tmp_path / "run"


def test_the_data_of_a_run_is_known_by_its_fingerprint_and_the_index_is_built_once(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(run_dir)
    shards, _ = find_run_data(run_dir)
    checkpoint = next(run_dir.glob("checkpoint-*"))
    assert find_run_data(checkpoint)[0].fingerprint == shards.fingerprint
    marker = CopyMarker(run_dir, tokenizer)
    assert f"an index of {len(shards.train):,} tokens" in marker.cost
    ids = shards.train.read(7, 7 + 30).tolist()
    for _ in marker.build():
        pass
    (copy,) = MarkedText(marker).copies(ids)
    assert copy.tokens == 30
    assert not marker.cost
    monkeypatch.setattr("minigpt.data.copy_index._write", lambda *_: pytest.fail("built again"))
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)  # is not needed any more
    again = CopyMarker(run_dir, tokenizer)
    list(again.build())
    assert MarkedText(again).copies(ids) == [copy]

    for manifest in (run_dir.parent / "cache").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(UserError, match="the text that run was trained on is not in "):
        CopyMarker(run_dir, tokenizer)


def test_an_index_that_does_not_fit_into_memory_is_one_line_and_the_next_visitor_may_try_again(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = CopyMarker(run_dir, load_tokenizer(run_dir))
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.data.copy_index.free_memory", lambda: building_bytes(marker.train) - 1)
        with pytest.raises(UserError, match=r"of memory while it is built, but .* are free"):
            list(marker.build())
    list(marker.build())
    assert marker.index is not None


def test_a_run_of_another_version_is_one_line(run_dir: Path) -> None:
    with (run_dir / "arguments.yaml").open("a") as options:
        options.write("an_option_of_tomorrow: 3\n")
    with pytest.raises(UserError, match=r"arguments.yaml is not of this version"):
        CopyMarker(run_dir, load_tokenizer(run_dir))


def test_without_the_library_one_line_names_it(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape('pip install "minigpt-lm[memorization]"')):
        CopyMarker(run_dir, load_tokenizer(run_dir))
