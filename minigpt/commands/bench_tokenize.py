"""Measure tokenizing beside `tokenizers` and tiktoken."""

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np

from minigpt.utils.errors import CommandParser, UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("minigpt bench tokenize", __doc__)
    parser.add_argument("--train_file", nargs="+", help="Text to encode (default: the corpus python-docs)")
    parser.add_argument("--tokenizer", default="bpe", help="A tokenizer folder or Hub name (default: train one)")
    parser.add_argument("--megabytes", type=float, default=100, help="How much of the text, repeated if it is shorter")
    parser.add_argument("--workers", type=int, default=2, help="Processes or threads of every way")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Print a line for every way: tokens a second, and how it compares with ours."""
    from minigpt.benchmarks.tokenize import _core_seconds, _texts, _ways
    from minigpt.config.arguments import DataArguments
    from minigpt.data.corpora import open_corpus
    from minigpt.data.prepare import make_tokenizer

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
                raise UserError(f"{name} gave other ids than {next(iter(ways))}")
    assert expected is not None
    size = sum(len(text.encode()) for text in texts)
    print(f"{size / 1e6:.1f} MB, {len(texts):,} documents, {len(expected):,} tokens, {args.workers} workers")
    ours = next(iter(ways))
    for name in ways:
        rate, core_rate = (len(expected) / statistics.median(taken[name]) / 1e6 for taken in (seconds, core_seconds))
        faster = statistics.median(seconds[name]) / statistics.median(seconds[ours])
        print(f"{name:<40} {rate:6.2f} M tokens/s {core_rate:6.2f} M tokens/s a core   ours is {faster:.2f}x as fast")
