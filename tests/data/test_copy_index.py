"""Laws of the index of copies: every length is that of the longest copy, found one by one."""

from pathlib import Path

import numpy as np
import pytest

from minigpt.data.copy_index import LONGEST, build_copy_index
from minigpt.data.shards import Shard, Tokens

END = 0


def tokens_of(folder: Path, ids: np.ndarray, dtype: str) -> Tokens:
    """The ids in two shards."""
    shards = []
    for name, part in (("a", ids[: len(ids) // 3]), ("b", ids[len(ids) // 3 :])):
        part.astype(dtype).tofile(folder / f"{name}.bin")
        shards.append(Shard(folder / f"{name}.bin", len(part)))
    return Tokens(shards, np.dtype(dtype))


def longest_copy(text: list[int], query: list[int]) -> int:
    """The longest beginning of `query` that is in `text`, by comparing at every position."""
    best = 0
    for start in range(len(text)):
        length = 0
        while length < len(query) and start + length < len(text) and text[start + length] == query[length]:
            length += 1
        best = max(best, length)
    return best


@pytest.mark.parametrize(("dtype", "largest"), [("<u2", 3), ("<u2", 300), ("<u2", 65_535), ("<u4", 70_000)])
def test_lengths_are_those_of_the_longest_copies_and_positions_are_theirs(
    tmp_path: Path, dtype: str, largest: int
) -> None:
    generator = np.random.default_rng(0)
    text = generator.integers(1, largest + 1, 400)
    text[200:230] = text[50:80]
    text[[70, 150, 399]] = END
    index = build_copy_index(tokens_of(tmp_path, text, dtype), END, tmp_path / "index")
    pieces = [text[60:69], generator.integers(1, largest + 1, 12), text[205:240], text[380:399], [largest] * 3]
    query = np.concatenate(pieces)
    lengths, positions = index.longest_copies(query)
    for place in range(len(query)):
        rest = query[place:].tolist()
        assert lengths[place] == longest_copy(text.tolist(), rest)
        found = text[positions[place] : positions[place] + lengths[place]].tolist()
        assert found == rest[: lengths[place]]


def test_the_document_of_a_position_is_known(tmp_path: Path) -> None:
    text = np.array([5, 6, END, 7, END, 8, 9, 9])
    index = build_copy_index(tokens_of(tmp_path, text, "<u2"), END, tmp_path / "index")
    assert [index.document_of(position) for position in range(8)] == [(0, 0)] * 3 + [(1, 3)] * 2 + [(2, 5)] * 3


def test_a_copy_that_is_longer_than_the_limit_is_found_up_to_it(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(1, 50, 3 * LONGEST)
    index = build_copy_index(tokens_of(tmp_path, text, "<u2"), END, tmp_path / "index")
    lengths, positions = index.longest_copies(text[7 : 7 + LONGEST + 100])
    assert (lengths[0], positions[0]) == (LONGEST, 7)
    assert lengths[150] == LONGEST - 50


def test_an_index_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = np.random.default_rng(0).integers(1, 50, 100)
    build_copy_index(tokens_of(tmp_path, text, "<u2"), END, tmp_path / "index")
    monkeypatch.setattr("minigpt.data.copy_index._write", lambda *_: pytest.fail("built again"))
    again = build_copy_index(tokens_of(tmp_path, text, "<u2"), END, tmp_path / "index")
    assert again.longest_copies(text[:20])[0][0] == 20
