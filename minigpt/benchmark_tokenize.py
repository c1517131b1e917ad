"""How fast is text turned into ids here? Our way beside `tokenizers` and tiktoken as they are.

Every way gets the same documents, already in memory, and gives the same ids, which is checked; ours is charged for
starting its processes. They take turns, so that a busy machine is slow for all, and the median of the rounds counts.
The second figure, tokens for a second of one core, hardly depends on what else the machine does.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np

from minigpt.arguments import DataArguments
from minigpt.corpora import open_corpus
from minigpt.encoding import Encoding, batches, encode_all, parts
from minigpt.prepare import make_tokenizer
from minigpt.shards import smallest_dtype
from minigpt.tokenization import vocabulary_size

# as tiktoken's own `gpt2` writes it
TIKTOKEN_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train_file", nargs="+", help="Text to encode (default: the corpus python-docs)")
    parser.add_argument("--tokenizer", default="bpe", help="A tokenizer folder or Hub name (default: train one)")
    parser.add_argument("--megabytes", type=float, default=100, help="How much of the text, repeated if it is shorter")
    parser.add_argument("--workers", type=int, default=2, help="Processes or threads of every way")
    parser.add_argument("--rounds", type=int, default=3)


def main(args: argparse.Namespace) -> None:
    """Print a line for every way: tokens a second, and how it compares with ours."""
    data = DataArguments(
        tokenizer=args.tokenizer, train_file=args.train_file, corpus=None if args.train_file else "python-docs"
    )
    corpus = open_corpus(data)
    tokenizer = make_tokenizer(data, corpus)
    texts = _texts(corpus, args.megabytes * 1e6)
    ways = _ways(tokenizer, args.workers)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    core_seconds: dict[str, list[float]] = {name: [] for name in ways}
    expected: np.ndarray | None = None
    for _ in range(args.rounds):
        for name, way in ways.items():
            started, started_cores = time.perf_counter(), _core_seconds()
            ids = way(texts)
            seconds[name].append(time.perf_counter() - started)
            core_seconds[name].append(_core_seconds() - started_cores)
            expected = ids if expected is None else expected
            if not np.array_equal(ids, expected):
                raise ValueError(f"{name} gave other ids than {next(iter(ways))}")
    assert expected is not None
    size = sum(len(text.encode()) for text in texts)
    print(f"{size / 1e6:.1f} MB, {len(texts):,} documents, {len(expected):,} tokens, {args.workers} workers")
    ours = next(iter(ways))
    for name in ways:
        rate, core_rate = (len(expected) / statistics.median(taken[name]) / 1e6 for taken in (seconds, core_seconds))
        faster = statistics.median(seconds[name]) / statistics.median(seconds[ours])
        print(f"{name:<40} {rate:6.2f} M tokens/s {core_rate:6.2f} M tokens/s a core   ours is {faster:.2f}x as fast")


def _core_seconds() -> float:
    """Processor time of this process, its threads and the processes that it has ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _texts(corpus: Any, size: float) -> list[str]:
    """About `size` bytes of documents. Every way starts from these, so that none is charged for reading them."""
    texts: list[str] = []
    taken = 0
    while taken < size:
        before = taken
        for text, _ in parts(corpus.train.pieces(), whole=False):
            texts.append(text)
            taken += len(text.encode())
            if taken >= size:
                break
        if taken == before:
            raise ValueError("there is no text to encode")
    return texts


def _ways(tokenizer: Any, workers: int) -> dict[str, Callable[[list[str]], np.ndarray]]:
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    end = tokenizer.eos_token_id
    encoding = Encoding.of(tokenizer, smallest_dtype(vocabulary_size(tokenizer)))

    def joined(lists: Iterable[list[int]]) -> np.ndarray:
        return np.concatenate([np.array([*ids, end], dtype=encoding.dtype) for ids in lists])

    def ours(texts: list[str]) -> np.ndarray:
        work = batches((text, True) for text in texts)
        return np.concatenate([encoded.ids for encoded in encode_all(work, encoding, workers)])

    def as_it_is(texts: list[str]) -> np.ndarray:
        rest, lists = iter(texts), []
        while group := list(islice(rest, 1000)):
            lists += [found.ids for found in backend.encode_batch(group, add_special_tokens=False)]
        return joined(lists)

    ways: dict[str, Callable[[list[str]], np.ndarray]] = {
        f"ours ({encoding.library}, processes)": ours,
        "tokenizers encode_batch (threads)": as_it_is,
    }
    try:
        import tiktoken
    except ImportError:
        print("tiktoken is not installed: pip install tiktoken")
        return ways
    if encoding.fast is not None and hasattr(encoding.fast, "ranks"):
        ranks = {token: int(encoding.fast.ids[rank]) for token, rank in encoding.fast.ranks.items()}
        theirs = tiktoken.Encoding("gpt2", pat_str=TIKTOKEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
        ways["tiktoken encode_ordinary (one thread)"] = lambda texts: joined(map(theirs.encode_ordinary, texts))
        ways["tiktoken encode_ordinary_batch (threads)"] = lambda texts: joined(
            theirs.encode_ordinary_batch(texts, num_threads=workers)
        )
    return ways
