"""Prepare token shards from text: tokenizer, encoding, shards and manifest, in one folder."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt.config.arguments import DataArguments
from minigpt.data.chat import LossMasking
from minigpt.data.chat_template import read_chat_template, sample_text, set_chat_template
from minigpt.data.corpora import Corpus, Documents, open_corpus
from minigpt.data.deduplication import deduplicated, describe_dropped, drops
from minigpt.data.encoding import (
    BATCH_CHARACTERS,
    PART_CHARACTERS,
    DocumentBatch,
    EncodedBatch,
    EncoderSpec,
    ResumableError,
    batches,
    parts,
)
from minigpt.data.machines import ONE_MACHINE, Machines, SharedFolder
from minigpt.data.shard_writer import (
    JOURNAL,
    Journal,
    SplitProgress,
    SplitWriter,
    forget_journal,
    is_finished,
    publish,
    read_progress,
    write_manifest,
)
from minigpt.data.shards import FORMAT_VERSION, MANIFEST, open_shards, smallest_dtype
from minigpt.data.tokenizer import load_tokenizer, tokenizer_hash, train_bpe, train_characters, vocabulary_size
from minigpt.utils.errors import UserError
from minigpt.utils.files import file_sha256, fsync, is_disk_full, new_parents, publish_folder
from minigpt.utils.lock import locked
from minigpt.utils.progress import Progress
from minigpt.utils.resources import usable_cores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LARGE = 20_000_000  # bytes of text above which it pays to start processes and to look for a faster encoder


def prepare(args: DataArguments, output_dir: str | Path, machines: Machines = ONE_MACHINE) -> Path:
    """Write the shards, manifest and tokenizer of the text that `args` name into `output_dir`, and return its path.

    The folder appears only when it is complete. An interrupted preparation is resumed. With several `machines`, each
    must call this; those that are not machine 0 return when they have encoded their share.
    Raises UserError on bad input, which leaves nothing on the disk, and if `output_dir` is not empty, unless
    `args.overwrite_cache` is set. Raises ResumableError if the same command can resume after the cause is removed.
    """
    output_dir = Path(output_dir).expanduser().resolve()  # a link stays a link to the folder that is replaced
    if args.data:
        raise UserError(
            f"data={' '.join(args.data)} is prepared already; give --train_file, --dataset_name or --corpus"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir={output_dir} is a file; give a folder")
    _check_writable(output_dir)
    if output_dir.is_dir() and any(output_dir.iterdir()) and args.overwrite_cache:
        _check_replaceable(args, output_dir)
    in_use = output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite_cache and not machines.rank
    not_empty = f"output_dir={output_dir} is not empty; give another folder, or --overwrite_cache"
    if in_use and not (output_dir / JOURNAL).exists():
        raise UserError(not_empty)
    corpus = open_corpus(args)
    key = _key(args, corpus)
    if in_use and not is_finished(output_dir, key):
        raise UserError(not_empty)
    if in_use:
        forget_journal(output_dir)
        return output_dir
    if machines.rank:
        return _prepare_share(args, corpus, key, output_dir, machines)
    before = _manifest_version(output_dir)
    with new_parents(output_dir), locked(_lock_file(output_dir), str(output_dir)):
        if _manifest_version(output_dir) != before:
            raise UserError(f"output_dir={output_dir} has just been prepared by another process; give another folder")
        return _prepare(args, corpus, key, output_dir, machines=machines)


def _check_writable(output_dir: Path) -> None:
    """Raises UserError if no file can be created where `output_dir` shall be."""
    folder = next(parent for parent in output_dir.parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"output_dir={output_dir}: nothing can be written into {folder} ({error.strerror}); give another folder"
        ) from error


def _check_replaceable(args: DataArguments, output_dir: Path) -> None:
    """Raises UserError if `output_dir` is not a folder that `prepare` wrote, or holds an input of this preparation."""
    if not (output_dir / MANIFEST).is_file() or not open_shards(output_dir).manifest:
        raise UserError(
            f"output_dir={output_dir} holds no prepared token shards and is not replaced; give another folder"
        )
    for name in ("train_file", "validation_file", "dataset_name", "tokenizer"):
        values = getattr(args, name)
        for value in [values] if isinstance(values, str) else values or []:
            path = Path(value).expanduser()
            if path.exists() and path.resolve().is_relative_to(output_dir):
                raise UserError(
                    f"{name}={value} is in output_dir={output_dir}, which overwrite_cache would delete; "
                    "give another output_dir"
                )


def _manifest_version(folder: Path) -> tuple[int, int] | None:
    """What changes when another process replaces the shards; None if there are none."""
    try:
        status = (folder / MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def prepared_folder(args: DataArguments, default_chat_template: str = "chatml") -> Path:
    """The folder in the cache with the shards of the text that `args` name; they are prepared the first time.

    `default_chat_template` is for conversations if neither `args` nor the tokenizer has a template.

    The cache's key is a hash of the text, the tokenizer and the options. Of several processes that need the same
    folder, one prepares it while the others wait. Raises the same errors as `prepare`.
    """
    corpus = open_corpus(args)
    key = _key(args, corpus, default_chat_template)
    folder = cache_folder(args) / key
    if (folder / MANIFEST).is_file() and not args.overwrite_cache:
        return folder
    with new_parents(folder), locked(_lock_file(folder), str(folder), wait=True):
        if (folder / MANIFEST).is_file() and not args.overwrite_cache:
            return folder
        return _prepare(args, corpus, key, folder, default_chat_template)


def _prepare(
    args: DataArguments,
    corpus: Corpus,
    key: str,
    output_dir: Path,
    default_chat_template: str = "chatml",
    machines: Machines = ONE_MACHINE,
) -> Path:
    started = time.perf_counter()
    folder = _unfinished(output_dir)
    journal = Journal(folder, key)
    shared = SharedFolder(folder, machines)
    shared.start()
    corpus = deduplicated(args, corpus, folder)
    if journal.shards:
        print(f"resuming after {journal.shards} complete shards", file=sys.stderr)
    try:
        tokenizer = _stored_tokenizer(args, corpus, journal, default_chat_template)
        vocab_size = vocabulary_size(tokenizer)
        spec, workers = _encoding(args, corpus, tokenizer)
        dtype = np.dtype(spec.dtype)
        documents = {"train": corpus.train, "validation": corpus.validation}
        writers = [SplitWriter(journal, split, dtype, args.shard_tokens) for split in documents]
        splits = {
            writer.split: _write_split(writer, documents[writer.split], spec, workers, corpus.text_bytes, shared)
            for writer in writers
        }
        write_manifest(
            folder,
            dtype,
            vocab_size,
            splits,
            eos_token_id=tokenizer.eos_token_id,
            tokenizer_hash=tokenizer_hash(tokenizer),
            source=corpus.origin,
            conversations=corpus.is_conversational,
            options=_options(args, corpus),
            **({"dropped": describe_dropped(folder)} if drops(args) else {}),
        )
        shared.finish()
        publish(folder, output_dir)
    except ResumableError:
        raise
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise ResumableError(
            f"{output_dir}: the disk is full; make space and run the same command again to resume after the "
            f"{journal.shards} complete shards"
        ) from error
    if corpus.row_format:
        in_loss = "completions" if args.completion_only_loss is not False else "all tokens"
        print(f"rows: {corpus.row_format.name}; {in_loss} in the loss", file=sys.stderr)
    _print_summary(output_dir, splits, vocab_size, spec.library, time.perf_counter() - started)
    return output_dir


def _prepare_share(args: DataArguments, corpus: Corpus, key: str, output_dir: Path, machines: Machines) -> Path:
    """Encode the share of one machine that is not machine 0."""
    folder = _unfinished(output_dir)
    shared = SharedFolder(folder, machines)
    if shared.wait_for_start(key, output_dir):
        print(f"{output_dir} is complete already", file=sys.stderr)
        return output_dir
    corpus = deduplicated(args, corpus, folder)
    spec, workers = _encoding(args, corpus, load_tokenizer(folder / "tokenizer"))
    count = 0
    try:
        for split, documents in (("train", corpus.train), ("validation", corpus.validation)):
            progress = read_progress(folder).get(split, SplitProgress())
            if not progress.done:
                count += shared.encode_share(_remaining_batches(documents, spec, progress), spec, workers, split)
    except UserError as error:
        shared.report(error)
        raise
    except FileNotFoundError as error:
        if folder.exists():
            raise
        raise UserError(f"{output_dir}: machine 0 has ended with an error and deleted what there was") from error
    print(f"machine {machines.rank}: {count} batches are encoded; machine 0 writes them", file=sys.stderr)
    return output_dir


def _encoding(args: DataArguments, corpus: Corpus, tokenizer: "PreTrainedTokenizerFast") -> tuple[EncoderSpec, int]:
    """How the text is encoded, and in how many processes."""
    large = corpus.text_bytes is None or corpus.text_bytes > LARGE
    completion_only = args.completion_only_loss is not False
    loss_masking = LossMasking.from_tokenizer(tokenizer, completion_only) if corpus.row_format else None
    dtype = smallest_dtype(vocabulary_size(tokenizer))
    spec = EncoderSpec.from_tokenizer(tokenizer, dtype, large, loss_masking)
    return spec, args.preprocessing_num_workers or (usable_cores() if large else 1)


def _remaining_batches(documents: Documents, spec: EncoderSpec, progress: SplitProgress) -> Iterator[DocumentBatch]:
    """The batches of a split from the place where its next shard starts."""
    document_parts = parts(documents.pieces(progress.document), whole=not spec.encodes_parts)
    return batches(islice(document_parts, progress.part, None), progress.document, progress.part)


def _unfinished(output_dir: Path) -> Path:
    """Where the shards are until all are complete."""
    return output_dir.parent / f".{output_dir.name}.partial"


def make_tokenizer(
    args: DataArguments, corpus: Corpus, default_chat_template: str = "chatml"
) -> "PreTrainedTokenizerFast":
    """The tokenizer that `args.tokenizer` names, or one trained on the corpus; for conversations with a chat template.

    'bpe' is trained on the training documents. 'char' is trained on all documents, as nanoGPT's: a character that
    occurs only in validation text would otherwise have no id. Raises UserError if the tokenizer cannot be made.
    """
    kind = args.tokenizer or "bpe"
    tokenizer = load_tokenizer(kind) if kind not in ("bpe", "char") else None
    template = _new_chat_template(args, corpus, tokenizer, default_chat_template)
    if kind == "bpe":
        tokenizer = train_bpe(_training_texts(args, corpus), args.tokenizer_vocab_size, args.tokenizer_special_tokens)
    elif kind == "char":
        texts = (str(text) for text, _ in chain(corpus.train.pieces(), corpus.validation.pieces()))
        tokenizer = train_characters(chain(texts, [sample_text(template)] if template else []))
    assert tokenizer is not None
    if template is not None:
        new_tokens = set_chat_template(tokenizer, template)
        if new_tokens:
            print(f"chat template: new special tokens {' '.join(new_tokens)}", file=sys.stderr)
    return tokenizer


def _new_chat_template(
    args: DataArguments, corpus: Corpus, tokenizer: "PreTrainedTokenizerFast | None", default: str
) -> str | None:
    """The chat template that the tokenizer gets; None if it needs none, or keeps its own.

    Raises UserError if a template is given and the rows are no conversations.
    """
    if not corpus.is_conversational:
        if args.chat_template is not None:
            raise UserError(
                f"chat_template={args.chat_template} needs conversations, but the prompts and completions are texts, "
                "which are used as they are; drop it"
            )
        return None
    if args.chat_template is None and tokenizer is not None and tokenizer.chat_template:
        return None
    return read_chat_template(args.chat_template or default)


def _training_texts(args: DataArguments, corpus: Corpus) -> Iterator[str]:
    """About `tokenizer_training_megabytes` of the training documents: every n-th part of them, evenly spread."""
    limit = args.tokenizer_training_megabytes * 1_000_000
    every = -(-corpus.text_bytes // limit) if corpus.text_bytes else 1
    taken = 0
    for text, _ in islice(parts(corpus.train.pieces(), whole=False), 0, None, every):
        yield str(text)
        taken += len(text)
        if taken >= limit:  # `text_bytes` is an estimate, or unknown
            return


def _stored_tokenizer(
    args: DataArguments, corpus: Corpus, journal: Journal, default_chat_template: str
) -> "PreTrainedTokenizerFast":
    """The tokenizer in the journal's folder; it is made and saved there the first time."""
    folder = journal.folder / "tokenizer"
    if not folder.is_dir():
        partial = journal.folder / "tokenizer.partial"
        make_tokenizer(args, corpus, default_chat_template).save_pretrained(partial)
        for file in partial.iterdir():
            fsync(file)
        publish_folder(partial, folder)
        journal.save()
    return load_tokenizer(folder)


