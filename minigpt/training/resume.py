"""Choose the checkpoint to resume from, check that it fits the run, and restore its state."""

from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from minigpt.config.arguments import Arguments
from minigpt.config.parser import read_config
from minigpt.training.checkpoint_files import find_damage, newest_undamaged, set_aside
from minigpt.training.optimizer_state import restore_moments
from minigpt.training.state import TrainingState
from minigpt.utils.errors import UserError
from minigpt.utils.run_files import ARGUMENTS_FILE, OPTIMIZER_FILE, STATE_FILE, checkpoint_step, find_checkpoints

# options that a resumed run must share with its checkpoint, and why
FIXED_OPTIONS = dict.fromkeys(
    ("seed", "block_size", "stride", "packing_strategy", "data_weights"), "the resumed run would see other samples"
) | {"optimizer": "its optimizer state does not fit"}


def checkpoint_to_resume(args: Arguments) -> tuple[Path | None, list[str]]:
    """The folder that `resume_from_checkpoint` means, and a note on each damaged one that was skipped.

    'latest' is the newest undamaged checkpoint. The folder is None if the run starts from the beginning: without
    `resume_from_checkpoint`, or if 'latest' finds no checkpoint. So one command both starts and restarts a run.
    Raises UserError if the folder is not a checkpoint or is damaged, or if all checkpoints of the run are damaged.
    """
    if args.resume_from_checkpoint is None:
        return None, []
    if args.resume_from_checkpoint == "latest":
        newest, notes = newest_undamaged(args.run_dir)
        if newest is None and notes:
            raise UserError(
                f"{notes[0]}; no checkpoint is undamaged, start from the beginning with --overwrite_output_dir"
            )
        if newest is None:
            notes = ["no checkpoint to resume from: starting from the beginning"]
        return newest, notes
    folder = Path(args.resume_from_checkpoint)
    if not (folder / STATE_FILE).is_file() and not (folder / OPTIMIZER_FILE).is_file():
        names = ", ".join(path.name for path in find_checkpoints(folder))
        hint = f"it contains {names}: give one of them" if names else "give a checkpoint-<step> folder, or 'latest'"
        raise UserError(f"resume_from_checkpoint={folder}: not a checkpoint of MiniGPT; {hint}")
    if problem := find_damage(folder):
        raise UserError(f"resume_from_checkpoint={folder} is damaged: {problem}; 'latest' skips damaged ones")
    return folder, []


def set_aside_later_checkpoints(args: Arguments, resumed_step: int) -> list[str]:
    """Set aside the checkpoints of the run that come after `resumed_step`, and return a note on each.

    Resuming from 'latest', they are damaged; resuming from a folder, the user has abandoned them. Left in place, they
    would count as the newest: the checkpoints of the resumed run would be deleted instead, and the next 'latest' would
    not continue it.
    """
    reason = "damaged" if args.resume_from_checkpoint == "latest" else "abandoned"
    later = [folder for folder in find_checkpoints(args.run_dir) if checkpoint_step(folder) > resumed_step]
    return [
        f"{folder.name} is now {set_aside(folder, reason).name}; delete it if you do not need it" for folder in later
    ]


def load_training_state(folder: Path | None, args: Arguments, data_fingerprint: str) -> TrainingState:
    """The counters of a checkpoint, or of a new run if `folder` is None.

    Raises UserError if the checkpoint was trained on other data, in another order, or with another optimizer.
    """
    if folder is None:
        return TrainingState(data_fingerprint=data_fingerprint)
    state = TrainingState.load(folder / STATE_FILE)
    if state.data_fingerprint != data_fingerprint:
        raise UserError(
            f"{folder} was trained on other data; give the same text and tokenizer to resume, "
            f"or start a new run from its weights with --model_name_or_path {folder}"
        )
    saved_options = read_config(folder / ARGUMENTS_FILE)
    for option in fields(args):
        value, saved_value = getattr(args, option.name), saved_options.get(option.name, option.default)
        if option.name in FIXED_OPTIONS and value != saved_value:
            raise UserError(
                f"{option.name}={value}, but {folder} was trained with {saved_value}: {FIXED_OPTIONS[option.name]}; "
                f"give the same value, or start a new run from its weights with --model_name_or_path {folder}"
            )
    return state


def restore_optimizer(
    folder: Path, state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> None:
    """Load the moments of a checkpoint into `optimizer`, and its loss scale into fp16's gradient scaler."""
    restore_moments(load_file(folder / OPTIMIZER_FILE), model, optimizer)
    if accelerator.scaler is not None and state.loss_scale is not None:
        restored = {"scale": state.loss_scale, "_growth_tracker": state.loss_scale_growth}
        accelerator.scaler.load_state_dict(accelerator.scaler.state_dict() | restored)
