"""Load, train and compare tokenizers.

Every tokenizer is a `transformers.PreTrainedTokenizerFast`. What it saves is loaded by `AutoTokenizer`, without any
code of MiniGPT.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from minigpt.utils.errors import UserError
from minigpt.utils.hub_names import refuse_missing_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


@overload
def load_tokenizer(
    name_or_folder: str | Path, *, trust_remote_code: bool = False, require_eos: bool = True
) -> "PreTrainedTokenizerFast": ...
@overload
def load_tokenizer(
    name_or_folder: str | Path, *, trust_remote_code: bool = False, require_eos: bool = True, require_fast: bool
) -> "PreTrainedTokenizerBase": ...
def load_tokenizer(
    name_or_folder: str | Path,
    *,
    trust_remote_code: bool = False,
    require_eos: bool = True,
    require_fast: bool = True,
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder or Hub name.

    `require_eos`: it must have an end-of-text token, which preparing data needs. `require_fast`: it must be backed by
    the tokenizers library, which encoding with several processes needs. Generation needs neither.
    Raises UserError if there is no tokenizer, it cannot be loaded, or it is not as required.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = str(name_or_folder)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not has_tokenizer(folder):
            raise UserError(f"tokenizer={name}: no tokenizer.json or tokenizer_config.json in this folder")
    elif folder.exists():
        raise UserError(f"tokenizer={name} is a file; give the folder that it is in")
    refuse_missing_folder("tokenizer", name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else name, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # many kinds: no network, no such repository, damaged JSON, a missing package
        raise UserError(f"tokenizer={name}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if require_fast and not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer={name}: {type(tokenizer).__name__} has no tokenizer.json; convert it first")
    if require_eos and tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer={name}: has no eos_token, which ends every document; add one and save it again")
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file of a tokenizer; old models have only vocab.json or tokenizer.model."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    return any((folder / file).is_file() for file in files)


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE like GPT-2's with at most `vocab_size` ids; a small amount of text may give fewer.

    The last id is `<|endoftext|>`, which is the bos, eos and unk token. The `special_tokens` come just before it.
    Raises UserError if `vocab_size` is too small for the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [token for token in dict.fromkeys(special_tokens) if token != END_OF_TEXT]
    if vocab_size < 257 + len(special):
        raise UserError(
            f"tokenizer_vocab_size={vocab_size} is below {257 + len(special)}: 256 bytes, {END_OF_TEXT} "
            f"and {len(special)} special tokens need that many"
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
    return _wrap(tokenizer, unk_token=END_OF_TEXT, additional_special_tokens=special)


def train_characters(texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """A tokenizer with one id per character of `texts`, in code-point order as in nanoGPT, then `<|endoftext|>`.

    `<|endoftext|>` is the bos and eos token. There is no unknown token: encoding a character that does not
    occur in `texts` is an error, and the character is never dropped silently. Raises UserError if `texts` are empty.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise UserError("cannot make a vocabulary of characters: the text is empty")
    vocabulary = {character: index for index, character in enumerate(sorted(characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def _wrap(tokenizer: "Tokenizer", **special_tokens: Any) -> "PreTrainedTokenizerFast":
    """`tokenizer` as transformers uses it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The largest id plus one. Every id is below it, even if the ids of the vocabulary are not consecutive."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: "PreTrainedTokenizerFast", below: int | None = None) -> str:
    """A SHA-256 of everything that decides the ids of a text. A saved and reloaded tokenizer has the same hash.

    With `below`, added tokens from this id on are ignored, such as those of a chat template.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = {key: value for key, value in state["model"].items() if value not in (None, False)}
    model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    pre_tokenizer = re.sub(r', "trim_offsets": (true|false)', "", json.dumps(state["pre_tokenizer"]))
    added_tokens = [token for token in state["added_tokens"] if below is None or token["id"] < below]
    added = sorted((token["id"], token["content"], token["special"]) for token in added_tokens)
    decisive = [model, state["normalizer"], pre_tokenizer, added, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
