"""Load, train and compare tokenizers.

Every tokenizer is a `transformers.PreTrainedTokenizerFast`, so whatever is saved here reloads through `AutoTokenizer`
with no code of ours.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(name_or_folder: str | Path) -> "PreTrainedTokenizerFast":
    """A tokenizer folder or Hub name. Raises UserError if there is none, or none this program can use."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = str(name_or_folder)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
            raise UserError(f"tokenizer={name}: no tokenizer.json or tokenizer_config.json in this folder")
    elif folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"tokenizer={name}: no such folder; give 'bpe', 'char', a tokenizer folder or a Hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name)
    except Exception as error:  # many kinds: no network, no such repository, damaged JSON, a missing package
        raise UserError(f"tokenizer={name}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer={name}: {type(tokenizer).__name__} has no tokenizer.json; convert it first")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer={name}: has no eos_token, which ends every document; add one and save it again")
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()) -> "PreTrainedTokenizerFast":
    """A byte-level BPE like GPT-2's: `vocab_size` ids at most, the last of them `<|endoftext|>` (bos, eos and unk).

    Before that come the `special_tokens`. Few texts may give fewer ids. Raises UserError if `vocab_size` cannot hold
    the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [token for token in dict.fromkeys(special_tokens) if token != END_OF_TEXT]
    if vocab_size < 257 + len(special):
        raise UserError(
            f"tokenizer_vocab_size={vocab_size} is below {257 + len(special)}: 256 bytes, {END_OF_TEXT} "
            f"and {len(special)} special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1 - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    return _finished(tokenizer, unk_token=END_OF_TEXT, additional_special_tokens=special)


def train_characters(texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """One id for every character of `texts` in code-point order, as in nanoGPT, then `<|endoftext|>` (bos and eos).

    There is no unknown token: a character that was not in `texts` is an error and never silently dropped.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise UserError("there are no characters to make a vocabulary of: the text is empty")
    vocabulary = {character: index for index, character in enumerate(sorted(characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _finished(tokenizer)


def _finished(tokenizer: Any, **special: Any) -> "PreTrainedTokenizerFast":
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