def _write_split(
    writer: SplitWriter,
    documents: Documents,
    spec: EncoderSpec,
    workers: int,
    text_bytes: int | None,
    shared: SharedFolder,
) -> SplitProgress:
    """Encode and write what is missing of one split. `text_bytes` is the size of both splits; None if unknown.

    Raises UserError if the split has no text or the disk lacks space for it.
    """
    split = writer.progress
    if split.done:
        return split
    started, text_bytes_before, tokens_before = time.perf_counter(), split.text_bytes, split.tokens
    tokens = tokens_before
    remaining = _remaining_batches(documents, spec, split)
    # the total is that of both splits, so the bar of the first one ends early
    bar = Progress(writer.split, text_bytes, "B", initial=text_bytes_before, unit_scale=True)
    try:
        with bar:
            for encoded in shared.encode(remaining, spec, workers, writer.split, split):
                if split.text_bytes == text_bytes_before:
                    _check_disk_space(writer, encoded, text_bytes)
                writer.write(encoded)
                tokens += len(encoded.ids)
                rate = (tokens - tokens_before) / (time.perf_counter() - started)
                bar.set_status(f"{tokens / 1e6:.1f} M tokens, {rate / 1e6:.2f} M/s")
                bar.update(encoded.text_bytes)
    except BaseException:
        writer.abandon()
        raise
    writer.close()
    if split.text_bytes == 0:
        raise UserError(
            f"the {writer.split} split has no text; give more text, or another --validation_split_percentage"
        )
    return split


