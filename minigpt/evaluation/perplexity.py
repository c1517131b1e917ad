"""Loss and perplexity over a whole text, in windows of a fixed stride.

Shapes: N tokens of the text, B windows of a batch, T tokens of the longest of them, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minigpt.data.encoding import Encoder, EncoderSpec
from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS, open_shards
from minigpt.data.tokenizer import tokenizer_hash
from minigpt.evaluation.loss import target_losses
from minigpt.evaluation.metrics import Score
from minigpt.generation.sampling import context_length, decode
from minigpt.modeling.loss import IGNORE_INDEX
from minigpt.utils.errors import UserError
from minigpt.utils.files import read_text
from minigpt.utils.progress import Progress

TOKENS_DECODED_AT_ONCE = 1 << 20


class TokenText(Protocol):
    """Token ids that are read by position, with marks if not all are targets, such as `minigpt.data.shards.Tokens`."""

    @property
    def has_loss_mask(self) -> bool: ...
    def __len__(self) -> int: ...
    def read(self, start: int, stop: int) -> np.ndarray: ...
    def marks(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class EncodedText:
    """A text in memory as token ids [N]; every token is a target."""

    ids: np.ndarray
    has_loss_mask = False

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]

    def marks(self, start: int, stop: int) -> np.ndarray:
        return np.full(stop - start, IN_LOSS, np.uint8)


@dataclass(frozen=True)
class MeasuredText:
    """A text to evaluate, and its size in UTF-8 bytes and words."""

    tokens: TokenText
    text_bytes: int
    words: int


@dataclass(frozen=True, order=True)
class WindowLoss:
    """The summed loss of the targets that one window scores. Windows sort in the order of the text."""

    batch: int
    row: int
    loss_nats: float
    targets: int


def read_text_file(path: Path, tokenizer: PreTrainedTokenizerFast) -> MeasuredText:
    """A UTF-8 text file, encoded. Raises UserError if it cannot be read or is too short."""
    text = read_text(path)
    try:
        ids = Encoder(EncoderSpec.from_tokenizer(tokenizer, np.dtype(np.uint32))).encode([text])[0]
    except UserError as error:  # a character that the tokenizer does not know
        raise UserError(f"{path}: {error}") from error
    if len(ids) < 2:
        raise UserError(f"{path}: fewer than two tokens, so there is nothing to predict")
    return MeasuredText(EncodedText(ids), len(text.encode()), len(text.split()))


def read_split(folder: str, split: str, tokenizer: PreTrainedTokenizerFast) -> MeasuredText:
    """A split ("train" or "validation") of prepared token shards.

    Raises UserError if there is no such split, or if the shards were prepared with another tokenizer.
    """
    shards = open_shards(folder)
    tokens = shards.train if split == "train" else shards.validation
    if tokens is None:
        raise UserError(f"data={folder} has no {split} split")
    if shards.tokenizer_hash is not None and shards.tokenizer_hash != tokenizer_hash(tokenizer):
        raise UserError(f"data={folder} was prepared with another tokenizer than that of the model; use --text_file")
    text_bytes, words = _size_of_targets(tokens, tokenizer)
    if not tokens.has_loss_mask and tokens.text_bytes:
        text_bytes = tokens.text_bytes
    return MeasuredText(tokens, text_bytes, words)


def evaluate_model(
    model: PreTrainedModel,
    text: MeasuredText,
    *,
    block_size: int | None,
    stride: int | None,
    batch_size: int,
    accelerator: Accelerator,
    description: str = "evaluation",
) -> Score:
    """Score every token of a text but the first. All processes take part and get the same result.

    - block_size: tokens per window; None is the longest context of the model.
    - stride: tokens between the starts of windows; None is `block_size`.

    Raises UserError if they do not fit the model or each other.
    """
    limit = context_length(model)
    block_size = block_size or limit
    if block_size is None:
        raise UserError("the model has no limit to its context; give --block_size")
    stride = stride or block_size
    if limit is not None and block_size > limit:
        raise UserError(f"block_size={block_size} is longer than the {limit} positions of the model")
    if stride > block_size:
        raise UserError(f"stride={stride} is greater than block_size={block_size} and would skip tokens")
    losses = window_losses(model, text.tokens, block_size, stride, batch_size, accelerator, description)
    return summarize(losses, text.text_bytes, text.words)


def windows(length: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first): a window's inputs are tokens [start, end); its targets [first, end] count, once each."""
    first_unscored = 1
    for start in range(0, length - 1, stride):
        end = min(start + block_size, length - 1)
        if end >= first_unscored:
            yield start, end, first_unscored
            first_unscored = end + 1
        if end == length - 1:
            return


