"""Benchmark training: our trainer beside nanoGPT and transformers' Trainer."""

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from minigpt.benchmarks.report import describe_machine

SHAPES = {  # layers, heads, width, vocabulary, context, batch
    "124m": {"layers": 12, "heads": 12, "hidden": 768, "vocab_size": 50257, "block_size": 1024, "batch_size": 1},
    "shakespeare": {"layers": 4, "heads": 4, "hidden": 128, "vocab_size": 65, "block_size": 64, "batch_size": 12},
}

WAYS = ("minigpt", "minigpt-ddp", "bare", "nanogpt", "nanogpt-bf16", "transformers")

OPTIONS = ("mixed_precision", "compile", "gradient_checkpointing", "steps")

ALONE = tuple(way for way in WAYS if way != "minigpt-ddp")


@dataclass(frozen=True)
class Row:
    """One line of the table: medians over the turns of each turn's median step."""

    way: str
    tokens_per_s: float
    step_ms: float
    step_ms_low: float  # the fastest and the slowest turn
    step_ms_high: float
    memory_gib: float  # the highest of the turns
    mfu: float  # share of the measured matrix product
    ratio: float  # median over turns of (this way's step / ours): how many times as fast we are
    ratio_low: float
    ratio_high: float


def take_turn(way: str, shape: dict[str, int], args: argparse.Namespace, device: str, folder: Path) -> dict[str, Any]:
    """One way trains once: `seconds` of each timed step and `memory_gib`. Raises RuntimeError when it cannot."""
    if way.startswith("minigpt"):
        return _turn_of_minigpt(shape, args, device, 2 if way == "minigpt-ddp" else 1, folder)
    bf16 = args.mixed_precision == "bf16"
    if way.startswith("nanogpt"):  # it has no autocast on a CPU, and bfloat16 by default on a GPU
        bf16 = way == "nanogpt-bf16" or device == "cuda"
    turn = {"way": way.removesuffix("-bf16"), "bf16": bf16, "compile": args.compile, "device": device, **shape}
    turn |= {"steps": args.steps, "warmup": args.warmup, "threads": args.threads, "nanogpt": args.nanogpt}
    words = [sys.executable, "-m", "minigpt.benchmarks.train_worker", json.dumps(turn)]
    done = subprocess.run(words, capture_output=True, text=True, env=_environment(args))
    if done.returncode:
        raise RuntimeError(f"{way} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": result["seconds"], "memory_gib": result["memory_gib"]}


def _turn_of_minigpt(
    shape: dict[str, int], args: argparse.Namespace, device: str, processes: int, folder: Path
) -> dict[str, Any]:
    """train_accelerate.py, killed when it has logged enough steps: nothing of it is left out or added.

    Small steps are logged ten at a time, as its log has milliseconds.
    """
    every = 10 if shape["hidden"] * shape["block_size"] < 1 << 18 else 1
    last = (args.warmup + args.steps) * every
    words = [*_command_of_minigpt(shape, args, device, processes, folder), "--logging_steps", str(every)]
    environment = _environment(args, processes)
    process = psutil.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    said = []
    for line in process.stdout:  # its progress lines, the last of them when `last` steps are done
        said.append(line)
        if re.match(rf"step +{last}/", line):
            break
    family = [*process.children(recursive=True), process]  # a launcher's workers would go on without it
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family)
    process.stdout.close()
    if not said or not re.match(rf"step +{last}/", said[-1]):
        raise RuntimeError("minigpt failed:\n" + "".join(said[-20:]))
    metrics = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    at = {line["step"]: line for line in map(json.loads, metrics.splitlines())}
    ends = [at[step]["elapsed_s"] for step in range(args.warmup * every, last + 1, every)]
    seconds = [(end - begin) / every for begin, end in pairwise(ends)]
    return {"seconds": seconds, "memory_gib": processes * at[last]["train/peak_memory_gib"]}


