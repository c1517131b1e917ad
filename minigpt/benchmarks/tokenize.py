"""Benchmark tokenizing beside `tokenizers` and tiktoken."""

import os
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np

from minigpt.data.encoding import Encoding, batches, encode_all, parts
from minigpt.data.shards import smallest_dtype
from minigpt.data.tokenizer import vocabulary_size
from minigpt.utils.errors import UserError

# as tiktoken's own `gpt2` writes it
TIKTOKEN_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


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
            raise UserError("there is no text to encode")
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
