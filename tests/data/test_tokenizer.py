"""Laws of tokenizers: training is deterministic, and a saved and reloaded tokenizer is the same tokenizer."""

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from minigpt.data.tokenizer import load_tokenizer, tokenizer_hash, train_bpe, train_characters, vocabulary_size

TEXT = "The king said: it's 1597, isn't it?\n\n  The queen laughed — “no”, she said;\tnaïve, 你好 🙂.\r\n" * 20


@pytest.fixture(scope="module", params=["bpe", "char"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param == "bpe":
        return train_bpe([TEXT], 400)
    return train_characters([TEXT])


def test_the_last_id_is_the_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == vocabulary_size(tokenizer) - 1


def test_training_is_deterministic_across_processes(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8", newline="")
    code = (
        "import sys; from pathlib import Path; from minigpt.data.tokenizer import *;"
        "print(tokenizer_hash(train_bpe([Path(sys.argv[1]).read_bytes().decode()], 400)))"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "text"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == tokenizer_hash(train_bpe([TEXT], 400))


def test_a_saved_tokenizer_is_loaded_without_code_of_minigpt(
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
    assert run.stdout.strip() == str(tokenizer(TEXT)["input_ids"])


def test_only_the_saved_copy_of_a_tokenizer_has_the_same_hash(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    reloaded = load_tokenizer(tmp_path)
    reloaded("some text", truncation=True, max_length=3, padding="max_length") if reloaded.pad_token else None
    assert tokenizer_hash(reloaded) == tokenizer_hash(tokenizer)
    assert tokenizer_hash(tokenizer) != tokenizer_hash(train_bpe([TEXT[:100]], 300))


def test_character_ids_are_in_code_point_order_as_in_nanogpt() -> None:
    tokenizer = train_characters(["hello world\n"])
    characters = sorted(set("hello world\n"))
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(characters))] == characters


def test_special_tokens_come_just_before_the_end_of_text(tmp_path: Path) -> None:
    train_bpe([TEXT], 400, ["<|user|>", "<|assistant|>"]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    size = vocabulary_size(tokenizer)
    assert tokenizer("<|user|><|assistant|><|endoftext|>")["input_ids"] == [size - 3, size - 2, size - 1]
    assert tokenizer.eos_token_id == size - 1 < 400


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
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
