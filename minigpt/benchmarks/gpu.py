"""Everything that only a GPU can show, in one run: `minigpt bench gpu`.

Each step is a process of its own with a time limit, because an error of CUDA makes the rest of a process useless. Its
figures are lines of JSON, each appended to the report at once. The steps are in `minigpt.benchmarks.gpu_worker`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil

from minigpt.benchmarks.train import GPU_BATCH_SIZE, SHAPES, Shape, kill_tree
from minigpt.utils.formatting import markdown_table

MIN_STEP_S = 5.0  # with less time left, a step is not started
STATUS = "status"  # the figure that every step ends with
MACHINE = "machine"  # the step whose figures the others use
FAILURES = ("failed", "timed out")  # of a status, and of a check


@dataclass(frozen=True)
class Settings:
    """The size of everything that is measured, and what the worker is told about the machine."""

    device: str
    shape: Shape
    steps: int  # timed steps of a trainer
    warmup: int
    compile_backend: str
    loss_rows: int  # targets of the loss kernels
    decode_layers: int
    new_tokens: int
    turns: int  # of decoding
    time_limit_s: float  # of all steps together
    patience: float = 1.0  # factor of every step's own limit
    nanogpt: str | None = None  # a checkout
    figures: str = ""  # file that the worker appends to
    folder: str = ""  # an empty folder for the step
    machine: dict[str, float] = field(default_factory=dict)  # figures of the step `MACHINE`

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Settings":
        """The inverse of `asdict`."""
        return Settings(**(values | {"shape": Shape(**values["shape"])}))


GPU = Settings(
    device="cuda",
    shape=replace(SHAPES["124m"], batch_size=GPU_BATCH_SIZE),
    steps=50,
    warmup=20,
    compile_backend="inductor",
    loss_rows=12 * 1024,
    decode_layers=12,
    new_tokens=256,  # each call of `generate` records its CUDA graphs again
    turns=3,
    time_limit_s=460.0,
)
DRY_RUN = Settings(
    device="cpu",
    shape=Shape(layers=1, heads=2, hidden=16, vocab_size=128, block_size=16, batch_size=2),
    steps=1,
    warmup=1,
    compile_backend="eager",
    loss_rows=32,
    decode_layers=1,
    new_tokens=2,
    turns=1,
    time_limit_s=3600.0,
    patience=5.0,
)


@dataclass(frozen=True)
class Step:
    """A function of the worker with its options. Steps that measure neither time nor speed may run side by side."""

    name: str
    task: str
    options: dict[str, Any] = field(default_factory=dict)
    limit_s: float = 60.0
    side_by_side: bool = False
    needs: str = ""  # "CUDA" or "nanoGPT"


def _train(name: str, words: str, needs: str = "") -> Step:
    return Step(f"train {name}", "train", {"words": words}, 90.0, side_by_side=True, needs=needs)


def _speed(name: str, trainer: str, compiled: bool, needs: str = "") -> Step:
    return Step(f"speed {name}", "speed", {"trainer": trainer, "compiled": compiled}, 150.0, needs=needs)


# the most important first: a step that would start after the time limit is skipped
STEPS = (
    Step(MACHINE, "machine"),
    _train("bf16 adamw", "--mixed_precision bf16 --optimizer adamw"),
    _train("bf16 muon", "--mixed_precision bf16 --optimizer muon"),
    _train("fp16 adamw", "--mixed_precision fp16 --optimizer adamw", needs="CUDA"),
    _train("fp16 muon", "--mixed_precision fp16 --optimizer muon", needs="CUDA"),
    _train("float32 adamw", "--mixed_precision no --optimizer adamw"),  # TF32 on a GPU
    _train("float32 muon", "--mixed_precision no --optimizer muon"),
    _train("selective checkpointing", "--mixed_precision bf16 --gradient_checkpointing selective"),
    _train("full checkpointing", "--mixed_precision bf16 --gradient_checkpointing full"),
    _train("packed documents", "--mixed_precision bf16 --packing_strategy bfd"),
    Step("async save and resume", "resume", limit_s=120.0, side_by_side=True),
    Step("DDP over NCCL", "distributed", {"profile": "multi_gpu"}, 90.0, side_by_side=True, needs="CUDA"),
    Step("FSDP2 over NCCL", "distributed", {"profile": "fsdp2"}, 90.0, side_by_side=True, needs="CUDA"),
    *(
        Step(f"synchronizations {name}", "synchronizations", {"words": words}, 90.0, side_by_side=True, needs="CUDA")
        for name, words in (
            ("adamw", "--optimizer adamw"),
            ("muon", "--optimizer muon"),
            ("packed", "--packing_strategy bfd"),
            ("accumulation", "--gradient_accumulation_steps 2"),
        )
    ),
    *(
        Step(f"verify-resume {name}", "verify_resume", {"deterministic": on}, 150.0, side_by_side=True)
        for name, on in (("default", False), ("full_determinism", True))
    ),
    *(
        Step(f"memory {mode}", "memory", {"gradient_checkpointing": mode}, 100.0, side_by_side=True)
        for mode in ("no", "selective", "full")
    ),
    Step("loss kernels", "loss_kernels"),
    _speed("minigpt", "minigpt", compiled=False),
    _speed("minigpt compiled", "minigpt", compiled=True),
    _speed("nanogpt compiled", "nanogpt", compiled=True, needs="nanoGPT"),
    _speed("bare loop", "bare", compiled=False),
    _speed("transformers", "transformers", compiled=False),
    Step("profile", "profile"),
    *(Step(f"decode {mode}", "decode", {"mode": mode}, 120.0) for mode in ("eager", "compiled")),
    _speed("transformers compiled", "transformers", compiled=True),
)


@dataclass(frozen=True)
class Figure:
    """One line of the report."""

    step: str
    figure: str
    value: float | str
    unit: str = ""
    note: str = ""

    def append_to(self, path: Path) -> None:
        """Append the figure as a line of JSON."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self)) + "\n")


