"""Compare a model in llama.cpp, in ONNX Runtime and in MiniGPT: the same text, the same prompts, in turns.

Shapes: T tokens of a text, V vocabulary.
"""

import copy
import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from minigpt.benchmarks.engine_drivers import Engine, LlamaCpp, MiniGPTEngine, OnnxRuntime
from minigpt.evaluation.metrics import bits_per_byte
from minigpt.evaluation.perplexity import read_text_file
from minigpt.export.gguf import OUTTYPES, export_gguf
from minigpt.export.onnx import FILE_NAMES, export_onnx
from minigpt.export.source import Source
from minigpt.generation.sampling import decode, end_of_text_ids
from minigpt.utils.errors import UserError, first_line
from minigpt.utils.formatting import markdown_table

PROMPTS = 5
PAUSE = 0.2  # seconds between engines: threads of ONNX Runtime stay busy for a while after their work


@dataclass
class Row:
    """One line of the table. The reference is MiniGPT in float32; a row of `llama-bench` has no fidelity."""

    engine: str
    dtype: str
    size_mb: float
    greedy_equal: int | None = None  # of PROMPTS
    largest_difference: float | None = None  # of all log-probabilities, in nats
    top1_agreement: float | None = None
    bits_per_byte: float | None = None
    tokens_per_s: float = 0.0


def sample_windows(source: Source, text_file: Path, tokens: int, new_tokens: int) -> list[list[int]]:
    """PROMPTS windows of `tokens` ids, evenly spaced over a text.

    Raises UserError if the text is too short, or if a window or its first half with `new_tokens` exceeds the context.
    """
    limit, needed = source.model.config.max_position_embeddings, max(tokens, tokens // 2 + new_tokens)
    if needed > limit:
        raise UserError(
            f"window_tokens={tokens} and new_tokens={new_tokens} need {needed} positions; the model has {limit}"
        )
    text = read_text_file(text_file, source.tokenizer).tokens
    if len(text) < PROMPTS * tokens:
        raise UserError(
            f"{text_file} has {len(text)} tokens; {PROMPTS} windows of {tokens} need {PROMPTS * tokens}; "
            "lower --window_tokens"
        )
    starts = np.linspace(0, len(text) - tokens, PROMPTS).astype(int).tolist()
    return [text.read(start, start + tokens).tolist() for start in starts]


def load_engines(name_or_folder: str, source: Source, folder: Path, threads: int) -> list[Engine]:
    """Export the model into `folder` in all types, and load it in all engines. The first is MiniGPT in float32."""
    end_ids, context = end_of_text_ids(source.model, source.tokenizer), source.model.config.max_position_embeddings
    files = [export_gguf(name_or_folder, folder, outtype).model for outtype in OUTTYPES]
    export_onnx(name_or_folder, folder / "onnx_export", list(FILE_NAMES))
    bfloat16 = copy.deepcopy(source.model).to(torch.bfloat16)  # type: ignore[arg-type]  # declared without its self
    engines: list[Engine] = [MiniGPTEngine(model, end_ids) for model in (source.model, bfloat16)]
    engines += [LlamaCpp(file, context, threads) for file in files]
    for name in FILE_NAMES.values():
        engines.append(OnnxRuntime(folder / "onnx_export" / "onnx" / f"{name}.onnx", end_ids, threads))
    return engines


def compare(
    engines: Sequence[Engine],
    tokenizer: PreTrainedTokenizerBase,
    windows: list[list[int]],
    new_tokens: int,
    turns: int,
) -> list[Row]:
    """A row for each engine; the first is the reference. In each turn all engines decode, and speeds are medians.

    windows: parts of a text, as ids. All but their first tokens are targets, and their first half is a prompt.
    """
    prompts = [window[: len(window) // 2] for window in windows]
    reference = np.concatenate([engines[0].log_probabilities(window[:-1]) for window in windows])
    reference_ids = [engines[0].greedy(prompt, new_tokens) for prompt in prompts]
    targets = [token for window in windows for token in window[1:]]
    text_bytes = sum(len(decode(tokenizer, window[1:]).encode()) for window in windows)
    rows = []
    for engine in engines:
        scores = np.concatenate([engine.log_probabilities(window[:-1]) for window in windows])
        same = [engine.greedy(prompt, new_tokens) == ids for prompt, ids in zip(prompts, reference_ids, strict=True)]
        nats = -float(scores[np.arange(len(targets)), targets].sum(dtype=np.float64))
        rows.append(
            Row(
                engine=engine.name,
                dtype=engine.dtype,
                size_mb=engine.size_bytes / 1e6,
                greedy_equal=sum(same),
                largest_difference=float(np.abs(scores - reference).max()),
                top1_agreement=float((scores.argmax(1) == reference.argmax(1)).mean()),
                bits_per_byte=bits_per_byte(nats, text_bytes),
            )
        )
    seconds: list[list[float]] = [[] for _ in engines]
    for turn in range(turns):
        for engine, times in zip(engines, seconds, strict=True):
            time.sleep(PAUSE)
            started = time.perf_counter()
            engine.greedy(prompts[turn % PROMPTS], new_tokens)
            times.append(time.perf_counter() - started)
    for row, times in zip(rows, seconds, strict=True):
        row.tokens_per_s = new_tokens / statistics.median(times)
    return rows


def llama_bench(binary: str, file: Path, new_tokens: int, turns: int, threads: int) -> Row:
    """The decoding speed that llama.cpp's own `llama-bench` measures. Raises UserError if it does not run."""
    options = {"-m": file, "-p": 0, "-n": new_tokens, "-r": turns, "-t": threads, "-o": "json"}
    command = [binary, *(str(word) for pair in options.items() for word in pair)]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        speed = float(json.loads(output)[0]["avg_ts"])
    except (OSError, subprocess.CalledProcessError, ValueError, LookupError) as error:
        raise UserError(f"llama_bench={binary} does not run: {first_line(error)}") from error
    return Row("llama-bench", file.stem.rpartition("-")[2].lower(), file.stat().st_size / 1e6, tokens_per_s=speed)


def markdown(rows: Sequence[Row]) -> str:
    """The table. The last column compares the speed with that of the first row."""
    head = (
        "engine",
        "dtype",
        "MB",
        "greedy equal",
        "largest difference",
        "top-1",
        "bits per byte",
        "tokens/s",
        "ratio",
    )
    cells = []
    for row in rows:
        fidelity = ["", "", "", ""]
        if row.greedy_equal is not None:
            fidelity = [f"{row.greedy_equal} of {PROMPTS}", f"{row.largest_difference:.1e}"]
            fidelity += [f"{row.top1_agreement:.1%}", f"{row.bits_per_byte:.4f}"]
        speed = [f"{row.tokens_per_s:.1f}", f"{row.tokens_per_s / rows[0].tokens_per_s:.2f}"]
        cells.append((row.engine, row.dtype, f"{row.size_mb:.1f}", *fidelity, *speed))
    return markdown_table(head, cells, numeric=True)
