"""Train one of the runs of an experiment in a process of its own, or take its result if it is there already."""

import math
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minigpt.config.arguments import Arguments
from minigpt.config.parser import parse_arguments, read_config
from minigpt.training.trainer_command import trainer_command
from minigpt.utils.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_STOPPED, RunFailure, UserError
from minigpt.utils.run_files import ARGUMENTS_FILE, METRICS_FILE, find_checkpoints, read_metrics

# how a run was started, not what it computes
STARTING_OPTIONS = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name")


@dataclass(frozen=True)
class Result:
    """What a finished run achieved: its last validation loss and the seconds of its training.

    Losses are in nats per token, and infinite if the run diverged; bits_per_byte is None where the bytes of the text
    are unknown.
    """

    run_dir: Path
    loss: float
    bits_per_byte: float | None
    elapsed_s: float

    @property
    def diverged(self) -> bool:
        return math.isinf(self.loss)


@dataclass(frozen=True)
class PlannedRun:
    """A run of an experiment: the words of its command line, without those of its folder, and that folder."""

    words: Sequence[str]
    run_dir: Path

    def arguments(self, program: str) -> Arguments:
        """The options. Raises UserError, or exits with 2, if they are not valid or there is no validation text."""
        return parse_arguments([*self.words, "--output_dir", str(self.run_dir)], program=program)

    def state(self, args: Arguments) -> str:
        """ "new", "unfinished" or "finished". Raises UserError if the folder holds a run with other options."""
        recorded = self.run_dir / ARGUMENTS_FILE
        if not recorded.is_file():
            return "new"
        if _computation(read_config(recorded)) != _computation(yaml.safe_load(args.as_yaml()) or {}):
            raise UserError(f"{self.run_dir} holds a run with other options; give another --output_dir")
        return "finished" if (self.run_dir / "config.json").is_file() else "unfinished"

    def result(self) -> Result:
        """The result of the finished run. Raises UserError if it has no validation loss."""
        metrics = read_metrics(self.run_dir / METRICS_FILE)
        measured = [line for line in metrics if "val/loss" in line]
        if not measured:
            raise UserError(f"{self.run_dir} has no validation loss to compare; its text has no validation split")
        last = measured[-1]
        return Result(self.run_dir, last["val/loss"], last.get("val/bits_per_byte"), last["elapsed_s"])

    def train(
        self, args: Arguments, profile: str | None = None, environment: Mapping[str, str] | None = None
    ) -> Result:
        """The result of the run, which is trained, or resumed, unless it is finished.

        `environment` is added to the environment of its process. Raises UserError if the trainer refuses its input,
        KeyboardInterrupt if it was stopped by a signal, and RunFailure with its last words if it fails.
        """
        state = self.state(args)
        if state == "finished":
            return self.result()
        options = [*self.words, "--output_dir", str(self.run_dir)]
        if state == "unfinished":
            resumes = bool(find_checkpoints(self.run_dir))
            options += ["--resume_from_checkpoint", "latest"] if resumes else ["--overwrite_output_dir"]
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        return self._train(options, profile, environment)

    def train_on(self, finished: Path, environment: Mapping[str, str] | None = None) -> Result:
        """The result of a finished run that goes on, with the words of this one, in a copy of its folder.

        What is interrupted starts again. Raises as `train` does.
        """
        if not self.run_dir.is_dir():
            copy = PlannedRun(self.words, self.run_dir.with_name(f"{self.run_dir.name}.unfinished"))
            shutil.rmtree(copy.run_dir, ignore_errors=True)
            older = [checkpoint.name for checkpoint in find_checkpoints(finished)[:-1]]
            shutil.copytree(finished, copy.run_dir, ignore=lambda folder, names: older)
            options = [*self.words, "--output_dir", str(copy.run_dir), "--resume_from_checkpoint", "latest"]
            copy._train(options, None, environment)
            copy.run_dir.rename(self.run_dir)
        return self.result()

    def _train(self, options: Sequence[str], profile: str | None, environment: Mapping[str, str] | None) -> Result:
        code, output = _run(trainer_command(options, profile), {**os.environ, **(environment or {})})
        if code == EXIT_DIVERGED:
            return Result(self.run_dir, math.inf, None, math.nan)
        if code in (EXIT_STOPPED, 130):
            raise KeyboardInterrupt
        if code != 0:
            last_words = output.strip().splitlines()[-1:] or [f"exit code {code}"]
            error = UserError if code == EXIT_BAD_INPUT else RunFailure
            raise error(f"the run in {self.run_dir} failed: {last_words[0]}")
        return self.result()


def _computation(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in STARTING_OPTIONS}


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a process. Returns its exit code and what it printed. After Ctrl-C it may still save a checkpoint."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            process.communicate()
            raise
        return process.returncode, output
