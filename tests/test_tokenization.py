"""Laws of tokenizers: text survives, nothing in a document is special, and a saved tokenizer is the same tokenizer."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from minigpt.tokenization import (
    Encoder,
    load_tokenizer,
    parts,
    tokenizer_hash,
    train_bpe,
    train_characters,
    vocabulary_size,
)

TEXT = "The king said: it's 1597, isn't it?\n\n  The queen laughed — “no”, she said;\tnaïve, 你好 🙂.\r\n" * 20
HOSTILE = [
    "",
    " ",
    "\n\n",
    "\0",
    "a\0b",
    "<|endoftext|>",
    "x" * 10_000,
    "".join(map(chr, range(1, 0x300))),
    "🙂\u200d🙂",
]


@pytest.fixture(scope="module", params=["bpe", "char"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param == "bpe":
        return train_bpe([TEXT], 400)
    return train_characters([TEXT, *HOSTILE])


def test_every_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [TEXT, *HOSTILE]
    for text, ids in zip(texts, Encoder(tokenizer).encode(texts), strict=True):
        assert tokenizer.decode(ids) == text


def test_nothing_in_a_document_is_special(tokenizer: PreTrainedTokenizerFast) -> None:
    (ids,) = Encoder(tokenizer).encode(["a<|endoftext|>b"])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer("a<|endoftext|>b")["input_ids"].count(tokenizer.eos_token_id) == 1  # in a prompt it is


def test_nothing_is_inserted(tokenizer: PreTrainedTokenizerFast) -> None:
    empty, one = Encoder(tokenizer).encode(["", "a"])
    assert (len(empty), len(one)) == (0, 1)


def test_the_last_id_is_the_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == vocabulary_size(tokenizer) - 1


def test_training_is_deterministic_across_processes(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8", newline="")
    code = (
        "import sys; from pathlib import Path; from minigpt.tokenization import *;"
        "print(tokenizer_hash(train_bpe([Path(sys.argv[1]).read_bytes().decode()], 400)))"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "text"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == tokenizer_hash(train_bpe([TEXT], 400))


def test_a_saved_tokenizer_reloads_in_a_process_without_our_code(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "text").write_bytes(TEXT.encode())
    code = (
        "import sys; from pathlib import Path; from transformers import AutoTokenizer;"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); text = Path(sys.argv[2]).read_bytes().decode();"
        "ids = t(text)['input_ids']; assert t.decode(ids) == text and 'minigpt' not in sys.modules; print(ids)"
    )
    command = [sys.executable, "-I", "-c", code, tmp_path / "saved", tmp_path / "text"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.strip() == str(Encoder(tokenizer).encode([TEXT])[0].tolist())


def test_the_hash_is_that_of_the_saved_copy_and_of_no_other_tokenizer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    reloaded = load_tokenizer(tmp_path)
    reloaded("some text", truncation=True, max_length=3, padding="max_length") if reloaded.pad_token else None
    assert tokenizer_hash(reloaded) == tokenizer_hash(tokenizer)
    assert tokenizer_hash(tokenizer) != tokenizer_hash(train_bpe([TEXT[:100]], 300))


def test_a_character_ids_are_nanogpts() -> None:
    tokenizer = train_characters(["hello world\n"])
    characters = sorted(set("hello world\n"))
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(characters))] == characters


def test_an_unknown_character_is_named_and_not_dropped() -> None:
    with pytest.raises(ValueError, match=r"the character 'é' \(U\+00E9\) is not in"):
        Encoder(train_characters(["abc"])).encode(["abc", "abéc"])


def test_a_lone_surrogate_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"half a surrogate pair \(U\+D83D\)"):
        Encoder(tokenizer).encode(["fine", "broken \ud83d"])


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_document_encoded_in_parts_has_the_ids_of_the_whole(tokenizer: PreTrainedTokenizerFast, step: int) -> None:
    encoder = Encoder(tokenizer)
    assert encoder.encodes_parts
    pieces = [(TEXT[i : i + step], False) for i in range(0, len(TEXT), step)] + [("", True)]
    cut = list(parts(pieces, whole=False, limit=10))
    assert len(cut) > 50
    assert [ends for _, ends in cut] == [False] * (len(cut) - 1) + [True]
    assert cut == list(parts([(TEXT, True)], whole=False, limit=10))
    assert np.array_equal(np.concatenate(encoder.encode([text for text, _ in cut])), encoder.encode([TEXT])[0])
    assert list(parts(pieces, whole=True, limit=10)) == [(TEXT, True)]


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer_vocab_size=256 is below 257"):
        train_bpe(["text"], 256)
    with pytest.raises(ValueError, match="the text is empty"):
        train_characters([""])


def test_a_missing_or_unusable_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))).save_pretrained(tmp_path / "t")
    with pytest.raises(ValueError, match="has no eos_token"):
        load_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_tokenizer(tmp_path / "t")
    assert "\n" not in str(caught.value)