def _check_disk_space(writer: SplitWriter, first: EncodedBatch, text_bytes: int | None) -> None:
    """Raises UserError if the disk lacks space for the tokens of the whole corpus, estimated from its first batch."""
    if text_bytes is None or first.text_bytes == 0:
        return
    remaining_bytes = max(0, text_bytes - writer.progress.text_bytes)
    needed = remaining_bytes * len(first.ids) / first.text_bytes * writer.dtype.itemsize
    free = shutil.disk_usage(writer.journal.folder).free
    if needed > free:
        raise (ResumableError if writer.journal.shards else UserError)(
            f"{writer.journal.folder.parent}: the tokens need about {needed / 1e9:.2f} GB but {free / 1e9:.2f} GB are "
            "free; make space or choose another disk"
        )


def _options(args: DataArguments, corpus: Corpus) -> dict[str, Any]:
    """The options that decide the content of the shards, besides the text itself."""
    kind = args.tokenizer or "bpe"
    options: dict[str, Any] = {"tokenizer": kind, "text_column": args.text_column, "shard_tokens": args.shard_tokens}
    if kind == "bpe":
        names = ("tokenizer_vocab_size", "tokenizer_special_tokens", "tokenizer_training_megabytes")
        options |= {name: getattr(args, name) for name in names}
    if args.dedup:
        options |= {"dedup": args.dedup}
        options |= {"dedup_threshold": args.dedup_threshold} if args.dedup == "near" else {}
    if args.decontaminate:
        options["decontaminate"] = [file_sha256(Path(name).expanduser()) for name in args.decontaminate]
    if corpus.row_format:
        options["completion_only_loss"] = args.completion_only_loss is not False
    return options


