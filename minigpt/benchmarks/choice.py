"""The choice of `--train_minutes` against a grid by hand, and the forecast of more minutes against what they bring.

Every run of the grid has the time of the chosen one. All of them can then be continued, in copies.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minigpt.config.parser import parse_arguments
from minigpt.experiments.branch import default_branch_minutes, train_branch
from minigpt.experiments.runs import PlannedRun, Result
from minigpt.planning.forecast import Forecast, forecast
from minigpt.utils.errors import RunFailure
from minigpt.utils.files import read_json, write_atomically
from minigpt.utils.formatting import markdown_table
from minigpt.utils.run_files import ARGUMENTS_FILE

PROGRAM = "minigpt bench choice"
GRID = ((64, 2, 4096), (96, 3, 8192), (128, 4, 2048), (128, 4, 8192), (192, 4, 4096), (256, 6, 4096))
RECIPE = {  # of the quickstart
    "tokenizer": "bpe", "validation_split_percentage": 5, "block_size": 128, "per_device_train_batch_size": 16,
    "optimizer": "muon", "learning_rate": 0.02, "muon_learning_rate": 0.02, "muon_momentum": 0.9, "muon_ns_steps": 3,
    "lr_scheduler_type": "linear", "warmup_steps": 10,
}  # fmt: skip
QUIET = {
    "eval_steps": 0, "save_steps": 0, "logging_steps": 10, "sample_max_new_tokens": 1,
    "per_device_eval_batch_size": 64, "save_total_limit": 1, "report_to": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A text and a time: the run that was chosen, its predicted bits per byte, and the runs of the grid by name."""

    text: str
    minutes: float
    shape: str
    predicted: float
    chosen: Result
    grid: Mapping[str, Result]

    @property
    def best(self) -> str:
        return min(self.grid, key=lambda name: _bits(self.grid[name]))

    @property
    def worst(self) -> str:
        return max(self.grid, key=lambda name: _bits(self.grid[name]))


@dataclass(frozen=True)
class Continuation:
    """A run that was continued: the forecast before, and the loss that followed."""

    name: str
    forecast: Forecast
    then: Result

    @property
    def error(self) -> float:
        """Forecast minus loss, in nats per token."""
        return self.forecast.loss - self.then.loss

    @property
    def error_per_byte(self) -> float:
        """The same in nats per byte of text, in which vocabularies can be compared."""
        return self.error * (self.forecast.bits_per_nat or math.nan) * math.log(2)


class Study:
    """Trains in folders below `output_dir`, `parallel` runs at a time; what is finished there is kept."""

    def __init__(self, output_dir: Path, parallel: int, report: Callable[[str], None] = print) -> None:
        self.output_dir, self.report = output_dir, report
        self.pool = ThreadPoolExecutor(parallel)
        self.environment = {"OMP_NUM_THREADS": "1"} if parallel > 1 else {}

    def choices(self, texts: Mapping[str, Path], minutes: Sequence[float]) -> list[Choice]:
        """A choice and a grid for every text and every time."""
        jobs = [
            (text, length, self.pool.submit(self._chosen, text, path, length),
             {shape_name(*shape): self.pool.submit(self._by_hand, text, path, length, shape) for shape in GRID})
            for length in minutes for text, path in texts.items()
        ]  # fmt: skip
        return [
            Choice(text, length, *chosen.result(), {name: run.result() for name, run in grid.items()})
            for text, length, chosen, grid in jobs
        ]

    def continuations(self, choices: Sequence[Choice], more_minutes: float) -> list[Continuation]:
        """Every run, continued."""
        runs = [
            self.pool.submit(self._continued, result.run_dir, more_minutes)
            for choice in choices
            for result in [choice.chosen, *choice.grid.values()]
        ]
        return [run.result() for run in runs]

    def _chosen(self, text: str, path: Path, minutes: float) -> tuple[str, float, Result]:
        """The shape, its predicted bits per byte, and the result of the run with the options that `plan` chooses."""
        plan = self.output_dir / f"{text}-{minutes:g}-chosen.json"
        if not plan.is_file():
            source = ["--train_file", str(path), "--train_minutes", f"{minutes:g}"]
            source += ["--validation_split_percentage", str(RECIPE["validation_split_percentage"])]  # the same text
            words = [sys.executable, "-m", "minigpt", "plan", *source, "--json"]
            process = subprocess.run(words, capture_output=True, text=True, env=os.environ | self.environment)
            if process.returncode:
                raise RunFailure(f"{' '.join(words)}: {process.stderr.strip()[-500:]}")
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(plan, json.dumps(json.loads(process.stdout)["chosen"], indent=2))
        chosen = read_json(plan, "a choice", ["options", "predicted_bits_per_byte"])
        name = f"{text}-{minutes:g}-chosen"
        result = self._train_preset(chosen["options"] | QUIET, name)
        args = parse_arguments([str(result.run_dir / ARGUMENTS_FILE)], program=PROGRAM)
        assert args.hidden_size is not None
        assert args.num_hidden_layers is not None
        shape = shape_name(args.hidden_size, args.num_hidden_layers, args.tokenizer_vocab_size)
        return shape, chosen["predicted_bits_per_byte"], result

    def _by_hand(self, text: str, path: Path, minutes: float, shape: tuple[int, int, int]) -> Result:
        width, layers, vocabulary = shape
        model = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 32}
        options = RECIPE | QUIET | model | {"tokenizer_vocab_size": vocabulary}
        options |= {"train_file": str(path), "train_minutes": minutes}
        return self._train_preset(options, f"{text}-{minutes:g}-{shape_name(*shape)}")

    def _continued(self, run_dir: Path, more_minutes: float) -> Continuation:
        minutes = default_branch_minutes(more_minutes)
        branch_dir = run_dir.with_name(f"{run_dir.name}-branch-{minutes:g}")
        branch = train_branch(run_dir, minutes, branch_dir, self.environment)
        outlook = forecast(run_dir, more_minutes, branch)
        options = [str(run_dir / ARGUMENTS_FILE), "--train_minutes", f"{outlook.elapsed_s / 60 + more_minutes}"]
        run = PlannedRun(options, run_dir.with_name(f"{run_dir.name}-continued-{more_minutes:g}"))
        then = run.train_on(run_dir, environment=self.environment)
        self.report(f"{run.run_dir.name}: forecast {outlook.loss:.4f}, then {then.loss:.4f}")
        return Continuation(run_dir.name, outlook, then)

    def _train_preset(self, options: Mapping[str, Any], name: str) -> Result:
        preset = self.output_dir / f"{name}.yaml"
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(preset, yaml.safe_dump({key: options[key] for key in options if key != "output_dir"}))
        run = PlannedRun([str(preset)], self.output_dir / name)
        result = run.train(run.arguments(PROGRAM), environment=self.environment)
        self.report(f"{name}: {_bits(result):.4f} bits per byte after {result.elapsed_s:.1f} s")
        return result


