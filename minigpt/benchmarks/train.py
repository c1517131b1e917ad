"""Compare the training speed of MiniGPT with nanoGPT and transformers' Trainer."""

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from minigpt.training.trainer_command import trainer_command
from minigpt.utils.formatting import format_flops, markdown_table
from minigpt.utils.run_files import METRICS_FILE, read_metrics

# described in the help of `minigpt bench train`
TRAINERS = ("minigpt", "minigpt-ddp", "bare", "nanogpt", "nanogpt-bf16", "transformers")
SINGLE_PROCESS_TRAINERS = tuple(trainer for trainer in TRAINERS if trainer != "minigpt-ddp")
TIMED_TOGETHER = 10  # short steps are timed ten at a time: waiting for the device after each one would slow them down


@dataclass(frozen=True)
class Shape:
    """The model and batch that every trainer trains."""

    layers: int
    heads: int
    hidden: int
    vocab_size: int
    block_size: int
    batch_size: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.block_size


SHAPES = {
    # 50,257 ids, rounded up to a multiple of 64 as in nanoGPT
    "124m": Shape(layers=12, heads=12, hidden=768, vocab_size=50304, block_size=1024, batch_size=1),
    "shakespeare": Shape(layers=4, heads=4, hidden=128, vocab_size=65, block_size=64, batch_size=12),
}
GPU_BATCH_SIZE = 12  # of 124m on a GPU


@dataclass(frozen=True)
class Options:
    """How every trainer trains. `steps` are timed, after `warmup` steps that are not."""

    device: str
    mixed_precision: str = "no"  # or bf16
    compile: bool = False
    compile_backend: str = "inductor"
    gradient_checkpointing: str = "no"  # of MiniGPT's trainer only
    steps: int = 4
    warmup: int = 2
    threads: int | None = None
    nanogpt: str | None = None  # a checkout


@dataclass(frozen=True)
class Turn:
    """What one turn of one trainer measured."""

    seconds: list[float]  # of each timed step, or the mean of ten steps that are timed together
    memory_gib: float


@dataclass(frozen=True)
class Row:
    """One line of the table: medians over the turns of each turn's median step."""

    trainer: str
    tokens_per_s: float
    step_ms: float
    step_ms_low: float  # the fastest and the slowest turn
    step_ms_high: float
    memory_gib: float  # the largest of the turns
    mfu: float  # share of the measured rate of a matrix product
    mfu_data_sheet: float | None  # share of the data sheet's peak; None if that is unknown
    ratio: float  # median over turns of (this trainer's step / MiniGPT's): how many times as fast MiniGPT is
    ratio_low: float
    ratio_high: float


def steps_timed_together(shape: Shape, device: str) -> int:
    """How many steps the clock counts as one measurement."""
    is_short = device == "cuda" or shape.hidden * shape.block_size < 1 << 18
    return TIMED_TOGETHER if is_short else 1


def round_up(steps: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `steps`."""
    return -(-steps // multiple) * multiple


def take_turn(trainer: str, shape: Shape, options: Options, folder: Path) -> Turn:
    """Train once with one trainer, in a process of its own. Raises RuntimeError with its output if that fails."""
    if trainer.startswith("minigpt"):
        return _minigpt_turn(shape, options, 2 if trainer == "minigpt-ddp" else 1, folder)
    bf16 = options.mixed_precision == "bf16"
    if trainer.startswith("nanogpt"):  # as shipped it has no autocast on a CPU, and bfloat16 on a GPU
        bf16 = trainer == "nanogpt-bf16" or options.device == "cuda"
    task = {"trainer": trainer.removesuffix("-bf16"), "bf16": bf16, "shape": asdict(shape)}
    names = ("compile", "compile_backend", "device", "steps", "warmup", "threads", "nanogpt")
    task |= {name: getattr(options, name) for name in names}
    words = [sys.executable, "-m", "minigpt.benchmarks.train_worker", json.dumps(task)]
    process = subprocess.run(words, capture_output=True, text=True, env=_environment(options))
    if process.returncode:
        raise RuntimeError(f"{trainer} failed:\n{process.stderr[-2000:]}")
    return Turn(**json.loads(process.stdout.splitlines()[-1]))


def kill_tree(process: psutil.Popen) -> None:
    """Kill a process and those that it has started: a launcher's workers would continue without it."""
    process_tree: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        process_tree = process.children(recursive=True)
    for member in (*process_tree, process):
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs([*process_tree, process])


def _minigpt_turn(shape: Shape, options: Options, processes: int, folder: Path) -> Turn:
    """Start train_accelerate.py as a user would, and end it when it has logged enough steps."""
    log_every = steps_timed_together(shape, options.device)
    warmup = round_up(options.warmup, log_every)
    last_step = warmup + round_up(options.steps, log_every)
    is_last_line = re.compile(rf"step +{last_step}/").match
    words = [*_minigpt_command(shape, options, processes, folder), "--logging_steps", str(log_every)]
    process = psutil.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment(options, processes),
    )
    output: list[str] = []
    for line in process.stdout:
        output.append(line)
        if is_last_line(line):
            break
    kill_tree(process)
    process.stdout.close()
    if not output or not is_last_line(output[-1]):
        raise RuntimeError("minigpt failed:\n" + "".join(output[-20:]))
    metrics = {int(line["step"]): line for line in read_metrics(folder / "run" / METRICS_FILE)}
    # elapsed_s is rounded to milliseconds, the speed is not
    seconds = [
        shape.tokens / metrics[step]["train/tokens_per_sec"]
        for step in range(warmup + log_every, last_step + 1, log_every)
    ]
    return Turn(seconds, processes * metrics[last_step]["train/peak_memory_gib"])


