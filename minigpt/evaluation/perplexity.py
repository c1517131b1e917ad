"""Strided loss and perplexity over a whole text."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS
from minigpt.evaluation.metrics import Score
from minigpt.utils.errors import UserError

DECODED_AT_ONCE = 1 << 20


class TokenText(Protocol):
    """Token ids that can be read by position, with marks if not all are targets, as `minigpt.shards.Tokens`."""

    @property
    def marked(self) -> bool: ...
    def __len__(self) -> int: ...
    def read(self, start: int, stop: int) -> np.ndarray: ...
    def marks(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class EncodedText:
    """A text in memory as token ids [N]."""

    ids: np.ndarray
    marked = False

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]

    def marks(self, start: int, stop: int) -> np.ndarray:
        return np.full(stop - start, IN_LOSS, np.uint8)


def windows(length: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first): a window's inputs are tokens [start, end); its targets [first, end] count, once each."""
    scored = 1
    for start in range(0, length - 1, stride):
        end = min(start + block_size, length - 1)
        if end >= scored:
            yield start, end, scored
            scored = end + 1
        if end == length - 1:
            return


def text_windows(text: TokenText, block_size: int, stride: int) -> list[tuple[int, int, int]]:
    """The windows of the whole text, or of each of its documents where it is marked."""
    if not text.marked:
        return list(windows(len(text), block_size, stride))
    ends = np.flatnonzero(text.marks(0, len(text)) & ENDS_DOCUMENT) + 1
    return [
        (start + window, start + end, start + first)
        for start, stop in pairwise([0, *ends.tolist()])
        for window, end, first in windows(stop - start, block_size, stride)
    ]


def score(model: Any, text: TokenText, block_size: int, stride: int, batch_size: int, accelerator: Any) -> list[list]:
    """(loss in nats, targets) of each window, in the order of the text, gathered from all processes.

    Logits [B, T, V] are scored in float32; windows of a batch are padded to the longest.
    """
    import torch
    from accelerate.utils import gather_object

    spans = text_windows(text, block_size, stride)
    batches = [spans[first : first + batch_size] for first in range(0, len(spans), batch_size)]
    scored = []
    model.eval()
    for number in range(accelerator.process_index, len(batches), accelerator.num_processes):
        batch = batches[number]
        width = max(end - start for start, end, _ in batch)
        inputs = torch.zeros(len(batch), width, dtype=torch.long)
        targets = torch.full_like(inputs, -100)
        for row, (start, end, first) in enumerate(batch):
            ids = torch.from_numpy(text.read(start, end + 1).astype(np.int64))
            inputs[row, : end - start] = ids[:-1]
            targets[row, first - start - 1 : end - start] = ids[first - start :]
            if text.marked:
                targets[row, : end - start][torch.from_numpy(text.marks(start + 1, end + 1) & IN_LOSS == 0)] = -100
        with torch.inference_mode():
            logits = model(input_ids=inputs.to(accelerator.device), use_cache=False).logits.float()
            nats = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten().to(logits.device), reduction="none"
            ).view(targets.shape)
        sums = nats.double().sum(1).tolist() if nats.device.type != "mps" else nats.cpu().double().sum(1).tolist()
        counts = (targets != -100).sum(1).tolist()
        scored += [[number, row, *pair] for row, pair in enumerate(zip(sums, counts, strict=True))]
    return sorted(gather_object(scored)) if accelerator.num_processes > 1 else scored


def summarize(scored: list[list], text_bytes: int, words: int) -> Score:
    """Add the windows up; the standard error is that of a ratio over clusters (the windows)."""
    sums = np.array([window[2] for window in scored])
    counts = np.array([window[3] for window in scored])
    mean = sums.sum() / counts.sum()
    residuals = sums - mean * counts
    correction = len(sums) / max(1, len(sums) - 1)
    error = math.sqrt(correction * float(residuals @ residuals)) / float(counts.sum())
    return Score(float(sums.sum()), int(counts.sum()), text_bytes, words, error)


def _size_of(text: TokenText, tokenizer: Any) -> tuple[int, int]:
    """(UTF-8 bytes, words) of what is to be foreseen, without special tokens, decoded piece by piece."""
    text_bytes = words = 0
    for start in range(0, len(text), DECODED_AT_ONCE):
        stop = min(start + DECODED_AT_ONCE, len(text))
        parts = [text.read(start, stop)]
        if text.marked:
            marks = text.marks(start, stop)
            ends = np.flatnonzero(marks & ENDS_DOCUMENT) + 1
            learned = zip(np.split(parts[0], ends), np.split(marks & IN_LOSS > 0, ends), strict=True)
            parts = [ids[of] for ids, of in learned]
        for ids in parts:
            decoded = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
            text_bytes, words = text_bytes + len(decoded.encode()), words + len(decoded.split())
    return text_bytes, words


def evaluate(name: str, args: argparse.Namespace, accelerator: Any) -> Score:
    """Score one model on the text that `args` name. Raises UserError where model, tokenizer and text do not fit."""
    import torch
    from transformers import AutoModelForCausalLM

    import modeling_minigpt  # noqa: F401 - registers MiniGPT with the Auto classes, so no trust is needed
    from minigpt.data.tokenizer import load_tokenizer
    from minigpt.modeling.packed_linear import pack_linears

    tokenizer = load_tokenizer(name)
    text, text_bytes, words = _text(args, name, tokenizer)
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=args.trust_remote_code)
    limit = model.config.max_position_embeddings
    block_size = args.block_size or limit
    stride = args.stride or block_size
    if block_size > limit:
        raise UserError(f"block_size={block_size} is longer than the {limit} positions of {name}")
    if stride > block_size:
        raise UserError(f"stride={stride} is greater than block_size={block_size} and would skip tokens")
    model = pack_linears(model.to(accelerator.device))
    return summarize(score(model, text, block_size, stride, args.batch_size, accelerator), text_bytes, words)


def _text(args: argparse.Namespace, name: str, tokenizer: Any) -> tuple[TokenText, int, int]:
    """The tokens to score, and how many UTF-8 bytes and words of text they stand for."""
    from minigpt.data.encoding import Encoder, Encoding
    from minigpt.data.shards import open_shards
    from minigpt.data.tokenizer import tokenizer_hash

    if args.text_file is not None:
        try:
            raw = args.text_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{args.text_file}: not UTF-8 at byte {error.start}") from error
        ids = Encoder(Encoding.of(tokenizer, np.dtype(np.uint32))).encode([raw])[0]
        if len(ids) < 2:
            raise UserError(f"{args.text_file}: fewer than two tokens, nothing to foresee")
        return EncodedText(ids), len(raw.encode()), len(raw.split())
    shards = open_shards(args.data)
    tokens = getattr(shards, args.split)
    if tokens is None:
        raise UserError(f"data={args.data} has no {args.split} split")
    if shards.tokenizer_hash is not None and shards.tokenizer_hash != tokenizer_hash(tokenizer):
        raise UserError(f"data={args.data} was made with another tokenizer than that of {name}; use --text_file")
    text_bytes, words = _size_of(tokens, tokenizer)
    return tokens, text_bytes if tokens.marked else tokens.text_bytes or text_bytes, words
