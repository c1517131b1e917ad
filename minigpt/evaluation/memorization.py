"""How much of its training text a model recites.

Two measures. Of texts that the model writes freely: the share of their tokens that lie in copies of the training text,
by the length of the copy. And of prompts from the training text: how often greedy decoding continues them with exactly
the tokens that follow there, next to prompts from the validation text, which it has not seen (Carlini et al. 2023,
Quantifying Memorization Across Neural Language Models).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minigpt.data.copy_index import CopyIndex
from minigpt.data.shards import Tokens
from minigpt.generation.sampling import Sampling, complete, context_length, decode, prompt_ids
from minigpt.utils.errors import UserError

COPY_LENGTHS = (20, 50, 100)  # tokens
SOURCE_TOKENS = 16  # shown of the beginning of a document
WORST = 5
PROMPTS_AT_ONCE = 32
TRIES = 100  # to find a prompt inside a document, for each prompt


@dataclass(frozen=True)
class Copy:
    """A part of a text that is in the training text, there `occurrences` times.

    `start` is its first token in the text. `source` is the beginning of `document`, one of those that have it.
    """

    tokens: int
    text: str
    document: int
    source: str
    occurrences: int
    start: int
    sample: int


@dataclass(frozen=True)
class Memorization:
    """The report. `shares`: of the sampled tokens, those in copies of at least so many tokens.

    `train_continued` and `validation_continued`: the shares of prompts that were continued exactly, for as many tokens
    as they have; None if no document is long enough.
    """

    samples: int
    tokens: int
    shares: dict[int, float]
    worst: list[Copy]
    prompts: int
    prompt_tokens: int
    train_continued: float | None
    validation_continued: float | None

    def as_dict(self) -> dict[str, Any]:
        """The report, with the metrics of the model card under their names there."""
        metrics = {f"memorization/copied_{length}": share for length, share in self.shares.items()}
        for split in ("train", "validation"):
            if (continued := getattr(self, f"{split}_continued")) is not None:
                metrics[f"memorization/{split}_continued"] = continued
        return metrics | asdict(self)

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [f"{self.samples:,} texts of the model, {self.tokens:,} tokens"]
        lines += [
            f"  {share:6.1%} of the tokens lie in copies of {least} or more training tokens"
            for least, share in self.shares.items()
        ]
        asked = f"prompts of {self.prompt_tokens} tokens are continued with exactly the next {self.prompt_tokens}"
        for split in ("train", "validation"):
            continued = getattr(self, f"{split}_continued")
            if continued is not None:
                lines.append(f"  {continued:6.1%} of the {split} {asked}")
        for copy in self.worst:
            lines += [
                "",
                f"{copy.tokens} tokens in text {copy.sample}, from document {copy.document} ({copy.source!r} …), "
                f"{times(copy.occurrences)} in the training text:",
                *(f"  | {line}" for line in copy.text.splitlines()),
            ]
        return lines


Found = tuple[np.ndarray, np.ndarray]  # lengths of copies and their positions in the training text: int64 [tokens]


def copied(index: CopyIndex, ids: Sequence[int], end_of_text: int, before: Found | None = None) -> Found:
    """The longest copy that starts at each place, and its position; no copy goes beyond the end of a document.

    `before` is the result for the beginning of `ids`: only what more tokens can make longer is searched again.
    """
    array = np.array(ids, dtype=np.int64)
    lengths, positions = np.zeros(len(array), dtype=np.int64), np.zeros(len(array), dtype=np.int64)
    start = 0
    if before is not None:
        known = len(before[0])
        start = next(iter(np.flatnonzero(np.arange(known) + before[0] >= known).tolist()), known)
        lengths[:start], positions[:start] = before[0][:start], before[1][:start]
    for end in [*(start + np.flatnonzero(array[start:] == end_of_text)).tolist(), len(array)]:
        lengths[start:end], positions[start:end] = index.longest_copies(array[start:end])
        start = end + 1
    return lengths, positions


def describe_copies(
    index: CopyIndex,
    train: Tokens,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    found: Found,
    least: int = COPY_LENGTHS[0],
    sample: int = 0,
) -> list[Copy]:
    """The copies of at least `least` tokens in a text, in order, with their sources."""
    lengths, positions = found
    copies = []
    for start in spans(lengths, least):
        part = list(ids[start : start + int(lengths[start])])
        document, first = index.document_of(int(positions[start]))
        source = decode(tokenizer, train.read(first, min(first + SOURCE_TOKENS, len(train))).tolist())
        occurrences = index.occurrences(np.array(part))
        copies.append(Copy(len(part), decode(tokenizer, part), document, source, occurrences, start, sample))
    return copies


def times(count: int) -> str:
    """How often, in words."""
    return "once" if count == 1 else f"{count:,} times"


def tokens_in_copies(lengths: np.ndarray, least: int) -> np.ndarray:
    """Which tokens lie in a copy of at least `least` tokens: bool [tokens]."""
    ends = np.where(lengths >= least, np.arange(len(lengths)) + lengths, 0)
    return np.maximum.accumulate(ends) > np.arange(len(lengths)) if len(lengths) else np.zeros(0, dtype=bool)


def spans(lengths: np.ndarray, least: int) -> list[int]:
    """The starts of the copies of at least `least` tokens that are not inside another one."""
    starts, reach = [], 0
    for place, length in enumerate(lengths.tolist()):
        if length >= least and place + length > reach:
            starts.append(place)
            reach = place + length
    return starts


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    index: CopyIndex,
    train: Tokens,
    validation: Tokens | None,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    prompts: int,
    prompt_tokens: int | None,
    seed: int,
) -> Memorization:
    """Sample from the model and compare with the text that it was trained on.

    prompt_tokens: of the prompts, and of their continuations; None is 50, or half of the context if that is less.
    Raises UserError if prompt and continuation do not fit into the context.
    """
    end_of_text = int(tokenizer.eos_token_id)
    limit = context_length(model)
    length = prompt_tokens or min(50, (limit or 100) // 2)
    if limit is not None and 2 * length > limit:
        raise UserError(f"prompt_tokens={length} and as many to continue are more than the context of {limit} tokens")
    sampling = Sampling(max_new_tokens, temperature, None, None, samples)
    begin = prompt_ids(model, tokenizer, "")
    texts = [completion.token_ids for completion in complete(model, tokenizer, begin, sampling, seed)]
    total = sum(map(len, texts))
    in_copies = dict.fromkeys(COPY_LENGTHS, 0)
    copies: list[Copy] = []
    for number, ids in enumerate(texts):
        lengths, positions = copied(index, ids, end_of_text)
        for least in COPY_LENGTHS:
            in_copies[least] += int(tokens_in_copies(lengths, least).sum())
        copies += describe_copies(index, train, tokenizer, ids, (lengths, positions), sample=number)
    continued = {
        split: share_continued(model, tokens, end_of_text, prompts, length, seed) if tokens is not None else None
        for split, tokens in (("train", train), ("validation", validation))
    }
    return Memorization(
        samples=samples,
        tokens=total,
        shares={least: count / max(1, total) for least, count in in_copies.items()},
        worst=sorted(copies, key=lambda copy: -copy.tokens)[:WORST],
        prompts=prompts,
        prompt_tokens=length,
        train_continued=continued["train"],
        validation_continued=continued["validation"],
    )


@torch.inference_mode()
def share_continued(
    model: PreTrainedModel,
    tokens: Tokens,
    end_of_text: int,
    prompts: int,
    length: int,
    seed: int,
    batch_size: int = 32,
) -> float | None:
    """The share of `prompts` places of a text from which greedy decoding writes the next `length` tokens exactly.

    Prompts have `length` tokens, and lie inside a document with what follows them. None if no such place was found.
    """
    generator = np.random.default_rng(seed)
    rows: list[np.ndarray] = []
    for _ in range(TRIES * prompts):
        if len(tokens) <= 2 * length or len(rows) == prompts:
            break
        start = int(generator.integers(len(tokens) - 2 * length))
        row = tokens.read(start, start + 2 * length).astype(np.int64)
        if not (row == end_of_text).any():
            rows.append(row)
    if not rows:
        return None
    table = torch.from_numpy(np.stack(rows)).to(model.device)
    exact = 0
    writer: Any = model
    for batch in table.split(PROMPTS_AT_ONCE):
        written = writer.generate(
            batch[:, :length],
            attention_mask=torch.ones_like(batch[:, :length]),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=end_of_text,
        )
        exact += int((written == batch).all(dim=1).sum())
    return exact / len(rows)
