"""How well does a model foresee a text? `minigpt eval`: loss, perplexity and bits per byte over all of it.

The text is read in windows of `block_size` tokens that start `stride` apart. A window scores only targets that no
window before it has scored, so every token but the very first counts once, and with stride < block_size each is
foreseen from at least block_size - stride tokens (the strided perplexity of transformers' guide).

Of prompts with completions, each is read alone, and the completions are what is to be foreseen.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minigpt.shards import ENDS_DOCUMENT, IN_LOSS

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


@dataclass(frozen=True)
class Score:
    """What a model makes of a text: the sum of its loss, and what it is spread over."""

    loss_nats: float
    targets: int
    text_bytes: int
    words: int
    standard_error: float  # of the mean loss, nats a token; windows are the sampling units

    def as_dict(self) -> dict[str, float]:
        """The metrics under the names that the trainer uses."""
        mean = self.loss_nats / self.targets
        return {
            "loss": mean,
            "standard_error": self.standard_error,
            "perplexity": math.exp(min(mean, 700.0)),
            "word_perplexity": math.exp(min(self.loss_nats / max(1, self.words), 700.0)),
            "bits_per_byte": self.loss_nats / math.log(2) / max(1, self.text_bytes),
            "tokens": self.targets,
        }


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `minigpt eval`."""
    parser.add_argument("--model", nargs="+", required=True, help="folders or Hub names; several make a table")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="folder of prepared shards")
    source.add_argument("--text_file", type=Path, help="raw UTF-8 text, encoded with each model's own tokenizer")
    parser.add_argument("--split", choices=["validation", "train"], default="validation", help="split of --data")
    parser.add_argument("--block_size", type=int, help="tokens a window (default: the model's longest context)")
    parser.add_argument("--stride", type=int, help="tokens between the starts of windows (default: block_size)")
    parser.add_argument("--batch_size", type=int, default=8, help="windows a batch of one process")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--use_cpu", action="store_true", help="evaluate on the CPU even where there is a GPU")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", metavar="FILE", help="keep the results here, JSON as `evaluate.save` writes it")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that a foreign model brings")


def main(args: argparse.Namespace) -> None:
    """`minigpt eval`; under `accelerate launch -m minigpt eval …` the windows are shared by all processes."""
    for name in ("block_size", "stride", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=args.use_cpu or not torch.accelerator.is_available())
    results = {name: evaluate(name, args, accelerator).as_dict() for name in args.model}
    if accelerator.is_main_process:
        print(json.dumps(results, indent=2) if args.json else _table(results))
        if args.output:
            from evaluate import save

            save(args.output, text=args.data or str(args.text_file), results=results)


def evaluate(name: str, args: argparse.Namespace, accelerator: Any) -> Score:
    """Score one model on the text that `args` name. Raises ValueError where model, tokenizer and text do not fit."""
    import torch
    from transformers import AutoModelForCausalLM

    import modeling_minigpt  # noqa: F401 - registers MiniGPT with the Auto classes, so no trust is needed
    from minigpt.packed_linear import pack_linears
    from minigpt.tokenization import load_tokenizer

    tokenizer = load_tokenizer(name)
    text, text_bytes, words = _text(args, name, tokenizer)
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=args.trust_remote_code)
    limit = model.config.max_position_embeddings
    block_size = args.block_size or limit
    stride = args.stride or block_size
    if block_size > limit:
        raise ValueError(f"block_size={block_size} is longer than the {limit} positions of {name}")
    if stride > block_size:
        raise ValueError(f"stride={stride} is greater than block_size={block_size} and would skip tokens")
    model = pack_linears(model.to(accelerator.device))
    return summarize(score(model, text, block_size, stride, args.batch_size, accelerator), text_bytes, words)


def _text(args: argparse.Namespace, name: str, tokenizer: Any) -> tuple[TokenText, int, int]:
    """The tokens to score, and how many UTF-8 bytes and words of text they stand for."""
    from minigpt.encoding import Encoder, Encoding
    from minigpt.shards import open_shards
    from minigpt.tokenization import tokenizer_hash

    if args.text_file is not None:
        try:
            raw = args.text_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.text_file}: not UTF-8 at byte {error.start}") from error
        ids = Encoder(Encoding.of(tokenizer, np.dtype(np.uint32))).encode([raw])[0]
        if len(ids) < 2:
            raise ValueError(f"{args.text_file}: fewer than two tokens, nothing to foresee")
        return EncodedText(ids), len(raw.encode()), len(raw.split())
    shards = open_shards(args.data)
    tokens = getattr(shards, args.split)
    if tokens is None:
        raise ValueError(f"data={args.data} has no {args.split} split")
    if shards.tokenizer_hash is not None and shards.tokenizer_hash != tokenizer_hash(tokenizer):
        raise ValueError(f"data={args.data} was made with another tokenizer than that of {name}; use --text_file")
    text_bytes, words = _size_of(tokens, tokenizer)
    return tokens, text_bytes if tokens.marked else tokens.text_bytes or text_bytes, words


def _table(results: dict[str, dict[str, float]]) -> str:
    columns = ("loss", "± (se)", "perplexity", "word ppl", "bits/byte", "tokens")
    width = max(len("model"), *map(len, results))
    lines = [f"{'model':<{width}}  " + "  ".join(f"{column:>11}" for column in columns)]
    for name, result in results.items():
        cells = [f"{result['loss']:.4f}", f"{result['standard_error']:.4f}", f"{result['perplexity']:.3f}"]
        cells += [f"{result['word_perplexity']:.2f}", f"{result['bits_per_byte']:.4f}", f"{result['tokens']:,}"]
        lines.append(f"{name:<{width}}  " + "  ".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)
