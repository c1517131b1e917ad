"""What a text is like before a model is trained on it: its size, its scripts, and what tokenizers make of it."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from minigpt.config.arguments import Arguments
from minigpt.data.corpora import open_corpus
from minigpt.data.datamodule import load_data
from minigpt.data.encoding import Part, parts
from minigpt.data.tokenizer import load_tokenizer, train_bpe, train_characters
from minigpt.utils.errors import UserError

TRAIN_SAMPLE_BYTES, VALIDATION_SAMPLE_BYTES = 2_000_000, 600_000  # of text that is looked at
SEARCHED_BYTES = 200_000_000  # the training sample is spread over so much of the text
PIECE_CHARACTERS, PIECE_TOKENS = 20_000, 5_000  # a sample is made of such pieces
VOCABULARY_SIZES = (512, 1024, 2048, 4096, 8192, 16384)  # of a trained 'bpe'
VALIDATION_BYTES = 200_000  # of text to hold out, and at most a tenth of it


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer on this text."""

    size: int
    bytes_per_token: float


@dataclass(frozen=True)
class TokenizedSample:
    """Token ids, int64, of samples of both splits, and the UTF-8 bytes of these."""

    vocabulary: Vocabulary
    train: np.ndarray
    validation: np.ndarray
    train_bytes: int
    validation_bytes: int


@dataclass(frozen=True)
class TextProfile:
    """What is known of a text. `train_bytes`, of its training split, is None for a stream of unknown length.

    `scripts` are Unicode's names of the alphabets of its letters, with their shares, the most frequent first.
    `samples` are the same text in the tokens of every tokenizer that it may get, the smallest vocabulary first.
    """

    train_bytes: float | None
    scripts: dict[str, float]
    samples: Sequence[TokenizedSample]


def profile_text(args: Arguments, sizes: Sequence[int] = VOCABULARY_SIZES) -> TextProfile:
    """Look at samples of both splits of the text that `args` name, with the tokenizers that it may get.

    sizes: of a 'bpe' that is still to be trained; a text may be too short for the larger ones.
    Raises UserError on bad input.
    """
    train, validation, train_bytes, tokenizer = _text(args)
    if tokenizer is not None:
        tokenizers = [tokenizer]
    elif args.tokenizer in (None, "bpe"):
        tokenizers = list(nested_tokenizers(train_bpe(train, max(sizes)).backend_tokenizer, sizes))
    elif args.tokenizer == "char":
        tokenizers = [train_characters([*train, *validation]).backend_tokenizer]
    else:
        tokenizers = [load_tokenizer(str(args.tokenizer)).backend_tokenizer]
    return TextProfile(train_bytes, scripts(train), [tokenize(each, train, validation) for each in tokenizers])


def bpe_samples(args: Arguments, sizes: Sequence[int]) -> list[TokenizedSample]:
    """Samples of the text in vocabularies that are trained on it, whatever its tokenizer is. Raises UserError."""
    train, validation, _, _ = _text(args)
    tokenizers = nested_tokenizers(train_bpe(train, max(sizes)).backend_tokenizer, sizes)
    return [tokenize(each, train, validation) for each in tokenizers]


def validation_percentage(args: Arguments) -> float:
    """The share of the text to hold out: enough to measure on, and little of a large text."""
    if args.data or args.validation_file or not (text_bytes := open_corpus(args).text_bytes):
        return args.validation_split_percentage
    return float(f"{min(10.0, 100 * VALIDATION_BYTES / text_bytes):.2g}")


Samples = tuple[list[str], list[str], float | None, Tokenizer | None]


def _text(args: Arguments) -> Samples:
    samples = _prepared_samples(args) if args.data else _samples(args)
    if not any(samples[0]) or not any(samples[1]):
        raise UserError("the text is too short to train on one part and to validate on another; give more")
    return samples


