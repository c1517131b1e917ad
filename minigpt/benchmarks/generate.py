"""Compare the decoding speed of MiniGPT with transformers' GPT-2, and with llama.cpp."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel, PreTrainedModel

from configuration_minigpt import MiniGPTConfig
from minigpt.benchmarks.engines import llama_bench
from minigpt.data.tokenizer import train_characters
from minigpt.export.gguf import export_gguf
from minigpt.generation.cpu_decoding import decode
from minigpt.generation.static_cache import compile_config
from minigpt.modeling.gpt2 import gpt2_config, gpt2_state_dict
from minigpt.utils.formatting import markdown_table
from modeling_minigpt import MiniGPTForCausalLM

PROMPT_TOKENS = 32
GGUF_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Row:
    """One line of the table. Rates are tokens per second over the whole batch, medians over the turns."""

    batch_size: int
    dtype: str
    mode: str
    minigpt_tokens_per_s: float
    gpt2_tokens_per_s: float
    ratio: float  # median over turns of (MiniGPT's speed / GPT-2's)
    ratio_low: float  # the smallest and the largest of these
    ratio_high: float
    weight_gb_per_s: float  # rate at which MiniGPT reads the weights
    llama_cpp_tokens_per_s: float | None = None  # it has no batches


def equal_models(dtype: str, device: str, layers: int = 12) -> tuple[MiniGPTForCausalLM, GPT2LMHeadModel]:
    """A MiniGPT and transformers' GPT-2 with the same random weights, in the shape of GPT-2 124M except `layers`."""
    torch.manual_seed(0)
    config = MiniGPTConfig(num_hidden_layers=layers)
    minigpt, gpt2 = MiniGPTForCausalLM(config), GPT2LMHeadModel(gpt2_config(config))
    gpt2.load_state_dict(gpt2_state_dict(minigpt))
    for model in (minigpt, gpt2):
        model.eval().to(device, getattr(torch, dtype))
    return minigpt, gpt2


def measure(
    minigpt: PreTrainedModel,
    gpt2: PreTrainedModel,
    mode: str,
    batch_size: int,
    new_tokens: int,
    turns: int,
    compile_backend: str = "inductor",
    llama_cpp: Callable[[], float] | None = None,
) -> Row:
    """Let the models decode in turns. The first turn, which compiles, is not counted.

    llama_cpp: measures the tokens per second of llama.cpp once.
    """
    minigpt_s, gpt2_s, llama_cpp_tokens_per_s = [], [], []
    for _ in range(turns + 1):
        minigpt_s.append(decode_seconds(minigpt, mode, batch_size, new_tokens, compile_backend))
        # transformers' GPT-2 has no loop of its own
        gpt2_s.append(
            decode_seconds(gpt2, "eager" if mode == "loop" else mode, batch_size, new_tokens, compile_backend)
        )
        if llama_cpp is not None:
            llama_cpp_tokens_per_s.append(llama_cpp())
    del minigpt_s[0], gpt2_s[0], llama_cpp_tokens_per_s[:1]
    ratios = [gpt2_turn / minigpt_turn for minigpt_turn, gpt2_turn in zip(minigpt_s, gpt2_s, strict=True)]
    steps_per_s = new_tokens / statistics.median(minigpt_s)
    return Row(
        batch_size=batch_size,
        dtype=str(minigpt.dtype).removeprefix("torch."),
        mode=mode,
        minigpt_tokens_per_s=batch_size * steps_per_s,
        gpt2_tokens_per_s=batch_size * new_tokens / statistics.median(gpt2_s),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        weight_gb_per_s=weight_bytes(gpt2) * steps_per_s / 1e9,
        llama_cpp_tokens_per_s=statistics.median(llama_cpp_tokens_per_s) if llama_cpp_tokens_per_s else None,
    )


def gguf_file(model: MiniGPTForCausalLM, folder: Path) -> Path:
    """Write the model as GGUF in its own dtype, with a made-up vocabulary, since llama.cpp loads none without one."""
    source = folder / "model"
    model.save_pretrained(source)
    first = 0x20000  # code points without surrogates among them; the last id is <|endoftext|>
    characters = map(chr, range(first, first + model.config.vocab_size - 1))
    train_characters(characters).save_pretrained(source)
    return export_gguf(source, folder, GGUF_TYPES[str(model.dtype).removeprefix("torch.")]).model


def llama_cpp_speed(binary: str, file: Path, new_tokens: int, threads: int) -> float:
    """Tokens per second of one run of llama.cpp's `llama-bench`. Raises UserError if it does not run."""
    return llama_bench(binary, file, new_tokens, turns=1, threads=threads).tokens_per_s


def decode_seconds(
    model: PreTrainedModel, mode: str, batch_size: int, new_tokens: int, compile_backend: str = "inductor"
) -> float:
    """Seconds that `generate` takes for the prompt and exactly `new_tokens` greedy tokens."""
    prompt = torch.arange(batch_size * PROMPT_TOKENS, device=model.device).view(batch_size, PROMPT_TOKENS)
    options: dict[str, Any] = {"cache_implementation": "dynamic"}
    if mode == "loop":
        options["custom_generate"] = decode
    if mode == "compiled":
        compilation = compile_config(model.device.type, compile_backend, fullgraph=True)
        options = {"cache_implementation": "static", "compile_config": compilation}
    synchronize(model.device)
    started = time.perf_counter()
    output: torch.Tensor = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    synchronize(model.device)
    seconds = time.perf_counter() - started
    generated = output.shape[1] - PROMPT_TOKENS
    if generated != new_tokens:
        raise RuntimeError(f"generate returned {generated} new tokens instead of {new_tokens}")
    return seconds


def weight_bytes(gpt2: PreTrainedModel) -> int:
    """Bytes of weights that a decoding step reads: all except the position table; it reads one row of that."""
    positions = gpt2.get_parameter("transformer.wpe.weight")
    return sum(parameter.nbytes for parameter in gpt2.parameters()) - positions.nbytes


def memory_bandwidth(device: str) -> float:
    """Gigabytes per second that memory delivers to the threads in use: the best of several sums over 1 GiB."""
    numbers = torch.ones(2**28, device=device)  # 1 GiB, much larger than any cache
    best = 0.0
    for _ in range(8):
        synchronize(numbers.device)
        started = time.perf_counter()
        numbers.sum()
        synchronize(numbers.device)
        best = max(best, numbers.nbytes / (time.perf_counter() - started))
    return best / 1e9


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished its work."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def markdown(rows: Sequence[Row], bandwidth_gb_per_s: float) -> str:
    """The table; the share of the limit is that of `bandwidth_gb_per_s` which MiniGPT's decoding reached.

    Speeds of llama.cpp are in a last column, if there are any.
    """
    head = [
        "batch",
        "dtype",
        "mode",
        "MiniGPT tokens/s",
        "GPT-2 tokens/s",
        "ratio (lowest to highest)",
        "of the limit",
    ]
    cells = [
        [
            str(row.batch_size),
            row.dtype,
            row.mode,
            f"{row.minigpt_tokens_per_s:.1f}",
            f"{row.gpt2_tokens_per_s:.1f}",
            f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})",
            f"{row.weight_gb_per_s / bandwidth_gb_per_s:.0%}",
        ]
        for row in rows
    ]
    if any(row.llama_cpp_tokens_per_s is not None for row in rows):
        head.append("llama.cpp tokens/s")
        for row, line in zip(rows, cells, strict=True):
            line.append("" if row.llama_cpp_tokens_per_s is None else f"{row.llama_cpp_tokens_per_s:.1f}")
    return markdown_table(head, cells, numeric=True)
