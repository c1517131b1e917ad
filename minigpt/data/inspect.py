"""Describe token shards, and verify them against their manifest."""

import hashlib
import json
import unicodedata
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt.data.shard_writer import files_of
from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS, Tokens, TokenShards, open_shards
from minigpt.data.tokenizer import load_tokenizer, tokenizer_hash
from minigpt.utils.errors import UserError
from minigpt.utils.files import file_sha256
from minigpt.utils.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHOWN_CHARACTERS = 300  # of a sample document
PERCENTILES = (0, 10, 50, 90, 99, 100)


def verify_folder(folder: Path) -> str:
    """Compare sizes, hashes, ids, counts and the tokenizer with the manifest. Returns one line that says it is intact.

    Raises UserError that names every difference, or if the shards have no manifest.
    """
    shards = open_shards(folder)
    if not shards.manifest:
        raise UserError(f"{folder}: these shards have no manifest, so there is nothing to compare them with")
    missing = [name for name in ("vocab_size", "eos_token_id", "tokenizer_hash") if name not in shards.manifest]
    if missing:
        raise UserError(f"{folder}: {', '.join(missing)} is missing in the manifest; prepare the data again")
    problems = []
    for split, tokens in shards.splits.items():
        problems += _problems_of_split(split, tokens, shards.manifest["splits"][split], shards)
    if shards.tokenizer_dir is None:
        problems.append("the tokenizer is missing")
    elif tokenizer_hash(load_tokenizer(shards.tokenizer_dir)) != shards.tokenizer_hash:
        problems.append("the tokenizer is not the one that made the shards")
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}; prepare the data again")
    return f"{folder}: intact; all {sum(map(len, shards.splits.values())):,} tokens are what was written"


def _problems_of_split(split: str, tokens: Tokens, record: dict[str, Any], shards: TokenShards) -> list[str]:
    """The differences between the tokens of a split and its record in the manifest."""
    problems = []
    with Progress(f"verifying {split}", len(tokens), "tokens", unit_scale=True) as bar:
        for shard in record["shards"]:
            for file in files_of(shard):
                if file_sha256(shards.folder / file["file"]) != file["sha256"]:
                    problems.append(f"{file['file']} is not what was written: its sha256 differs")
            bar.update(shard["tokens"])
    largest_id = max((int(tokens.read(start, stop).max()) for start, stop in tokens.blocks()), default=0)
    if largest_id >= shards.manifest["vocab_size"]:
        problems.append(f"{split} has the id {largest_id}, but vocab_size is {shards.manifest['vocab_size']}")
    counts = {
        "tokens": len(tokens),
        "documents": _count(tokens, ENDS_DOCUMENT, shards.manifest["eos_token_id"]),
        **({"targets": _count(tokens, IN_LOSS)} if tokens.has_loss_mask else {}),
    }
    return problems + [
        f"{split} has {count} {name} where the manifest says {record.get(name)}"
        for name, count in counts.items()
        if count != record.get(name)
    ]


def describe(shards: TokenShards, tokenizer: "PreTrainedTokenizerFast | None", samples: int) -> str:
    """A description of the shards over several lines: origin, counts, document lengths, ids, `samples` documents.

    Without a tokenizer, only what the files themselves show.
    """
    lines = [str(shards.folder)]
    for name in ("vocab_size", "dtype", "tokenizer_hash", "source", "options"):
        if name in shards.manifest:
            lines.append(f"  {name}: {json.dumps(shards.manifest[name], ensure_ascii=False)}")
    lines.append(f"  fingerprint: {shards.fingerprint}")
    for split, tokens in shards.splits.items():
        lines += ["", *_describe_split(split, tokens, tokenizer, samples)]
    return "\n".join(lines)