def _samples(args: Arguments) -> Samples:
    """Pieces of the training text from all over it, pieces of the validation text, and bytes of the training text."""
    corpus = open_corpus(args)
    every = max(1, min(corpus.text_bytes or 0, SEARCHED_BYTES) // TRAIN_SAMPLE_BYTES)
    train = list(_pieces(corpus.train.pieces(), TRAIN_SAMPLE_BYTES, every))
    validation = list(_pieces(corpus.validation.pieces(), VALIDATION_SAMPLE_BYTES))
    train_bytes = float(corpus.text_bytes) if corpus.text_bytes else None
    if train_bytes and not args.validation_file:
        train_bytes *= 1 - args.validation_split_percentage / 100
    return train, validation, train_bytes, None


def _prepared_samples(args: Arguments) -> Samples:
    """The same from token shards, with their tokenizer."""
    shards, tokenizer = load_data(args)
    limits = {"train": TRAIN_SAMPLE_BYTES // 4, "validation": VALIDATION_SAMPLE_BYTES // 4}
    sampled, pieces = {}, {}
    for split, limit in limits.items():
        tokens = shards.splits[split]
        length = len(tokens) if tokens else 0
        starts = range(0, length, PIECE_TOKENS * max(1, length // limit))  # spread over the split
        ids = [tokens.read(start, min(start + PIECE_TOKENS, length)) for start in starts] if tokens else []
        sampled[split] = sum(map(len, ids))
        pieces[split] = [str(tokenizer.decode(each)) for each in ids]
    train_bytes = len(shards.train) / sampled["train"] * sum(len(piece.encode()) for piece in pieces["train"])
    return pieces["train"], pieces["validation"] or pieces["train"], train_bytes, tokenizer.backend_tokenizer


def _pieces(documents: Iterable[Part], limit_bytes: int, every: int = 1) -> Iterator[str]:
    """Every n-th piece of the documents, until `limit_bytes` are reached."""
    taken = 0
    for piece, _ in islice(parts(documents, whole=False, limit=PIECE_CHARACTERS), 0, None, every):
        yield str(piece)
        taken += len(str(piece).encode())
        if taken >= limit_bytes:
            return


def nested_tokenizers(largest: Tokenizer, sizes: Sequence[int]) -> Iterator[Tokenizer]:
    """`largest`, a trained BPE, cut to each of `sizes` that it reaches: a smaller one has the first of its merges.

    A size counts the end-of-text token, which these tokenizers lack. If it reaches no size, it is the only one.
    """
    state = json.loads(largest.to_str())
    tokens, merges = sorted(state["model"]["vocab"].items(), key=lambda item: item[1]), state["model"]["merges"]
    alphabet = len(tokens) - len(merges)
    counts = [size - alphabet - 1 for size in sizes]
    for count in [count for count in counts if count <= len(merges)] or [len(merges)]:
        model = state["model"] | {"vocab": dict(tokens[: alphabet + count]), "merges": merges[:count]}
        yield Tokenizer.from_str(json.dumps(state | {"model": model, "added_tokens": []}))


def tokenize(tokenizer: Tokenizer, train: Sequence[str], validation: Sequence[str]) -> TokenizedSample:
    """The samples in the tokens of `tokenizer`."""
    train_ids, ids = (
        np.concatenate([encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]).astype(np.int64)
        for texts in (train, validation)
    )
    size = max(len(tokenizer.get_vocab(with_added_tokens=False)) + 1, int(max(train_ids.max(), ids.max())) + 1)
    train_bytes, validation_bytes = (sum(len(text.encode()) for text in texts) for texts in (train, validation))
    return TokenizedSample(
        Vocabulary(size, validation_bytes / len(ids)), train_ids, ids, train_bytes, validation_bytes
    )


def scripts(texts: Sequence[str]) -> dict[str, float]:
    """The share of each alphabet among the letters, such as LATIN or CJK; those above one percent."""
    letters = Counter(character for text in texts for character in text if character.isalpha())
    names: Counter[str] = Counter()
    for character, count in letters.items():
        names[unicodedata.name(character, "UNKNOWN").split()[0]] += count
    total = sum(names.values())
    return {name: count / total for name, count in names.most_common() if count > 0.01 * total}
