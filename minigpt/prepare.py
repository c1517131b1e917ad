"""How does text become token shards? Documents are read, encoded in batches and written, a few megabytes at a time."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt.arguments import DataArguments, OneLineErrorParser
from minigpt.corpora import Corpus, Pieces, open_corpus
from minigpt.shards import (
    FORMAT_VERSION,
    MANIFEST,
    SplitRecord,
    SplitWriter,
    appearing_folder,
    smallest_dtype,
    write_manifest,
)
from minigpt.tokenization import (
    Encoder,
    load_tokenizer,
    parts,
    tokenizer_hash,
    train_bpe,
    train_characters,
    vocabulary_size,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_CHARACTERS = 4_000_000


def prepare(args: DataArguments, output_dir: str | Path) -> Path:
    """Write the shards, manifest and tokenizer of the text that `args` names into `output_dir`, which appears whole.

    A non-empty `output_dir` is refused unless `args.overwrite_cache`. On bad input (ValueError) nothing is left.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir={output_dir} is a file; give a folder")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite_cache:
        raise ValueError(f"output_dir={output_dir} is not empty; give another folder, or --overwrite_cache")
    if args.data:
        raise ValueError(f"data={args.data} is prepared already; give --train_file, --dataset_name or --corpus")
    return _prepare(args, open_corpus(args), output_dir)


def _prepare(args: DataArguments, corpus: Corpus, output_dir: Path) -> Path:
    started = time.perf_counter()
    tokenizer = make_tokenizer(args, corpus)
    vocab_size = vocabulary_size(tokenizer)
    dtype = smallest_dtype(vocab_size)
    with appearing_folder(output_dir, replace=args.overwrite_cache) as folder:
        splits = {
            "train": _write_split(folder, "train", dtype, corpus.train(), tokenizer),
            "validation": _write_split(folder, "validation", dtype, corpus.validation(), tokenizer),
        }
        tokenizer.save_pretrained(folder / "tokenizer")
        write_manifest(
            folder,
            dtype,
            vocab_size,
            splits,
            eos_token_id=tokenizer.eos_token_id,
            tokenizer_hash=tokenizer_hash(tokenizer),
            source=corpus.origin,
            options=_options(args),
        )
    _summarize(output_dir, splits, vocab_size, time.perf_counter() - started)
    return output_dir


def prepared_folder(args: DataArguments) -> Path:
    """The folder of shards for `args`: `args.data`, or one in the cache, which is prepared the first time.

    The cache's key is the content of the text, the tokenizer and the options. Processes that ask at the same time
    wait for the first.
    """
    if args.data:
        return Path(args.data).expanduser()
    from filelock import FileLock

    cache = Path(args.cache_dir).expanduser() if args.cache_dir else _default_cache()
    corpus = open_corpus(args)
    folder = cache / _cache_key(args, corpus)
    if (folder / MANIFEST).is_file() and not args.overwrite_cache:
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / MANIFEST).is_file() and not args.overwrite_cache:
            return folder
        return _prepare(args, corpus, folder)


def make_tokenizer(args: DataArguments, corpus: Corpus) -> "PreTrainedTokenizerFast":
    """The tokenizer that `args.tokenizer` names, or one trained on the corpus.

    'bpe' learns from the training documents; 'char' from all of them, as nanoGPT's does: a character that only
    held-out text has would otherwise have no id.
    """
    kind = args.tokenizer or "bpe"
    if kind == "bpe":
        return train_bpe((text for text, _ in parts(corpus.train(), whole=False)), args.tokenizer_vocab_size)
    if kind == "char":
        return train_characters(text for text, _ in chain(corpus.train(), corpus.validation()))
    return load_tokenizer(kind)


def _write_split(
    folder: Path, split: str, dtype: np.dtype, pieces: Pieces, tokenizer: "PreTrainedTokenizerFast"
) -> SplitRecord:
    """Encode and write one split; every document ends with one end-of-text id."""
    from tqdm import tqdm

    encoder = Encoder(tokenizer)
    end_of_text = np.array([tokenizer.eos_token_id])
    writer = SplitWriter(folder, split, dtype)
    with tqdm(desc=split, unit="token", unit_scale=True, disable=None, leave=False) as progress:
        for batch in _batches(parts(pieces, whole=not encoder.encodes_parts)):
            for ids, (text, ends) in zip(encoder.encode([text for text, _ in batch]), batch, strict=True):
                ids = np.concatenate([ids, end_of_text]) if ends else ids
                writer.write(ids, documents=int(ends), text_bytes=len(text.encode()))
                progress.update(len(ids))
    record = writer.close()
    if record.text_bytes == 0:
        raise ValueError(f"the {split} split holds no text: give more text, or another validation_split_percentage")
    return record


def _batches(texts: Pieces) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    characters = 0
    for text, ends in texts:
        batch.append((text, ends))
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _options(args: DataArguments) -> dict[str, Any]:
    """The options that decide which tokens come out, besides the text itself."""
    kind = args.tokenizer or "bpe"
    options: dict[str, Any] = {"tokenizer": kind, "text_column": args.text_column}
    if kind == "bpe":
        options["tokenizer_vocab_size"] = args.tokenizer_vocab_size
    return options


def _cache_key(args: DataArguments, corpus: Corpus) -> str:
    options = _options(args)
    if options["tokenizer"] not in ("bpe", "char"):
        options["tokenizer"] = tokenizer_hash(load_tokenizer(options["tokenizer"]))
    key = json.dumps([FORMAT_VERSION, corpus.key, options], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt"


def _summarize(folder: Path, splits: dict[str, SplitRecord], vocab_size: int, elapsed_s: float) -> None:
    for split, record in splits.items():
        print(
            f"{split:>10}: {record.documents:,} documents, {record.tokens:,} tokens, "
            f"{record.text_bytes:,} bytes of text, {record.text_bytes / record.tokens:.2f} bytes a token",
            file=sys.stderr,
        )
    print(f"{vocab_size:,} token ids; prepared in {elapsed_s:.1f} s; in {folder}", file=sys.stderr)


def main(argv: Sequence[str]) -> None:
    """`minigpt prepare --train_file F… --tokenizer T --output_dir D`: every option of `DataArguments`."""
    parser = OneLineErrorParser(DataArguments, prog="minigpt prepare", description=__doc__)
    parser.add_argument("--output_dir", required=True, help="Folder of the shards, which appears whole at the end")
    options = parser.parse_strictly(argv)
    output_dir = options.pop("output_dir")
    prepare(DataArguments(**options), output_dir)