def text_windows(text: TokenText, block_size: int, stride: int) -> list[tuple[int, int, int]]:
    """The windows of the whole text, or of each of its documents if it has a loss mask."""
    if not text.has_loss_mask:
        return list(windows(len(text), block_size, stride))
    ends = np.flatnonzero(text.marks(0, len(text)) & ENDS_DOCUMENT) + 1
    return [
        (document + start, document + end, document + first)
        for document, document_end in pairwise([0, *ends.tolist()])
        for start, end, first in windows(document_end - document, block_size, stride)
    ]


def window_losses(
    model: PreTrainedModel,
    text: TokenText,
    block_size: int,
    stride: int,
    batch_size: int,
    accelerator: Accelerator,
    description: str,
) -> list[WindowLoss]:
    """The loss of each window, in the order of the text, gathered from all processes.

    Logits [B, T, V] are scored in float32 and summed in float64; windows of a batch are padded to the longest.
    """
    spans = text_windows(text, block_size, stride)
    batches = [spans[first : first + batch_size] for first in range(0, len(spans), batch_size)]
    own_numbers = range(accelerator.process_index, len(batches), accelerator.num_processes)
    own_windows = sum(len(batches[number]) for number in own_numbers)
    losses = []
    model.eval()
    with Progress(description, own_windows, "windows", enabled=accelerator.is_main_process) as progress:
        for number in own_numbers:
            inputs, targets = _batch(text, batches[number])
            with torch.inference_mode():
                logits = model(input_ids=inputs.to(accelerator.device), use_cache=False).logits
                nats = target_losses(logits, targets).cpu().double().sum(1)  # on the CPU: MPS has no float64
            counts = (targets != IGNORE_INDEX).sum(1)
            pairs = zip(nats.tolist(), counts.tolist(), strict=True)
            losses += [WindowLoss(number, row, *pair) for row, pair in enumerate(pairs)]
            progress.update(len(batches[number]))
    return sorted(gather_object(losses)) if accelerator.num_processes > 1 else losses


def _batch(text: TokenText, spans: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [B, T] and targets [B, T] of some windows."""
    width = max(end - start for start, end, _ in spans)
    inputs = torch.zeros(len(spans), width, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORE_INDEX)
    for row, (start, end, first) in enumerate(spans):
        ids = torch.from_numpy(text.read(start, end + 1).astype(np.int64))
        inputs[row, : end - start] = ids[:-1]
        targets[row, first - start - 1 : end - start] = ids[first - start :]
        if text.has_loss_mask:
            masked = torch.from_numpy(text.marks(start + 1, end + 1) & IN_LOSS == 0)
            targets[row, : end - start][masked] = IGNORE_INDEX
    return inputs, targets


def summarize(losses: list[WindowLoss], text_bytes: int, words: int) -> Score:
    """The score of the whole text. The standard error is that of a ratio over clusters, which are the windows."""
    sums = np.array([window.loss_nats for window in losses])
    counts = np.array([window.targets for window in losses])
    mean = sums.sum() / counts.sum()
    residuals = sums - mean * counts
    correction = len(sums) / max(1, len(sums) - 1)
    error = math.sqrt(correction * float(residuals @ residuals)) / float(counts.sum())
    return Score(float(sums.sum()), int(counts.sum()), text_bytes, words, error)


def _size_of_targets(text: TokenText, tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """(UTF-8 bytes, words) of the tokens in the loss, without special tokens; decoded piece by piece."""
    text_bytes = words = 0
    for start in range(0, len(text), TOKENS_DECODED_AT_ONCE):
        stop = min(start + TOKENS_DECODED_AT_ONCE, len(text))
        parts = [text.read(start, stop)]
        if text.has_loss_mask:
            marks = text.marks(start, stop)
            ends = np.flatnonzero(marks & ENDS_DOCUMENT) + 1
            documents = zip(np.split(parts[0], ends), np.split(marks & IN_LOSS > 0, ends), strict=True)
            parts = [ids[in_loss] for ids, in_loss in documents]
        for ids in parts:
            decoded = decode(tokenizer, ids.tolist(), skip_special_tokens=True)
            text_bytes, words = text_bytes + len(decoded.encode()), words + len(decoded.split())
    return text_bytes, words