def _key(args: DataArguments, corpus: Corpus, default_chat_template: str = "chatml") -> str:
    """A hash of everything that decides the content of the shards."""
    options, tokenizer = _options(args, corpus), None
    if options["tokenizer"] not in ("bpe", "char"):
        tokenizer = load_tokenizer(options["tokenizer"])
        options["tokenizer"] = tokenizer_hash(tokenizer)
    if corpus.row_format:
        template = _new_chat_template(args, corpus, tokenizer, default_chat_template)
        options["chat_template"] = template or (tokenizer and tokenizer.chat_template)
        options["row_format"] = corpus.row_format.name
    key = json.dumps([FORMAT_VERSION, BATCH_CHARACTERS, PART_CHARACTERS, corpus.key, options], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def cache_folder(args: DataArguments) -> Path:
    """The folder in which the trainer keeps the shards that it prepares."""
    if args.cache_dir:
        return Path(args.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt"


def _lock_file(folder: Path) -> Path:
    """The lock that lets one process at a time prepare `folder`."""
    return folder.parent / f".{folder.name}.lock"


def _print_summary(
    folder: Path, splits: dict[str, SplitProgress], vocab_size: int, library: str, elapsed_s: float
) -> None:
    text_bytes = sum(split.text_bytes for split in splits.values())
    for name, split in splits.items():
        documents = "1 document" if split.documents == 1 else f"{split.documents:,} documents"
        print(
            f"{name:>10}: {documents}, {split.tokens:,} tokens, {split.text_bytes:,} bytes of text "
            f"({split.text_bytes / text_bytes:.1%}), {split.text_bytes / split.tokens:.2f} bytes per token",
            file=sys.stderr,
        )
    print(
        f"prepared in {elapsed_s:.1f} s with {library}; vocabulary of {vocab_size:,} ids; written to {folder}",
        file=sys.stderr,
    )
