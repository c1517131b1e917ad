"""Describe and verify token shards."""

import hashlib
import json
import unicodedata
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS, Tokens, TokenShards, open_shards
from minigpt.data.tokenizer import load_tokenizer, tokenizer_hash
from minigpt.utils.errors import UserError
from minigpt.utils.files import file_sha256

READ_TOKENS = 1 << 22

SAMPLE_CHARACTERS = 300

LENGTHS = (0, 10, 50, 90, 99, 100)  # percentiles


def verify_folder(folder: Path) -> str:
    """Check sizes, hashes, the range of the ids, the number of documents and the tokenizer against the manifest.

    Raises UserError that names every difference. Shards without a manifest have nothing to be compared with.
    """
    shards = open_shards(folder)
    if not shards.manifest:
        raise UserError(f"{folder}: these shards have no manifest, so there is nothing to compare them with")
    problems = []
    for split, record in shards.manifest["splits"].items():
        tokens = {"train": shards.train, "validation": shards.validation}[split]
        assert tokens is not None
        for shard in record["shards"]:
            for file in [shard, *([shard["marks"]] if "marks" in shard else [])]:
                if file_sha256(folder / file["file"]) != file["sha256"]:
                    problems.append(f"{file['file']} is not what was written: its sha256 differs")
        if len(tokens) != record["tokens"]:
            problems.append(f"{split} has {len(tokens)} tokens, the manifest says {record['tokens']}")
        largest = max((int(ids.max()) for ids in _blocks(tokens)), default=0)
        if largest >= shards.manifest["vocab_size"]:
            problems.append(f"{split} has the id {largest}, vocab_size is {shards.manifest['vocab_size']}")
        ends = sum(int(marks.sum()) for marks in _ends(tokens, shards.manifest["eos_token_id"]))
        if ends != record["documents"]:
            problems.append(f"{split} has {ends} ends of documents, the manifest says {record['documents']}")
        if tokens.marked and _targets(tokens) != record["targets"]:
            problems.append(f"{split} has {_targets(tokens)} targets, the manifest says {record['targets']}")
    if shards.tokenizer_dir is None:
        problems.append("the tokenizer is missing")
    elif tokenizer_hash(load_tokenizer(shards.tokenizer_dir)) != shards.tokenizer_hash:
        problems.append("the tokenizer is not the one that made the shards")
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}; prepare the data again")
    total = sum(record["tokens"] for record in shards.manifest["splits"].values())
    return f"{folder}: whole; {total:,} tokens are what was written"


def describe(shards: TokenShards, tokenizer: Any, samples: int) -> str:
    """Everything there is to know about the shards, as text."""
    lines = [str(shards.folder)]
    for name in ("vocab_size", "dtype", "tokenizer_hash", "source", "options"):
        if name in shards.manifest:
            lines.append(f"  {name}: {json.dumps(shards.manifest[name], ensure_ascii=False)}")
    lines.append(f"  fingerprint: {shards.fingerprint}")
    for split, tokens in (("train", shards.train), ("validation", shards.validation)):
        if tokens is not None:
            lines += ["", *_describe_split(split, tokens, tokenizer, samples)]
    return "\n".join(lines)


def _describe_split(split: str, tokens: Tokens, tokenizer: Any, samples: int) -> list[str]:
    lines = [f"{split}: {len(tokens):,} tokens in {len(tokens.shards)} shards"]
    if tokens.text_bytes:
        lines[0] += f", {tokens.text_bytes:,} bytes of text, {tokens.text_bytes / len(tokens):.3f} bytes a token"
    if tokens.marked:
        lines.append(f"  in the loss: {_targets(tokens):,} tokens, {_targets(tokens) / len(tokens):.2%}")
    if tokenizer is None:
        return [*lines, "  no tokenizer lies beside the shards; name one with --tokenizer to see documents"]
    # 24 bytes a document, however long it is
    starts, lengths, hashes = array("Q"), array("Q"), array("Q")
    used = np.zeros(len(tokenizer), dtype=np.int64)
    for start, ids in documents(tokens, tokenizer.eos_token_id):
        starts.append(start)
        lengths.append(len(ids))
        hashes.frombytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest())
        used += np.bincount(ids, minlength=len(used))[: len(used)]
    quantiles = ", ".join(
        f"{q} %: {int(value):,}" for q, value in zip(LENGTHS, np.percentile(lengths, LENGTHS), strict=True)
    )
    duplicates = len(hashes) - len(np.unique(hashes))
    lines += [
        f"  documents: {len(lengths):,}, {lengths.count(0):,} of them empty, {duplicates:,} copies of another one",
        f"  tokens a document, percentiles: {quantiles}",
        f"  ids that occur: {int((used > 0).sum()):,} of {len(used):,}",
        *(f"  {line}" for line in _characters(used, tokenizer)),
    ]
    for index in np.linspace(0, len(starts) - 1, min(samples, len(starts)), dtype=int):
        start = starts[index]
        ids = tokens.read(start, min(len(tokens), start + min(lengths[index], SAMPLE_CHARACTERS)))
        text = tokenizer.decode(ids.astype(np.int64))[:SAMPLE_CHARACTERS]
        lines.append(f"  document {index:,}, {lengths[index]:,} tokens: {json.dumps(text, ensure_ascii=False)}")
    return lines


def _characters(used: np.ndarray, tokenizer: Any) -> list[str]:
    """The share of ids that mean 'unknown', and of ids that are only a piece of a character."""
    total = max(1, int(used.sum()))
    lines = []
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown != tokenizer.eos_token_id:
        lines.append(f"unknown: {used[unknown] / total:.4%} of the tokens")
    split = [index for index in np.flatnonzero(used) if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([int(index)])]
    lines.append(
        f"pieces of a character that is split over several ids: {used[split].sum() / total:.4%} of the tokens"
    )
    strange = [
        index
        for index in np.flatnonzero(used)
        if any(unicodedata.category(c) == "Cc" and c not in "\n\t\r" for c in tokenizer.decode([int(index)]))
    ]
    lines.append(f"control characters: {used[strange].sum() / total:.4%} of the tokens")
    return lines


def documents(tokens: Tokens, end_of_text: int) -> Iterator[tuple[int, np.ndarray]]:
    """Every document as (its first position, its ids without the last); a last one that has no end counts too."""
    begun: list[np.ndarray] = []  # what earlier blocks hold of the document that goes on
    start = position = 0
    for ids, ends in zip(_blocks(tokens), _ends(tokens, end_of_text), strict=True):
        first = 0
        for end in np.flatnonzero(ends):
            yield start, np.concatenate([*begun, ids[first:end]])
            begun, first = [], int(end) + 1
            start = position + first
        begun.append(ids[first:])
        position += len(ids)
    if start < len(tokens):
        yield start, np.concatenate(begun)


def _blocks(tokens: Tokens) -> Iterator[np.ndarray]:
    for start in range(0, len(tokens), READ_TOKENS):
        yield tokens.read(start, min(len(tokens), start + READ_TOKENS))


def _ends(tokens: Tokens, end_of_text: int) -> Iterator[np.ndarray]:
    """Block by block, which tokens are the last of their document."""
    for start in range(0, len(tokens), READ_TOKENS):
        yield tokens.marks(start, min(len(tokens), start + READ_TOKENS), end_of_text) & ENDS_DOCUMENT > 0


def _targets(tokens: Tokens) -> int:
    return sum(
        int(np.count_nonzero(tokens.marks(start, min(len(tokens), start + READ_TOKENS)) & IN_LOSS))
        for start in range(0, len(tokens), READ_TOKENS)
    )
