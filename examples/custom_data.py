"""Train on text that is in no file format that MiniGPT reads: here, the rows of an SQLite database.

    python examples/custom_data.py articles.db "SELECT body FROM articles" --output_dir data/articles
    minigpt train quickstart --data data/articles --output_dir runs/articles

Replace `documents` by a generator for your own source. It may be larger than the memory. A line of the JSONL file may
also be a conversation: {"messages": [...]}. To fine-tune a model, give its folder to both commands, as --tokenizer and
as --model_name_or_path.
"""

import argparse
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from minigpt.config.arguments import DataArguments
from minigpt.data.prepare import prepare
from minigpt.utils.errors import UserError, one_line_errors


def documents(database: str, query: str) -> Iterator[str]:
    """The texts to train on, one by one: the first column of the rows that `query` finds."""
    try:
        with closing(sqlite3.connect(f"{Path(database).resolve().as_uri()}?mode=ro", uri=True)) as connection:
            for text, *_ in connection.execute(query):
                yield text
    except sqlite3.Error as error:
        raise UserError(f"{database}: {error}") from error


def main() -> None:
    """Write the documents as JSON lines, and their tokens as shards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database")
    parser.add_argument("query", help="an SQL query; the first column of its rows is the text")
    parser.add_argument("--output_dir", required=True, help="folder for the shards; the JSONL file is next to it")
    parser.add_argument("--tokenizer", default="bpe", help="a folder or Hub name, or bpe to train one")
    parser.add_argument("--tokenizer_vocab_size", type=int, default=4096, help="of a trained bpe tokenizer")
    args = parser.parse_args()

    lines_file = Path(f"{args.output_dir}.jsonl")
    lines_file.parent.mkdir(parents=True, exist_ok=True)
    with lines_file.open("w", encoding="utf-8") as file:
        for text in documents(args.database, args.query):
            file.write(json.dumps({"text": text}) + "\n")
    options = {"tokenizer": args.tokenizer, "tokenizer_vocab_size": args.tokenizer_vocab_size}
    prepare(DataArguments(train_file=[str(lines_file)], **options), args.output_dir)


if __name__ == "__main__":
    with one_line_errors("custom_data.py"):
        main()