def shape_name(width: int, layers: int, vocabulary: int) -> str:
    return f"{width}x{layers}-{vocabulary}"


def choices_table(choices: Sequence[Choice]) -> str:
    """Bits per byte of the chosen runs beside the grids."""
    head = (
        "text, minutes",
        "the choice",
        "its loss",
        "predicted",
        "best of the grid",
        "worst",
        "to the best",
        "error",
    )
    rows = [
        (
            f"{choice.text}, {choice.minutes:g}",
            choice.shape,
            f"{_bits(choice.chosen):.3f}",
            f"{choice.predicted:.3f}",
            f"{_bits(choice.grid[choice.best]):.3f} ({choice.best})",
            f"{_bits(choice.grid[choice.worst]):.3f}",
            f"{_bits(choice.chosen) / _bits(choice.grid[choice.best]) - 1:+.1%}",
            f"{choice.predicted / _bits(choice.chosen) - 1:+.1%}",
        )
        for choice in choices
    ]
    return markdown_table(head, rows)


def continuations_table(continuations: Sequence[Continuation]) -> str:
    """Losses in nats per token."""
    head = ("run", "loss", "forecast", "interval", "then", "error", "per byte")
    rows = []
    for run in continuations:
        low, high = run.forecast.interval
        losses = (f"{run.forecast.loss_now:.3f}", f"{run.forecast.loss:.3f}", f"{low:.3f} to {high:.3f}")
        rows.append((run.name, *losses, f"{run.then.loss:.3f}", f"{run.error:+.3f}", f"{run.error_per_byte:+.3f}"))
    return markdown_table(head, rows)


def figures(choices: Sequence[Choice], continuations: Sequence[Continuation]) -> dict[str, Any]:
    """The tables as JSON has them."""
    return {
        "choices": [
            {
                "text": choice.text,
                "minutes": choice.minutes,
                "choice": choice.shape,
                "elapsed_s": choice.chosen.elapsed_s,
                "bits_per_byte": choice.chosen.bits_per_byte,
                "predicted_bits_per_byte": choice.predicted,
                "grid": {name: result.bits_per_byte for name, result in choice.grid.items()},
            }
            for choice in choices
        ],
        "continuations": [
            run.forecast.as_dict()
            | {"run": run.name, "loss_then": run.then.loss, "error": run.error, "error_per_byte": run.error_per_byte}
            for run in continuations
        ],
    }


def _bits(result: Result) -> float:
    """Bits per byte; text files have known bytes, and a run that diverged is the worst."""
    return float("inf") if result.bits_per_byte is None else result.bits_per_byte
