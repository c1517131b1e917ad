"""How is a run stopped and gone on with? Checkpoints that appear whole or not at all, keyed by parameter name.

checkpoint-<step>/   a model folder for from_pretrained, and beside it
    optimizer.safetensors    <parameter>.<moment>, the same for every wrapper and number of processes
    training_state.json      the counters of minigpt.state
    arguments.yaml           the options of the run
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from minigpt.arguments import Arguments
from minigpt.state import TrainingState, is_due

OPTIMIZER_FILE, STATE_FILE, ARGUMENTS_FILE = "optimizer.safetensors", "training_state.json", "arguments.yaml"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Checkpoints:
    """The checkpoints of one run: when they are written, which are kept, where to go on."""

    def __init__(self, args: Arguments, tokenizer: Any, max_steps: int) -> None:
        self.args, self.tokenizer, self.max_steps = args, tokenizer, max_steps

    def due(self, state: TrainingState) -> bool:
        return is_due(state.step, self.args.save_steps, self.max_steps)

    def save(
        self, state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
    ) -> None:
        """Write `checkpoint-<step>`; older ones go only after it is there. Every process must call this."""
        weights = get_model_state_dict(model, options=_WHOLE)
        moments = get_optimizer_state_dict(model, _bare(optimizer), options=_WHOLE)
        if accelerator.is_main_process:
            if accelerator.scaler is not None:
                scale = accelerator.scaler.state_dict()
                state.loss_scale, state.loss_scale_growth = scale.get("scale"), scale.get("_growth_tracker")
            folder = self.args.run_dir / f"checkpoint-{state.step}"
            aside = self.args.run_dir / f".writing-checkpoint-{state.step}"
            shutil.rmtree(aside, ignore_errors=True)
            write_model(aside, model, weights, self.tokenizer, accelerator)
            save_file(_flatten(moments["state"]), aside / OPTIMIZER_FILE)
            state.save(aside / STATE_FILE)
            (aside / ARGUMENTS_FILE).write_text(self.args.as_yaml(), encoding="utf-8")
            publish(aside, folder)
            self._prune(state)
        accelerator.wait_for_everyone()

    def _prune(self, state: TrainingState) -> None:
        if self.args.save_total_limit is None:
            return
        best = f"checkpoint-{state.best_step}"
        for folder in find_checkpoints(self.args.run_dir)[: -self.args.save_total_limit]:
            if folder.name != best:
                shutil.rmtree(folder)


def write_model(
    folder: Path, model: nn.Module, weights: dict[str, torch.Tensor], tokenizer: Any, accelerator: Accelerator
) -> None:
    """A folder that `from_pretrained` loads: weights, configs, modelling code, tokenizer."""
    # keep_fp32_wrapper=False would take mixed precision out of the very model that is still training
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    bare.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def write_final_model(
    args: Arguments, state: TrainingState, model: nn.Module, tokenizer: Any, accelerator: Accelerator
) -> None:
    """Put the model as it is now, or the best one if `load_best_model_at_end`, into the run's folder."""
    weights = get_model_state_dict(model, options=_WHOLE)
    if accelerator.is_main_process:
        best = args.run_dir / f"checkpoint-{state.best_step}"
        aside = args.run_dir / ".writing-model"
        shutil.rmtree(aside, ignore_errors=True)
        if args.load_best_model_at_end and best.is_dir():
            shutil.copytree(best, aside, ignore=shutil.ignore_patterns(OPTIMIZER_FILE, STATE_FILE, ARGUMENTS_FILE))
        else:
            write_model(aside, model, weights, tokenizer, accelerator)
        for path in aside.iterdir():
            _fsync(path)
            path.replace(args.run_dir / path.name)
        aside.rmdir()
    accelerator.wait_for_everyone()


def publish(aside: Path, folder: Path) -> None:
    """Make `aside` appear as `folder`, whole: its files reach the disk before the rename does."""
    for path in [*aside.rglob("*"), aside]:
        _fsync(path)
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
    _fsync(folder.parent)


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints in `run_dir`, oldest first."""
    return sorted((path for path in run_dir.glob("checkpoint-*") if path.name[11:].isdigit()), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name[11:])


def checkpoint_to_resume(args: Arguments) -> Path | None:
    """The folder that `resume_from_checkpoint` means; None to start from the beginning.

    'latest' without any checkpoint starts from the beginning, so that one command both starts and restarts a run.
    Raises ValueError when the folder is no checkpoint.
    """
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "latest":
        return next(reversed(find_checkpoints(args.run_dir)), None)
    folder = Path(args.resume_from_checkpoint)
    if not (folder / STATE_FILE).is_file() or not (folder / OPTIMIZER_FILE).is_file():
        there = ", ".join(path.name for path in find_checkpoints(folder))
        hint = f"it holds {there}: name one of them" if there else "name a checkpoint-<step> folder, or 'latest'"
        raise ValueError(f"resume_from_checkpoint={folder}: not a checkpoint of MiniGPT; {hint}")
    return folder


def load_training_state(folder: Path | None, data_fingerprint: str) -> TrainingState:
    """The counters in a checkpoint, or of a new run. Raises ValueError when it was trained on other data."""
    if folder is None:
        return TrainingState(data_fingerprint=data_fingerprint)
    state = TrainingState.load(folder / STATE_FILE)
    if state.data_fingerprint != data_fingerprint:
        raise ValueError(
            f"{folder} was trained on other data; give the same text and tokenizer to go on, "
            f"or start a new run from its weights with --model_name_or_path {folder}"
        )
    return state


def restore_optimizer(
    folder: Path, state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> None:
    """Load the moments of a checkpoint into `optimizer`, however it and `model` are wrapped."""
    bare = _bare(optimizer)
    groups = get_optimizer_state_dict(model, bare)["param_groups"]
    moments = {"state": _unflatten(load_file(folder / OPTIMIZER_FILE)), "param_groups": groups}
    set_optimizer_state_dict(model, bare, moments, options=StateDictOptions(full_state_dict=True))
    if accelerator.scaler is not None and state.loss_scale is not None:
        scaler = accelerator.scaler.state_dict()
        accelerator.scaler.load_state_dict(
            {**scaler, "scale": state.loss_scale, "_growth_tracker": state.loss_scale_growth}
        )


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _flatten(moments: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{name}.{moment}": value.contiguous() for name, of in moments.items() for moment, value in of.items()}


def _unflatten(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, moment = key.rsplit(".", 1)
        moments.setdefault(name, {})[moment] = value
    return moments


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
