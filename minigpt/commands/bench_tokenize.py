"""Compare the tokenizing speed of `minigpt prepare` with tokenizers and tiktoken.

The encoders take turns on the same documents, which are in memory. All must give the same ids.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from minigpt.utils.command_line import CommandParser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt bench tokenize`."""
    from minigpt.benchmarks.report import add_report_option, check_options

    parser = CommandParser("minigpt bench tokenize", __doc__)
    add = parser.add_argument
    add("--train_file", nargs="+", metavar="FILE", help="text to encode (default: the corpus python-docs)")
    add("--tokenizer", default="bpe", help="tokenizer folder or Hub name (default: train one)")
    add("--megabytes", type=float, default=100, metavar="X", help="text to encode, repeated if shorter (default: 100)")
    add("--workers", type=int, default=2, metavar="N", help="processes or threads per encoder (default: %(default)s)")
    add("--turns", type=int, default=3, metavar="N", help="turns of each encoder (default: %(default)s)")
    add_report_option(parser)
    args = parser.parse_args(argv)
    check_options(args, "megabytes", "workers", "turns")
    return args


def run(args: argparse.Namespace) -> None:
    """Print the table. Raises UserError if the text or tokenizer cannot be found."""
    from minigpt.benchmarks.report import write_report
    from minigpt.benchmarks.tokenize import build_encoders, markdown, measure, take_texts
    from minigpt.config.arguments import DataArguments
    from minigpt.data.corpora import open_corpus
    from minigpt.data.prepare import make_tokenizer

    data = DataArguments(
        tokenizer=args.tokenizer, train_file=args.train_file, corpus=None if args.train_file else "python-docs"
    )
    corpus = open_corpus(data)
    tokenizer = make_tokenizer(data, corpus)
    texts = take_texts(corpus, args.megabytes * 1e6)
    rows, tokens = measure(build_encoders(tokenizer, args.workers), texts, args.turns)
    size = sum(len(text.encode()) for text in texts)
    figures = {"options": vars(args), "tokens": tokens, "rows": [asdict(row) for row in rows]}
    conditions = f"{size / 1e6:.1f} MB, {len(texts):,} documents, {tokens:,} tokens, {args.workers} workers."
    write_report(figures, markdown(rows), device="cpu", output=args.output, conditions=conditions)