def _minigpt_command(shape: Shape, options: Options, processes: int, folder: Path) -> list[str]:
    import numpy as np

    from minigpt.data.tokenizer import train_characters

    data, run_dir = folder / "data", folder / "run"
    if not data.exists():
        data.mkdir()
        ids = np.random.default_rng(0).integers(shape.vocab_size, size=64 * shape.block_size * 16)
        ids.astype(np.uint16).tofile(data / "train.bin")
        train_characters(["a"]).save_pretrained(data)
    profile: str | None = None
    if processes > 1:
        profile = "multi_gpu" if options.device == "cuda" else "cpu_ddp"
    words = f"--hidden_size {shape.hidden} --num_hidden_layers {shape.layers} --vocab_size {shape.vocab_size} "
    words += f"--num_attention_heads {shape.heads} --block_size {shape.block_size} --dropout 0 "
    words += f"--per_device_train_batch_size {shape.batch_size // processes} --max_steps 1000000 "
    words += f"--data {data} --tokenizer {data} --output_dir {run_dir} --overwrite_output_dir "
    words += "--report_to none --save_steps 0 --eval_steps 0 "
    words += f"--mixed_precision {options.mixed_precision} --gradient_checkpointing {options.gradient_checkpointing}"
    words += " --use_cpu" if options.device == "cpu" else ""
    if options.compile:
        words += f" --torch_compile --torch_compile_backend {options.compile_backend}"
    return trainer_command(words.split(), profile, ["--num_processes", str(processes)] if profile else [])


def _environment(options: Options, processes: int = 1) -> dict[str, str]:
    """The environment of a turn. Several processes share the threads of one."""
    import torch

    threads = max(1, (options.threads or torch.get_num_threads()) // processes)
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def summarize(
    turns: Mapping[str, Sequence[Turn]], shape: Shape, product_flops: float, data_sheet_flops: float | None = None
) -> list[Row]:
    """The rows of the table; `minigpt` must be among the trainers of `turns`.

    `product_flops` is the measured rate of a matrix product, `data_sheet_flops` the peak that the manufacturer names.
    """
    step_flops = shape.tokens * flops_per_token(shape)
    medians = {
        trainer: [statistics.median(turn.seconds) for turn in its_turns] for trainer, its_turns in turns.items()
    }
    rows = []
    for trainer, step_s in medians.items():
        ratios = [seconds / minigpt_s for minigpt_s, seconds in zip(medians["minigpt"], step_s, strict=True)]
        tokens_per_s = shape.tokens / statistics.median(step_s)
        rows.append(
            Row(
                trainer=trainer,
                tokens_per_s=tokens_per_s,
                step_ms=statistics.median(step_s) * 1e3,
                step_ms_low=min(step_s) * 1e3,
                step_ms_high=max(step_s) * 1e3,
                memory_gib=max(turn.memory_gib for turn in turns[trainer]),
                mfu=step_flops / statistics.median(step_s) / product_flops,
                mfu_data_sheet=step_flops / statistics.median(step_s) / data_sheet_flops if data_sheet_flops else None,
                ratio=statistics.median(ratios),
                ratio_low=min(ratios),
                ratio_high=max(ratios),
            )
        )
    return rows


def flops_per_token(shape: Shape) -> float:
    """FLOPs of training on one token."""
    from minigpt.benchmarks.train_worker import build_config
    from minigpt.planning import step_time
    from minigpt.planning.memory import TrainingSetup

    return step_time.flops_per_token(TrainingSetup(build_config(shape), shape.block_size, micro_batch=1))


def describe(shape: Shape, options: Options, product_flops: float, data_sheet_flops: float | None = None) -> str:
    """The sentences above the table that do not describe the machine."""
    return (
        f"{shape.layers} layers, {shape.hidden} wide, {shape.vocab_size:,} ids; {shape.batch_size} x "
        f"{shape.block_size} tokens per step; mixed_precision={options.mixed_precision}"
        f"{', compiled' if options.compile else ''}; gradient_checkpointing={options.gradient_checkpointing}. "
        f"A matrix product reaches {format_flops(product_flops)}"
        f"{f' of the {format_flops(data_sheet_flops)} in the data sheet' if data_sheet_flops else ''}."
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    head = (
        "trainer",
        "tokens/s",
        "step ms (fastest to slowest turn)",
        "peak GiB",
        "MFU (matrix product)",
        "MFU (data sheet)",
        "minigpt is … times as fast",
    )
    cells = (
        (
            row.trainer,
            f"{row.tokens_per_s:,.0f}",
            f"{row.step_ms:,.3f} ({row.step_ms_low:,.3f} to {row.step_ms_high:,.3f})",
            f"{row.memory_gib:.2f}",
            f"{row.mfu:.1%}",
            "" if row.mfu_data_sheet is None else f"{row.mfu_data_sheet:.1%}",
            f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})",
        )
        for row in rows
    )
    return markdown_table(head, cells, numeric=True)
