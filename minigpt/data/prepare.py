"""Prepare token shards from text."""

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.config.arguments import DataArguments
from minigpt.data.chat import Marking
from minigpt.data.corpora import Corpus, Documents, open_corpus
from minigpt.data.encoding import (
    BATCH_CHARACTERS,
    PART_CHARACTERS,
    Encoded,
    Encoding,
    Interrupted,
    batches,
    encode_all,
    parts,
)
from minigpt.data.shard_writer import (
    JOURNAL,
    Journal,
    Progress,
    SplitWriter,
    forget_journal,
    is_finished,
    publish,
    write_manifest,
)
from minigpt.data.shards import FORMAT_VERSION, MANIFEST, smallest_dtype
from minigpt.data.tokenizer import load_tokenizer, tokenizer_hash, train_bpe, train_characters, vocabulary_size
from minigpt.utils.errors import UserError
from minigpt.utils.files import new_parents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LARGE = 20_000_000  # bytes of text from which on it pays to start processes and to check faster encoders

DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def prepare(args: DataArguments, output_dir: str | Path) -> Path:
    """Write the shards, manifest and tokenizer of the text that `args` names into `output_dir`, which appears whole.

    What an interrupted preparation left is gone on with. A non-empty `output_dir` is refused unless
    `args.overwrite_cache`. Raises UserError on bad input, of which nothing is left on the disk.
    """
    output_dir = Path(output_dir)
    if args.data:
        raise UserError(
            f"data={' '.join(args.data)} is prepared already; give --train_file, --dataset_name or --corpus"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir={output_dir} is a file; give a folder")
    in_use = output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite_cache
    if in_use and not (output_dir / JOURNAL).exists():
        raise UserError(f"output_dir={output_dir} is not empty; give another folder, or --overwrite_cache")
    corpus = open_corpus(args)
    key = _key(args, corpus)
    if in_use and not is_finished(output_dir, key):
        raise UserError(f"output_dir={output_dir} is not empty; give another folder, or --overwrite_cache")
    if in_use:
        forget_journal(output_dir)
        return output_dir
    with new_parents(output_dir), _locked(output_dir):
        return _prepare(args, corpus, key, output_dir)


def prepared_folder(args: DataArguments) -> Path:
    """The folder of shards in the cache for the text that `args` name, prepared the first time.

    The cache's key is the content of the text, the tokenizer and the options. Processes that ask at the same time
    wait for the first.
    """
    cache = Path(args.cache_dir).expanduser() if args.cache_dir else _default_cache()
    corpus = open_corpus(args)
    key = _key(args, corpus)
    folder = cache / key
    if (folder / MANIFEST).is_file() and not args.overwrite_cache:
        return folder
    with new_parents(folder), _locked(folder):
        if (folder / MANIFEST).is_file() and not args.overwrite_cache:
            return folder
        return _prepare(args, corpus, key, folder)


def _prepare(args: DataArguments, corpus: Corpus, key: str, output_dir: Path) -> Path:
    started = time.perf_counter()
    folder = output_dir.parent / f".{output_dir.name}.partial"
    try:
        journal = Journal(folder, key)
        if journal.shards:
            print(f"going on after {journal.shards} shards that are whole", file=sys.stderr)
        tokenizer = _kept_tokenizer(args, corpus, journal)
        vocab_size = vocabulary_size(tokenizer)
        dtype = smallest_dtype(vocab_size)
        large = corpus.text_bytes is None or corpus.text_bytes > LARGE
        marking = Marking.of(tokenizer, args.completion_only_loss is not False) if corpus.examples else None
        encoding = Encoding.of(tokenizer, dtype, large, marking)
        workers = args.preprocessing_num_workers or (_cores() if large else 1)
        splits = {}
        for split, documents in (("train", corpus.train), ("validation", corpus.validation)):
            writer = SplitWriter(journal, split, dtype, args.shard_tokens)
            splits[split] = _write_split(writer, documents, encoding, workers, corpus.text_bytes)
        write_manifest(
            folder,
            dtype,
            vocab_size,
            splits,
            eos_token_id=tokenizer.eos_token_id,
            tokenizer_hash=tokenizer_hash(tokenizer),
            source=corpus.origin,
            options=_options(args, corpus),
        )
        publish(folder, output_dir)
    except Interrupted:
        raise
    except ValueError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        raise Interrupted(
            f"{output_dir}: the disk is full; make space and run the same command again: it goes on after the "
            f"{journal.shards} shards that are whole"
        ) from error
    _summarize(output_dir, splits, vocab_size, encoding.library, time.perf_counter() - started)
    return output_dir


def make_tokenizer(args: DataArguments, corpus: Corpus) -> "PreTrainedTokenizerFast":
    """The tokenizer that `args.tokenizer` names, or one trained on the corpus.

    'bpe' learns from the training documents; 'char' from all of them, as nanoGPT's does: a character that only
    held-out text has would otherwise have no id.
    """
    kind = args.tokenizer or "bpe"
    if kind == "bpe":
        return train_bpe(_training_texts(args, corpus), args.tokenizer_vocab_size, args.tokenizer_special_tokens)
    if kind == "char":
        return train_characters(str(text) for text, _ in chain(corpus.train.pieces(), corpus.validation.pieces()))
    return load_tokenizer(kind)


def _training_texts(args: DataArguments, corpus: Corpus) -> Iterator[str]:
    """About `tokenizer_training_megabytes` of the training documents: every n-th part of them, evenly spread."""
    limit = args.tokenizer_training_megabytes * 1_000_000
    every = -(-corpus.text_bytes // limit) if corpus.text_bytes else 1
    taken = 0
    for text, _ in islice(parts(corpus.train.pieces(), whole=False), 0, None, every):
        yield str(text)
        taken += len(text)
        if taken >= limit:  # the corpus is larger than it said, or did not say
            return


def _kept_tokenizer(args: DataArguments, corpus: Corpus, journal: Journal) -> "PreTrainedTokenizerFast":
    """The tokenizer in the journal's folder; made and put there the first time."""
    folder = journal.folder / "tokenizer"
    if not folder.is_dir():
        made = journal.folder / "tokenizer.partial"
        make_tokenizer(args, corpus).save_pretrained(made)
        made.rename(folder)
        journal.save()
    return load_tokenizer(folder)


def _write_split(
    writer: SplitWriter, documents: Documents, encoding: Encoding, workers: int, text_bytes: int | None
) -> Progress:
    """Encode and write what the journal says is missing of one split."""
    from tqdm import tqdm

    at = writer.progress
    if at.done:
        return at
    texts = parts(documents.pieces(at.document), whole=not encoding.encodes_parts)
    work = batches(islice(texts, at.part, None), at.document, at.part)
    # a bar of the text that is read; the total counts both splits, so the end of the first comes a little early
    progress = tqdm(
        desc=writer.split,
        total=text_bytes,
        initial=at.text_bytes,
        unit="B",
        unit_scale=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        delay=2,  # seconds: short work is not worth a bar
        leave=False,
    )
    try:
        with progress:
            before, started = at.tokens, time.perf_counter()
            tokens = before
            for encoded in encode_all(work, encoding, workers):
                if progress.n == progress.initial:
                    _check_space(writer, encoded, text_bytes)
                writer.write(encoded)
                tokens += len(encoded.ids)
                rate = (tokens - before) / (time.perf_counter() - started)
                progress.set_postfix_str(f"{tokens / 1e6:.1f} M tokens, {rate / 1e6:.2f} M/s", refresh=False)
                progress.update(encoded.text_bytes)
    except BaseException:
        writer.abandon()
        raise
    record = writer.close()
    if record.text_bytes == 0:
        raise UserError(f"the {writer.split} split holds no text: give more, or another validation_split_percentage")
    return record


def _check_space(writer: SplitWriter, first: Encoded, text_bytes: int | None) -> None:
    """Raises UserError if the disk has no room for what the whole corpus will need, judged by its first batch."""
    if text_bytes is None or first.text_bytes == 0:
        return
    left = max(0, text_bytes - writer.progress.text_bytes)
    needed = left * len(first.ids) / first.text_bytes * writer.dtype.itemsize
    free = shutil.disk_usage(writer.journal.folder).free
    if needed > free:
        raise (Interrupted if writer.journal.shards else UserError)(
            f"{writer.journal.folder.parent}: about {needed / 1e9:.2f} GB of tokens are to be written but "
            f"{free / 1e9:.2f} GB are free; make space or choose another disk"
        )


def _options(args: DataArguments, corpus: Corpus) -> dict[str, Any]:
    """The options that decide which bytes come out, besides the text itself."""
    kind = args.tokenizer or "bpe"
    options: dict[str, Any] = {"tokenizer": kind, "text_column": args.text_column, "shard_tokens": args.shard_tokens}
    if kind == "bpe":
        names = ("tokenizer_vocab_size", "tokenizer_special_tokens", "tokenizer_training_megabytes")
        options |= {name: getattr(args, name) for name in names}
    if corpus.examples:
        options["completion_only_loss"] = args.completion_only_loss is not False
    return options


def _key(args: DataArguments, corpus: Corpus) -> str:
    """A hash of everything that decides the result."""
    options = _options(args, corpus)
    if options["tokenizer"] not in ("bpe", "char"):
        tokenizer = load_tokenizer(options["tokenizer"])
        options["tokenizer"] = tokenizer_hash(tokenizer)
        if corpus.examples:
            options["chat_template"] = tokenizer.chat_template
    key = json.dumps([FORMAT_VERSION, BATCH_CHARACTERS, PART_CHARACTERS, corpus.key, options], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time prepare `folder`."""
    from filelock import FileLock

    path = folder.parent / f".{folder.name}.lock"
    with FileLock(path):
        try:
            yield
        finally:
            with suppress(OSError):  # where open files cannot be deleted, an empty one stays
                path.unlink()


def _summarize(folder: Path, splits: dict[str, Progress], vocab_size: int, library: str, elapsed_s: float) -> None:
    for split, record in splits.items():
        print(
            f"{split:>10}: {record.documents:,} documents, {record.tokens:,} tokens, "
            f"{record.text_bytes:,} bytes of text, {record.text_bytes / record.tokens:.2f} bytes a token",
            file=sys.stderr,
        )
    print(f"{vocab_size:,} token ids; prepared in {elapsed_s:.1f} s by {library}; in {folder}", file=sys.stderr)