def _describe_split(
    split: str, tokens: Tokens, tokenizer: "PreTrainedTokenizerFast | None", samples: int
) -> list[str]:
    lines = [f"{split}: {len(tokens):,} tokens in {len(tokens.shards)} shards"]
    if tokens.text_bytes:
        lines[0] += f", {tokens.text_bytes:,} bytes of text, {tokens.text_bytes / len(tokens):.3f} bytes per token"
    if tokens.has_loss_mask:
        targets = _count(tokens, IN_LOSS)
        lines.append(f"  in the loss: {targets:,} tokens, {targets / len(tokens):.2%}")
    if tokenizer is None:
        return [*lines, "  the shards have no tokenizer; give one with --tokenizer to see documents"]
    starts, lengths = documents(tokens, tokenizer.eos_token_id)
    quantiles = zip(PERCENTILES, np.percentile(lengths, PERCENTILES), strict=True)
    id_counts = _count_ids(tokens, tokenizer)
    empty, copies = int((lengths == 0).sum()), _count_copies(split, tokens, starts, lengths)
    lines += [
        f"  documents: {len(lengths):,}, {empty:,} of them empty, {copies:,} copies of another one",
        f"  tokens per document, percentiles: {', '.join(f'{q} %: {int(value):,}' for q, value in quantiles)}",
        f"  ids that occur: {int((id_counts > 0).sum()):,} of {len(id_counts):,}",
        *(f"  {line}" for line in _describe_characters(id_counts, tokenizer)),
    ]
    for index in np.linspace(0, len(starts) - 1, min(samples, len(starts)), dtype=int):
        start, length = int(starts[index]), int(lengths[index])
        ids = tokens.read(start, start + min(length, SHOWN_CHARACTERS))
        text = str(tokenizer.decode(ids.astype(np.int64)))[:SHOWN_CHARACTERS]
        lines.append(f"  document {index:,}, {length:,} tokens: {json.dumps(text, ensure_ascii=False)}")
    return lines


def documents(tokens: Tokens, end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and length in tokens, without its end, of every document: two int64 arrays [documents].

    A last document without an end counts as well.
    """
    bounds = tokens.document_bounds(end_of_text)
    lengths = np.diff(bounds) - 1
    last_is_open = len(tokens) and not tokens.marks(len(tokens) - 1, len(tokens), end_of_text)[0] & ENDS_DOCUMENT
    if last_is_open:
        lengths[-1] += 1
    return bounds[:-1], lengths


def _count_ids(tokens: Tokens, tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """How often each id occurs, the ends of documents excluded: int64 [ids of the tokenizer]."""
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    for start, stop in tokens.blocks():
        is_text = tokens.marks(start, stop, tokenizer.eos_token_id) & ENDS_DOCUMENT == 0
        ids = tokens.read(start, stop)[is_text]
        counts += np.bincount(ids, minlength=len(counts))[: len(counts)]
    return counts


def _count_copies(split: str, tokens: Tokens, starts: np.ndarray, lengths: np.ndarray) -> int:
    """The number of documents that are equal to another one that is counted already."""
    hashes = array("Q")  # 8 bytes per document
    with Progress(f"reading {split}", len(tokens), "tokens", unit_scale=True) as bar:
        for start, length in zip(starts, lengths, strict=True):
            ids = tokens.read(start, start + length)
            hashes.frombytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest())
            bar.update(int(length) + 1)
    return len(hashes) - len(np.unique(hashes))


def _describe_characters(id_counts: np.ndarray, tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """The share of tokens that are unknown, that are only a piece of a character, and that are control characters."""
    total = max(1, int(id_counts.sum()))
    text_of_id = {index: str(tokenizer.decode([index])) for index in np.flatnonzero(id_counts).tolist()}
    lines = []
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown != tokenizer.eos_token_id:
        lines.append(f"unknown: {id_counts[unknown] / total:.4%} of the tokens")
    partial = [index for index, text in text_of_id.items() if "\N{REPLACEMENT CHARACTER}" in text]
    control = [index for index, text in text_of_id.items() if any(map(_is_control_character, text))]
    return [
        *lines,
        f"pieces of a character that is split over several ids: {id_counts[partial].sum() / total:.4%} of the tokens",
        f"control characters: {id_counts[control].sum() / total:.4%} of the tokens",
    ]


def _is_control_character(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\n\t\r"


def _count(tokens: Tokens, bit: int, end_of_text: int | None = None) -> int:
    """The number of tokens with `bit` set in their mark."""
    return sum(int(np.count_nonzero(tokens.marks(start, stop, end_of_text) & bit)) for start, stop in tokens.blocks())
