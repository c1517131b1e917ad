"""Which ids stand for a text? Loading, training, comparing and applying tokenizers.

Every tokenizer is a `transformers.PreTrainedTokenizerFast`, so whatever is saved here reloads through `AutoTokenizer`
with no code of ours. Two rules hold wherever documents are encoded:

* nothing is inserted, neither beginning-of-text nor padding; who writes the shards puts one end-of-text id after a
  document;
* nothing in a document is special: the characters `<|endoftext|>` in somebody's text are encoded as ordinary text, so
  that no document can pretend to end. (A prompt for `minigpt generate` may use special tokens; a document may not.)
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(name_or_folder: str | Path) -> "PreTrainedTokenizerFast":
    """A tokenizer folder or Hub name. Raises ValueError if there is none, or none this program can use."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = str(name_or_folder)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
            raise ValueError(f"tokenizer={name}: no tokenizer.json or tokenizer_config.json in this folder")
    elif folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"tokenizer={name}: no such folder; give 'bpe', 'char', a tokenizer folder or a Hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name)
    except Exception as error:  # many kinds: no network, no such repository, damaged JSON, a missing package
        raise ValueError(f"tokenizer={name}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer={name}: {type(tokenizer).__name__} has no tokenizer.json; convert it first")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer={name}: has no eos_token, which ends every document; add one and save it again")
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE like GPT-2's: `vocab_size` ids at most, the last of them `<|endoftext|>` (bos, eos and unk).

    Few texts may give fewer ids. Raises ValueError if `vocab_size` cannot hold the 256 bytes and the end of text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"tokenizer_vocab_size={vocab_size} is below 257: 256 bytes and {END_OF_TEXT}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finished(tokenizer, unk_token=END_OF_TEXT)


def train_characters(texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """One id for every character of `texts` in code-point order, as in nanoGPT, then `<|endoftext|>` (bos and eos).

    There is no unknown token: a character that was not in `texts` is an error and never silently dropped.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise ValueError("there are no characters to make a vocabulary of: the text is empty")
    vocabulary = {character: index for index, character in enumerate(sorted(characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _finished(tokenizer)


def _finished(tokenizer: Any, **special: str) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        **special,
    )


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """One more than the largest id, so that every id is below it even when the vocabulary has holes."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: "PreTrainedTokenizerFast") -> str:
    """A hash of whatever decides which ids a text gets: equal for a tokenizer and its saved and reloaded copy."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = {key: value for key, value in state["model"].items() if value not in (None, False)}
    model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
    pre_tokenizer = re.sub(r', "trim_offsets": (true|false)', "", json.dumps(state["pre_tokenizer"]))
    added = sorted((token["id"], token["content"], token["special"]) for token in state["added_tokens"])
    decisive = [model, state["normalizer"], pre_tokenizer, added, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


class Encoder:
    """Turns texts into arrays of ids by the two rules above; the batch is spread over threads by `tokenizers`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self._vocabulary = self.backend.get_vocab()
        self._has_unknown = getattr(self.backend.model, "unk_token", None) is not None
        self._is_word_level = type(self.backend.model).__name__ == "WordLevel"

    @property
    def encodes_parts(self) -> bool:
        """Whether a text may be encoded in parts that end where a space or newline follows a letter.

        True for characters and for GPT-2's pattern, in which white space never joins what stands before it.
        """
        if self.backend.normalizer is not None:
            return False
        state = json.loads(self.backend.to_str())
        if len([token for token in state["added_tokens"] if not token["special"]]):
            return False
        pre_tokenizer = state["pre_tokenizer"] or {}
        if pre_tokenizer.get("type") == "ByteLevel":
            return bool(pre_tokenizer["use_regex"]) and not pre_tokenizer["add_prefix_space"]
        return self._is_word_level and pre_tokenizer.get("pattern") == {"Regex": r"[\s\S]"}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of every text, int64. Raises ValueError for a character the vocabulary cannot express."""
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # a bare Exception from Rust, and TypeError for a lone surrogate
            raise ValueError(self._explain(texts, error)) from error
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def _explain(self, texts: Sequence[str], error: Exception) -> str:
        for text in texts:
            surrogate = re.search(r"[\ud800-\udfff]", text)
            if surrogate:
                return f"the text holds half a surrogate pair (U+{ord(surrogate[0]):04X}), which is not a character"
            if self._is_word_level and not self._has_unknown:
                for character in text:
                    if character not in self._vocabulary:
                        return (
                            f"the character {character!r} (U+{ord(character):04X}) is not in the tokenizer's "
                            "vocabulary; train it on this text too, or use 'bpe', which knows every character"
                        )
        return f"the tokenizer failed: {error}"


def parts(texts: Iterable[tuple[str, bool]], whole: bool, limit: int = 1 << 20) -> Iterator[tuple[str, bool]]:
    """Regroup (text, ends a document) so that the parts of a document may be encoded one by one.

    With `whole`, a document becomes one part. Else it is cut before a space or newline that follows a letter, a digit
    or _, near every `limit` characters. Where the cuts fall does not depend on how the input was divided.
    """
    buffer = ""
    for text, ends in texts:
        buffer += text
        while not whole and len(buffer) > limit:
            cut = _SAFE_CUT.search(buffer, limit - 1)
            if cut is None:
                break
            yield buffer[: cut.end()], False
            buffer = buffer[cut.end() :]
        if ends:
            yield buffer, True
            buffer = ""
    if buffer:
        yield buffer, True


_SAFE_CUT = re.compile(r"\w(?=[ \n])")