def read_figures(path: Path) -> list[Figure]:
    """The figures of a report."""
    return [Figure(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def reason_to_skip(step: Step, settings: Settings) -> str | None:
    """Why `step` cannot run here; None if it can."""
    if step.needs == "CUDA" and settings.device != "cuda":
        return "needs CUDA"
    if step.needs == "nanoGPT" and settings.nanogpt is None:
        return "needs a checkout of nanoGPT; give --nanogpt DIR"
    return None


def run_all(steps: Sequence[Step], settings: Settings, folder: Path) -> list[Figure]:
    """Run the steps, print each figure, and return all. `settings.figures` names the report."""
    report, deadline = Path(settings.figures), time.monotonic() + settings.time_limit_s
    report.write_text("", encoding="utf-8")
    # a GPU has room for eight small trainings; each needs two cores while it starts
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    for side_by_side, group in groupby(steps, key=lambda step: step.side_by_side):
        with ThreadPoolExecutor(workers if side_by_side else 1) as pool:
            results = pool.map(lambda step, told=settings: run_step(step, told, folder, deadline), list(group))
            for step_figures in results:
                for figure in step_figures:
                    print(_line(figure), flush=True)
        machine = {
            figure.figure: figure.value
            for figure in read_figures(report)
            if figure.step == MACHINE and isinstance(figure.value, float)
        }
        settings = replace(settings, machine=machine)
    return read_figures(report)


def run_step(step: Step, settings: Settings, folder: Path, deadline: float) -> list[Figure]:
    """Run one step and append its status to the report. Returns its figures."""
    report, started = Path(settings.figures), time.monotonic()
    remaining_s = deadline - started
    if reason := reason_to_skip(step, settings):
        status = Figure(step.name, STATUS, "skipped", note=reason)
    elif remaining_s < MIN_STEP_S:
        status = Figure(step.name, STATUS, "skipped", note=f"the time of {settings.time_limit_s:.0f} s is used up")
    else:
        step_folder = folder / step.name.replace(" ", "-").replace(",", "")
        step_folder.mkdir()
        task = {"step": step.name, "task": step.task, "options": step.options}
        task["settings"] = asdict(replace(settings, folder=str(step_folder)))
        status_value, note = _run_worker(json.dumps(task), min(step.limit_s * settings.patience, remaining_s))
        seconds = f"{time.monotonic() - started:.1f} s"
        status = Figure(step.name, STATUS, status_value, note=f"{seconds}; {note}" if note else seconds)
    status.append_to(report)
    return [figure for figure in read_figures(report) if figure.step == step.name]


def _run_worker(task: str, limit_s: float) -> tuple[str, str]:
    """Run the worker. Returns the status and the last line of its error output if it failed."""
    words = [sys.executable, "-m", "minigpt.benchmarks.gpu_worker", task]
    process = psutil.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        return "timed out", f"limit {limit_s:.0f} s"
    if process.returncode == 0:
        return "done", ""
    lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
    print("\n".join(lines[-15:]), file=sys.stderr, flush=True)
    return "failed", f"exit code {process.returncode}: {lines[-1][:300]}"


def failures(figures: Sequence[Figure]) -> list[Figure]:
    """The steps that failed, and the checks that did."""
    return [figure for figure in figures if figure.value in FAILURES]


def summary(figures: Sequence[Figure]) -> str:
    """How many steps ended how, and the names of those that failed."""
    states = [figure.value for figure in figures if figure.figure == STATUS]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    failed = "; ".join(f"{figure.step}: {figure.figure} {figure.value}" for figure in failures(figures))
    return f"{len(states)} steps: {counts}.{f' NOT as expected: {failed}.' if failed else ''}"


def markdown(figures: Sequence[Figure]) -> str:
    """The table of all figures; a step that is done needs no line for that."""
    head = ("step", "figure", "value", "unit", "note")
    rows = [figure for figure in figures if (figure.figure, figure.value) != (STATUS, "done")]
    cells = ((row.step, row.figure, format_value(row.value), row.unit, row.note[:120]) for row in rows)
    return markdown_table(head, cells)


def format_value(value: float | str) -> str:
    """A number with at least three decimals below 10,000: milliseconds to the microsecond."""
    if isinstance(value, str):
        return value
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.3f}"
    return f"{value:.2e}"


def _line(figure: Figure) -> str:
    parts: Iterator[str] = filter(None, (format_value(figure.value), figure.unit, figure.note and f"({figure.note})"))
    return f"{figure.step} | {figure.figure}: {' '.join(parts)}"
