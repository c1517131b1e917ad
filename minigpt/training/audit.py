"""Say whether a run is what its folder says: compare its hashes, and train random stretches of it again.

A hash tells what was changed after the run. Training tells what was never true: losses, weights, data and options must
agree wherever the audit looks. What it does not look at, it cannot tell.
"""

import json
import math
import random
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from minigpt.config.arguments import Arguments
from minigpt.config.parser import parse_arguments, read_config
from minigpt.data.datamodule import prepare_data
from minigpt.data.inspect import verify_folder
from minigpt.data.mixing import join_shards
from minigpt.data.shards import open_shards
from minigpt.training.checkpoint_files import find_damage, log_checksum
from minigpt.training.state import TrainingState
from minigpt.training.trainer_command import launched
from minigpt.utils.errors import EXIT_BAD_INPUT, RunFailure, UserError
from minigpt.utils.files import read_json
from minigpt.utils.run_files import (
    ADAPTER_WEIGHTS,
    ARGUMENTS_FILE,
    CHECKSUMS_FILE,
    DATA_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    STATE_FILE,
    WEIGHT_FILES,
    checkpoint_step,
    find_checkpoints,
    find_files,
    read_metrics,
)

PROGRAM = "minigpt audit"
# a stretch that is trained again must not publish, report or evaluate anything
QUIET = {"report_to": "none", "push_to_hub": False, "load_best_model_at_end": False, "async_save": False}
# options that do not decide what is computed
ASIDE = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "save_total_limit", *QUIET)
# Largest honest differences, relative, in float32 and in half precision. They come from the order of sums, which
# another processor or number of processes changes, and grow from step to step; docs/reliability.md has measurements
LOSS_TOLERANCE, GROWTH, LARGEST_TOLERANCE, HALF_TOLERANCE = 1e-5, 1.15, 1e-2, 2e-2
NORM_FACTOR, HALF_NORM_FACTOR = 100, 10  # a gradient norm differs more than a loss
WAY_TOLERANCE, HALF_WAY_TOLERANCE = 0.05, 0.5  # of the weights, relative to the way that they went in a stretch


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what is wrong with it: an empty text if nothing is."""

    subject: str
    problem: str = ""


@dataclass
class Stretch:
    """Steps `start` + 1 to `end` of the run, which begin at a checkpoint, or at the beginning of the run."""

    start: int
    end: int

    @property
    def steps(self) -> int:
        return self.end - self.start


class Audit:
    """The audit of one run. `words` are training options that say where its data is now."""

    def __init__(
        self,
        run_dir: Path,
        words: Sequence[str] = (),
        *,
        share: float = 0.05,
        seed: int = 0,
        profile: str | None = None,
        processes: int | None = None,
    ) -> None:
        self.run_dir, self.words = run_dir, list(words)
        self.share, self.profile, self.processes = share, profile, processes
        self.random = random.Random(seed)
        if not (run_dir / ARGUMENTS_FILE).is_file():
            raise UserError(f"{run_dir} is not a run of MiniGPT: it has no {ARGUMENTS_FILE}")
        self.checkpoints = {checkpoint_step(folder): folder for folder in find_checkpoints(run_dir)}
        if not self.checkpoints:
            raise UserError(f"{run_dir} has no checkpoints, so there is nothing to train again from")
        self.metrics = read_metrics(run_dir / METRICS_FILE)
        self.steps_trained = 0

    @cached_property
    def args(self) -> Arguments:
        """The options of the run, with the data where it is now."""
        return parse_arguments([str(self.run_dir / ARGUMENTS_FILE), *self.words], program=PROGRAM)

    @cached_property
    def environment(self) -> Mapping[str, Any]:
        """Processes, device and precision of the run."""
        return read_json(self.run_dir / ENVIRONMENT_FILE, "the environment of a run", ["processes", "mixed_precision"])

    @cached_property
    def steps(self) -> int:
        """Steps of the run: those of its newest checkpoint."""
        return max(self.checkpoints)

    @property
    def number_of_processes(self) -> int:
        """Those that train again: as many as asked for, or as the run had if it has dropout, or one."""
        return self.processes or (self._original_processes if self._has_dropout else 1)

    @property
    def cost(self) -> float:
        """Steps that were trained again, as a share of the run."""
        return self.steps_trained / self.steps

    def checks(self) -> Iterator[Check]:
        """All checks, the cheap ones first. The run is trained again only if its files and its data are whole."""
        is_whole = True
        for check in (*self._files(), self._log(), self._options(), self._data(), self._final_model()):
            is_whole &= not check.problem
            yield check
        if is_whole:
            yield from self._retrained()

    def _files(self) -> Iterator[Check]:
        damage = [(folder.name, problem) for folder in self.checkpoints.values() if (problem := find_damage(folder))]
        yield Check(
            f"{len(self.checkpoints)} checkpoints: hashes of their files", ": ".join(damage[0]) if damage else ""
        )

    def _log(self) -> Check:
        """What the log was when each checkpoint was written, it must begin with today."""
        log = self.run_dir / METRICS_FILE
        for folder in self.checkpoints.values():
            if (folder / CHECKSUMS_FILE).is_file():
                then = read_json(folder / CHECKSUMS_FILE, "checksums", ["files"]).get("log")
                if then is not None and log_checksum(log, then["bytes"]) != then:
                    return Check(METRICS_FILE, f"it does not begin as it did when {folder.name} was written")
        return Check(f"{METRICS_FILE}: hashes at each checkpoint")

    def _options(self) -> Check:
        """The options of the run must be those of its newest checkpoint. Older ones may be from before a resume."""
        ours, theirs = _computing(self.run_dir), _computing(self._newest)
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        problem = "".join(
            f"{name}={ours.get(name)}, but {self._newest.name} was trained with {theirs.get(name)}"
            for name in differing[:1]
        )
        return Check(f"{ARGUMENTS_FILE}: the options of {self._newest.name}", problem)

    def _data(self) -> Check:
        """The tokens must have the fingerprint that the run and its checkpoints recorded."""
        folders = prepare_data(self.args)
        shards = join_shards([open_shards(folder) for folder in folders], self.args.data_weights or [])
        recorded = {
            DATA_FILE: read_json(self.run_dir / DATA_FILE, "the data of a run", ["fingerprint"])["fingerprint"]
        }
        for folder in self.checkpoints.values():
            recorded[folder.name] = TrainingState.load(folder / STATE_FILE).data_fingerprint
        wrong = [name for name, fingerprint in recorded.items() if fingerprint != shards.fingerprint]
        problem = f"{', '.join(wrong[:3])}: trained on other data than {folders[0]}" if wrong else ""
        try:
            for folder in folders:
                if open_shards(folder).manifest:
                    verify_folder(folder)
        except UserError as error:
            problem = problem or str(error)
        return Check("data: hashes and fingerprint", problem)

    def _final_model(self) -> Check:
        """The model of the run must be one of its checkpoints: the newest, or the best."""
        weights = _weights(self.run_dir)
        is_of_one = any(_distance(weights, _weights(folder)) == 0 for folder in reversed(self.checkpoints.values()))
        return Check("final model: the weights of a checkpoint", "" if is_of_one else "it has those of no checkpoint")

    def _retrained(self) -> Iterator[Check]:
        stretches = self.stretches()
        self.steps_trained = sum(stretch.steps for stretch in stretches)
        has_evaluation = any(line["step"] == self.steps and "val/loss" in line for line in self.metrics)
        requests = stretches + ([Stretch(self.steps, self.steps)] if has_evaluation else [])
        with tempfile.TemporaryDirectory(prefix="audit-") as scratch:
            for stretch, answer in zip(requests, self._train(requests, Path(scratch)), strict=True):
                if stretch.steps == 0:
                    subject = f"validation loss of {self._newest.name}"
                    yield Check(subject, self._differing(stretch, self.steps, {"val/loss": answer["val/loss"]}))
                    continue
                name = f"steps {stretch.start + 1} to {stretch.end} again"
                found = (self._differing(stretch, int(step), values) for step, values in answer["steps"].items())
                problem = next(filter(None, found), "") or self._differing_weights(stretch, Path(scratch))
                yield Check(name, problem)

    def stretches(self) -> list[Stretch]:
        """Random stretches of about `share` of the steps.

        Each start, in random order, gets the steps up to the next one that was logged, while they last; then random
        ones are made longer, up to the next checkpoint. There is always one.
        """
        starts = [0, *(step for step in self.checkpoints if step < self.steps)]
        longest = [Stretch(start, start) for start in starts if self._next_logged(start) is not None]
        if not longest:
            raise UserError(f"{self.run_dir / METRICS_FILE} has no loss after the beginning or a checkpoint")
        self.random.shuffle(longest)
        budget = self.share * self.steps
        chosen: list[Stretch] = []
        for stretch in longest:
            if (more := self._room(stretch)) <= budget or not chosen:
                stretch.end, budget = stretch.end + more, budget - more
                chosen.append(stretch)
        while growing := [stretch for stretch in chosen if 0 < self._room(stretch) <= budget]:
            stretch = self.random.choice(growing)
            budget -= (more := self._room(stretch))
            stretch.end += more
        return sorted(chosen, key=lambda stretch: stretch.start)

    def _room(self, stretch: Stretch) -> int:
        """Steps from the end of a stretch to the next one that was logged; 0 if it cannot be made longer.

        A run of a given time corrects its learning rate by the clock at each logged step: what follows differs. With
        another number of processes sums have another order, and what that changes grows from step to step.
        """
        is_inexact = self.args.train_minutes or self.number_of_processes != self._original_processes
        if stretch.steps and (is_inexact or stretch.end in self.checkpoints):
            return 0
        following = self._next_logged(stretch.end)
        return following - stretch.end if following is not None else 0

    def _next_logged(self, step: int) -> int | None:
        later = [int(line["step"]) for line in self.metrics if line["step"] > step and "train/loss" in line]
        return min(later) if later and min(later) <= self.steps else None

    def _train(self, stretches: Sequence[Stretch], scratch: Path) -> list[dict[str, Any]]:
        """Train the stretches in one process, or in as many as `processes`. Returns the answers of `retraining`."""
        original, processes = self._original_processes, self.number_of_processes
        micro_batches = self.args.gradient_accumulation_steps * original
        if micro_batches % processes:
            raise UserError(
                f"num_processes={processes} cannot share the {micro_batches} micro-batches of a step equally"
            )
        if processes != original and self._has_dropout:
            raise UserError(
                f"num_processes={processes} must be {original}, as in the run: each process has its own dropout"
            )
        same_batch = {"gradient_accumulation_steps": micro_batches // processes}
        same_batch |= {"mixed_precision": self.environment["mixed_precision"]}
        requests = []
        for stretch in stretches:
            then = self.checkpoints[min(step for step in self.checkpoints if step >= stretch.end)]
            preset = scratch / f"{stretch.start}.yaml"
            preset.write_text(yaml.safe_dump(_computing(then) | QUIET | same_batch), encoding="utf-8")
            requests.append(
                {
                    "options": [str(preset), *self.words],
                    "start": str(self.checkpoints[stretch.start]) if stretch.start else None,
                    "end": stretch.end,
                    "folder": str(scratch / f"from-{stretch.start}"),
                }
            )
        request, answer = scratch / "request.json", scratch / "answer.json"
        request.write_text(json.dumps({"stretches": requests, "answer": str(answer)}), encoding="utf-8")
        program = ["-m", "minigpt.training.retraining", str(request)]
        profile, launcher = self.profile, []
        if processes > 1:
            profile = profile or ("multi_gpu" if torch.cuda.is_available() else "cpu_ddp")
            launcher = ["--num_processes", str(processes)]
        process = _run(launched(program, profile, launcher))
        if process.returncode or not answer.is_file():
            last_words = (process.stderr.strip() or process.stdout.strip()).splitlines()[-1:]
            error = UserError if process.returncode == EXIT_BAD_INPUT else RunFailure
            raise error(f"the run could not be trained again: {''.join(last_words)}")
        answers: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
        return answers

    def _differing(self, stretch: Stretch, step: int, values: Mapping[str, float]) -> str:
        """The first value of a step that is not what the log says. Steps that were not logged are not compared."""
        tolerance, norm_factor = HALF_TOLERANCE, HALF_NORM_FACTOR
        if not self._is_half:
            tolerance = min(LARGEST_TOLERANCE, LOSS_TOLERANCE * GROWTH ** (step - stretch.start))
            norm_factor = NORM_FACTOR
        logged = {name: line[name] for line in self.metrics if line["step"] == step for name in values if name in line}
        for name, expected in logged.items():
            allowed = {"train/lr": 1e-9, "train/grad_norm": norm_factor * tolerance}.get(name, tolerance)
            if not math.isclose(values[name], expected, rel_tol=allowed):
                return f"{name} of step {step} is {values[name]:.6g}, the log says {expected:.6g}"
        return ""

    def _differing_weights(self, stretch: Stretch, scratch: Path) -> str:
        """Whether a stretch leads to the checkpoint at its end, if there is one, beyond what honest runs differ."""
        if stretch.end not in self.checkpoints:
            return ""
        published, trained = self.checkpoints[stretch.end], scratch / f"from-{stretch.start}/checkpoint-{stretch.end}"
        counters = [TrainingState.load(folder / STATE_FILE) for folder in (published, trained)]
        for name in ("samples_seen", "tokens_seen"):
            ours, theirs = (getattr(state, name) for state in counters)
            if ours != theirs:
                return f"{published.name} has {name}={ours}, the steps again lead to {theirs}"
        weights = _weights(trained)
        distance = _distance(weights, _weights(published))
        way = _distance(weights, _weights(self.checkpoints[stretch.start])) if stretch.start else _length(weights)
        if distance > (HALF_WAY_TOLERANCE if self._is_half else WAY_TOLERANCE) * way:
            return f"{published.name} is {distance / way:.1%} of the way of its weights from where these steps lead"
        return ""

    @property
    def _newest(self) -> Path:
        return self.checkpoints[self.steps]

    @property
    def _original_processes(self) -> int:
        return int(self.environment["processes"])

    @property
    def _has_dropout(self) -> bool:
        if self.args.use_peft:
            return self.args.lora_dropout > 0
        config = read_json(self.run_dir / "config.json", "the configuration of a model", [])
        return any(config.get(name) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"))

    @property
    def _is_half(self) -> bool:
        return bool(self.environment["mixed_precision"] != "no")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace")


def _computing(folder: Path) -> dict[str, Any]:
    """The options in a folder that decide what is computed."""
    return {name: value for name, value in read_config(folder / ARGUMENTS_FILE).items() if name not in ASIDE}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a model, or of an adapter."""
    patterns = (ADAPTER_WEIGHTS,) if (folder / ADAPTER_WEIGHTS).is_file() else WEIGHT_FILES
    files = [file for file in find_files(folder, patterns) if file.suffix == ".safetensors"]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _distance(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """The Euclidean distance of two sets of weights; infinite if they are of different models."""
    our_shapes, their_shapes = ({name: tensor.shape for name, tensor in model.items()} for model in (ours, theirs))
    if our_shapes != their_shapes:
        return math.inf
    return _length({name: ours[name].float() - theirs[name].float() for name in ours})


def _length(tensors: Mapping[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.float().square().sum(dtype=torch.float64)) for tensor in tensors.values()))