def _command_of_minigpt(
    shape: dict[str, int], args: argparse.Namespace, device: str, processes: int, folder: Path
) -> list[str]:
    import numpy as np

    from minigpt.data.tokenizer import train_characters

    data = folder / "data"
    if not data.exists():
        data.mkdir()
        ids = np.random.default_rng(0).integers(shape["vocab_size"], size=64 * shape["block_size"] * 16)
        ids.astype(np.uint16).tofile(data / "train.bin")
        train_characters(["a"]).save_pretrained(data)
    script = importlib.util.find_spec("train_accelerate")
    assert script is not None
    assert script.origin is not None
    launch = [sys.executable]
    if args.compile or processes > 1:
        profile = "multi_gpu" if device == "cuda" else "cpu_ddp"
        if processes == 1:
            profile = "single_gpu" if device == "cuda" else "cpu"
        launch += ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", str(processes)]
        launch += ["--config_file", str(Path(script.origin).parent / "accelerate_configs" / f"{profile}.yaml")]
        launch += ["--dynamo_backend", "inductor"] if args.compile else []
    options = f"--hidden_size {shape['hidden']} --num_hidden_layers {shape['layers']} --vocab_size "
    options += f"{shape['vocab_size']} --num_attention_heads {shape['heads']} --block_size {shape['block_size']} "
    options += f"--per_device_train_batch_size {shape['batch_size'] // processes} --dropout 0 "
    options += f"--max_steps 1000000 --data {data} --tokenizer {data} --output_dir {folder / 'run'} "
    options += "--overwrite_output_dir --report_to none --save_steps 0 --eval_steps 0 "
    options += f"--mixed_precision {args.mixed_precision} --gradient_checkpointing {args.gradient_checkpointing}"
    return [*launch, script.origin, *options.split(), *(["--use_cpu"] if device == "cpu" else [])]


def _environment(args: argparse.Namespace, processes: int = 1) -> dict[str, str]:
    """Of a turn; several processes share the threads that one has."""
    import torch

    threads = max(1, (args.threads or torch.get_num_threads()) // processes)
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def matrix_product_flops(device: str, bf16: bool, threads: int | None = None) -> float:
    """Floating-point operations per second of the best of many matrix products, 4096 wide on a GPU, 1024 on a CPU."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    size = 1024 if device == "cpu" else 4096
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(4):
            product = left @ left
        product[0, 0].item()  # waits for the device
        best = min(best, (time.perf_counter() - begin) / 4)
    return 2 * size**3 / best


def summarize(turns: dict[str, list[dict[str, Any]]], shape: dict[str, int], ceiling_flops: float) -> list[Row]:
    """The rows of the table; `minigpt` must be among the ways of `turns`."""
    medians = {way: [statistics.median(turn["seconds"]) for turn in of] for way, of in turns.items()}
    rows = []
    for way, seconds in medians.items():
        ratios = [their / our for our, their in zip(medians["minigpt"], seconds, strict=True)]
        tokens_per_s = shape["batch_size"] * shape["block_size"] / statistics.median(seconds)
        rows.append(
            Row(
                way=way,
                tokens_per_s=tokens_per_s,
                step_ms=statistics.median(seconds) * 1e3,
                step_ms_low=min(seconds) * 1e3,
                step_ms_high=max(seconds) * 1e3,
                memory_gib=max(turn["memory_gib"] for turn in turns[way]),
                mfu=tokens_per_s * flops_per_token(shape) / ceiling_flops,
                ratio=statistics.median(ratios),
                ratio_low=min(ratios),
                ratio_high=max(ratios),
            )
        )
    return rows


def flops_per_token(shape: dict[str, int]) -> float:
    """FLOPs of training on one token in this shape."""
    import torch

    from minigpt.benchmarks.train_worker import config_of
    from minigpt.modeling.flops import train_flops_per_token
    from modeling_minigpt import MiniGPTForCausalLM

    config = config_of(shape)
    with torch.device("meta"):
        parameters = MiniGPTForCausalLM(config).num_parameters()
    return train_flops_per_token(parameters, config, shape["block_size"])


def describe(report: dict[str, Any]) -> str:
    """The sentences above the table."""
    shape, options = report["shape"], report["options"]
    return (
        f"{describe_machine(report['machine'])} {shape['layers']} layers, {shape['hidden']} wide, "
        f"{shape['vocab_size']:,} ids; {shape['batch_size']} x {shape['block_size']} tokens and an update a step; "
        f"mixed_precision={options['mixed_precision']}{', compiled' if options['compile'] else ''}; "
        f"gradient_checkpointing={options['gradient_checkpointing']}. "
        f"A matrix product reaches {report['matrix_product_flops'] / 1e9:,.0f} GFLOP/s."
    )


def markdown(rows: list[Row]) -> str:
    """The table."""
    lines = [
        "| way | tokens/s | step ms (fastest to slowest turn) | peak GiB | MFU | ours is … times as fast |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.way} | {row.tokens_per_s:,.0f} | {row.step_ms:,.1f} ({row.step_ms_low:,.1f} to "
            f"{row.step_ms_high:,.1f}) | {row.memory_gib:.2f} | {row.mfu:.0%} "
            f"| {row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f}) |"
        )
    return "\n".join(lines)
