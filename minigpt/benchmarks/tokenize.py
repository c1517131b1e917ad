"""Compare the tokenizing speed of `minigpt prepare` with tokenizers and tiktoken."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from minigpt.data.corpora import Corpus
from minigpt.data.encoding import EncoderSpec, batches, encode_all, parts
from minigpt.data.fast_encoders import FastBPE
from minigpt.data.shards import smallest_dtype
from minigpt.data.tokenizer import vocabulary_size
from minigpt.utils.errors import UserError
from minigpt.utils.formatting import markdown_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Encode = Callable[[Sequence[str]], np.ndarray]  # documents → their ids, an end-of-text id after each

# GPT-2's pattern as tiktoken writes it
TIKTOKEN_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GROUP = 1000  # documents that tokenizers encodes at a time


@dataclass(frozen=True)
class Row:
    """One line of the table, from medians over the turns."""

    encoder: str
    tokens_per_s: float
    tokens_per_core_s: float  # per second of processor time
    ratio: float  # this encoder's time / MiniGPT's


def take_texts(corpus: Corpus, size: float) -> list[str]:
    """Documents of about `size` bytes in total, repeated if the corpus is smaller. Raises UserError if it is empty."""
    texts: list[str] = []
    taken = 0
    while taken < size:
        taken_before = taken
        for text, _ in parts(corpus.train.pieces(), whole=False):
            texts.append(str(text))
            taken += len(texts[-1].encode())
            if taken >= size:
                break
        if taken == taken_before:
            raise UserError("there is no text to encode")
    return texts


def build_encoders(tokenizer: "PreTrainedTokenizerFast", workers: int) -> dict[str, Encode]:
    """MiniGPT's encoder first, then the baselines that are installed and can encode with this tokenizer."""
    spec = EncoderSpec.from_tokenizer(tokenizer, smallest_dtype(vocabulary_size(tokenizer)))
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True  # a special token in the text is text

    def joined(documents: Iterable[Sequence[int]]) -> np.ndarray:
        return np.concatenate([np.array([*ids, spec.end_of_text], dtype=spec.dtype) for ids in documents])

    def minigpt(texts: Sequence[str]) -> np.ndarray:
        work = batches((text, True) for text in texts)
        return np.concatenate([encoded.ids for encoded in encode_all(work, spec, workers)])

    def tokenizers(texts: Sequence[str]) -> np.ndarray:
        remaining = iter(texts)
        documents: list[list[int]] = []
        while group := list(islice(remaining, GROUP)):
            documents += [encoded.ids for encoded in backend.encode_batch(group, add_special_tokens=False)]
        return joined(documents)

    encoders: dict[str, Encode] = {
        f"minigpt ({spec.library}, processes)": minigpt,
        "tokenizers encode_batch (threads)": tokenizers,
    }
    if isinstance(spec.fast, FastBPE):
        import tiktoken

        ranks = {token: int(spec.fast.ids[rank]) for token, rank in spec.fast.ranks.items()}
        plain = tiktoken.Encoding("gpt2", pat_str=TIKTOKEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
        encoders["tiktoken encode_ordinary (one thread)"] = lambda texts: joined(map(plain.encode_ordinary, texts))
        encoders["tiktoken encode_ordinary_batch (threads)"] = lambda texts: joined(
            plain.encode_ordinary_batch(list(texts), num_threads=workers)
        )
    return encoders


def measure(encoders: Mapping[str, Encode], texts: Sequence[str], turns: int) -> tuple[list[Row], int]:
    """Let the encoders, MiniGPT's first, encode `texts` in turns. Returns the rows of the table and the token count.

    Raises RuntimeError if two encoders give different ids.
    """
    wall_s: dict[str, list[float]] = {name: [] for name in encoders}
    core_s: dict[str, list[float]] = {name: [] for name in encoders}
    expected: np.ndarray | None = None
    for _ in range(turns):
        for name, encode in encoders.items():
            started, started_cores = time.perf_counter(), _processor_seconds()
            ids = encode(texts)
            wall_s[name].append(time.perf_counter() - started)
            core_s[name].append(_processor_seconds() - started_cores)
            expected = ids if expected is None else expected
            if not np.array_equal(ids, expected):
                raise RuntimeError(f"{name} gave other ids than {next(iter(encoders))}")
    assert expected is not None
    tokens = len(expected)
    minigpt_s = statistics.median(wall_s[next(iter(encoders))])
    rows = []
    for name in encoders:
        seconds = statistics.median(wall_s[name])
        # the clock of processor time ticks every 10 ms
        core_rate = tokens / max(statistics.median(core_s[name]), 0.01)
        rows.append(Row(name, tokens / seconds, core_rate, seconds / minigpt_s))
    return rows, tokens


def _processor_seconds() -> float:
    """Processor time of this process, its threads, and its child processes that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    head = ("encoder", "million tokens/s", "million tokens/s per core", "MiniGPT is … times as fast")
    cells = (
        (row.encoder, f"{row.tokens_per_s / 1e6:.2f}", f"{row.tokens_per_core_s / 1e6:.2f}", f"{row.ratio:.2f}")
        for row in rows
    )
    return markdown_table(head, cells, numeric=True)
