"""Benchmark decoding: our model beside transformers' GPT-2."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

from minigpt.benchmarks.report import describe_machine

PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Row:
    """One line of the table. Rates are tokens per second over the whole batch, medians over the turns."""

    batch_size: int
    dtype: str
    mode: str
    minigpt_tokens_per_s: float
    gpt2_tokens_per_s: float
    ratio: float  # median over turns of (ours / theirs)
    ratio_low: float  # the slowest and fastest turn
    ratio_high: float
    weight_gb_per_s: float  # what our decoding reads of the weights


def twins(dtype: str, device: str, layers: int = 12) -> tuple[Any, Any]:
    """A MiniGPT and transformers' GPT-2 with the same random weights, in GPT-2 124M's shape but for `layers`."""
    import torch
    from transformers import GPT2LMHeadModel

    from configuration_minigpt import MiniGPTConfig
    from minigpt.modeling.gpt2 import gpt2_config, gpt2_state_dict
    from modeling_minigpt import MiniGPTForCausalLM

    torch.manual_seed(0)
    ours = MiniGPTForCausalLM(MiniGPTConfig(num_hidden_layers=layers))
    theirs = GPT2LMHeadModel(gpt2_config(ours.config))
    theirs.load_state_dict(gpt2_state_dict(ours))
    return tuple(model.to(device, getattr(torch, dtype)).eval() for model in (ours, theirs))  # type: ignore[return-value]


def measure(ours: Any, theirs: Any, mode: str, batch_size: int, new_tokens: int, turns: int) -> Row:
    """Both models speak in turns; the first turn (which compiles) is not counted."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(turns + 1):
        seconds["ours"].append(decode_seconds(ours, mode, batch_size, new_tokens))
        seconds["theirs"].append(decode_seconds(theirs, mode, batch_size, new_tokens))
    ours_s, theirs_s = seconds["ours"][1:], seconds["theirs"][1:]
    ratios = [their / our for our, their in zip(ours_s, theirs_s, strict=True)]
    steps_per_s = new_tokens / statistics.median(ours_s)
    return Row(
        batch_size=batch_size,
        dtype=str(ours.dtype).removeprefix("torch."),
        mode=mode,
        minigpt_tokens_per_s=batch_size * steps_per_s,
        gpt2_tokens_per_s=batch_size * new_tokens / statistics.median(theirs_s),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        weight_gb_per_s=weight_bytes(theirs) * steps_per_s / 1e9,
    )


def decode_seconds(model: Any, mode: str, batch_size: int, new_tokens: int) -> float:
    """Seconds of `generate` for exactly `new_tokens` greedy tokens after a prompt; the prompt's own time is in it."""
    import torch
    from transformers import CompileConfig

    prompt = torch.arange(batch_size * PROMPT_TOKENS, device=model.device).view(batch_size, PROMPT_TOKENS)
    options: dict[str, Any] = {"cache_implementation": "dynamic"}
    if mode == "compiled":
        compile_config = CompileConfig(fullgraph=True, mode="default" if model.device.type == "cpu" else None)
        compile_config._compile_all_devices = True  # else transformers compiles on accelerators alone
        options = {"cache_implementation": "static", "compile_config": compile_config}
    synchronize(model.device)
    begin = time.perf_counter()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    synchronize(model.device)
    seconds = time.perf_counter() - begin
    if output.shape[1] != PROMPT_TOKENS + new_tokens:
        raise RuntimeError(f"{output.shape[1] - PROMPT_TOKENS} tokens came where {new_tokens} were asked for")
    return seconds


def weight_bytes(model: Any) -> int:
    """Bytes of a GPT-2's weights that a decoding step reads: all but the position table, of which it needs a row."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    table = model.transformer.wpe.weight
    return int(total - table.numel() * table.element_size())


def memory_bandwidth(device: str) -> float:
    """Gigabytes per second that memory delivers to the threads in use: the best of several sums over a gigabyte."""
    import torch

    numbers = torch.ones(2**28, device=device)  # 1 GiB, far beyond any cache
    best = 0.0
    for _ in range(8):
        synchronize(numbers.device)
        begin = time.perf_counter()
        numbers.sum()
        synchronize(numbers.device)
        best = max(best, numbers.numel() * numbers.element_size() / (time.perf_counter() - begin))
    return best / 1e9


def synchronize(device: Any) -> None:
    """Wait until `device` has done what it was told."""
    import torch

    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def describe(report: dict[str, Any]) -> str:
    """The sentences above the table."""
    return f"{describe_machine(report['machine'])} Memory delivers {report['bandwidth_gb_per_s']:.1f} GB/s."


def markdown(rows: list[Row], bandwidth_gb_per_s: float) -> str:
    """The table; its last column is the share of `bandwidth_gb_per_s` that our decoding reached."""
    lines = [
        "| batch | dtype | mode | MiniGPT tokens/s | GPT-2 tokens/s | ratio (slowest to fastest) | of the limit |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.batch_size} | {row.dtype} | {row.mode} | {row.minigpt_tokens_per_s:.1f} "
            f"| {row.gpt2_tokens_per_s:.1f} | {row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f}) "
            f"| {row.weight_gb_per_s / bandwidth_gb_per_s:.0%} |"
        )
    return "\n".join(lines)
