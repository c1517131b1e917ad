"""Choose the checkpoint to resume from, check that it fits the run, and restore its state."""

import shutil
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from minigpt.config.arguments import SHAPE_OPTIONS, Arguments
from minigpt.config.parser import read_config
from minigpt.training.checkpoint_files import find_damage, newest_undamaged, set_aside
from minigpt.training.optimizer_state import restore_moments
from minigpt.training.provenance import environment_facts
from minigpt.training.state import TrainingState
from minigpt.utils.errors import UserError
from minigpt.utils.files import fsync, lack_of_room, publish_folder, read_json
from minigpt.utils.run_files import (
    ARGUMENTS_FILE,
    CHECKPOINT,
    ENVIRONMENT_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    checkpoint_step,
    find_checkpoints,
)

# options that a resumed run must share with its checkpoint, and why
FIXED_OPTIONS = dict.fromkeys(
    ("seed", "block_size", "stride", "packing_strategy", "data_weights"), "the resumed run would see other samples"
) | {"optimizer": "its optimizer state does not fit"}
FIXED_OPTIONS |= dict.fromkeys(
    ("use_peft", "lora_r", "lora_alpha", "lora_target_modules", "use_rslora"), "it is another adapter"
)
# not listed as changed: folders, the shape (which is the checkpoint's), and what `_changed_environment` compares
UNLISTED_OPTIONS = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", *SHAPE_OPTIONS, "pad_vocab_size_to_multiple_of",
    "mixed_precision", "per_device_train_batch_size", "gradient_accumulation_steps",
}  # fmt: skip


def checkpoint_to_resume(args: Arguments, accelerator: Accelerator) -> tuple[Path | None, list[str]]:
    """The folder that `resume_from_checkpoint` means, and a note on each damaged one that was skipped.

    'latest' is the newest undamaged checkpoint. The folder is None if the run starts from the beginning: without
    `resume_from_checkpoint`, or if 'latest' finds no checkpoint. So one command both starts and restarts a run.
    Every rank must call this; each checks a part of the files.
    Raises UserError if the folder is not a checkpoint or is damaged, or if all checkpoints of the run are damaged.
    """
    if args.resume_from_checkpoint is None:
        return None, []
    if args.resume_from_checkpoint == "latest":
        checkpoints = gather_object([find_checkpoints(args.run_dir)])[0]  # where the main process sees them
        newest, notes = newest_undamaged(checkpoints, partial(find_damage_together, accelerator=accelerator))
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
    if problem := find_damage_together(folder, accelerator):
        raise UserError(f"resume_from_checkpoint={folder} is damaged: {problem}; 'latest' skips damaged ones")
    return folder, []


def find_damage_together(checkpoint: Path, accelerator: Accelerator) -> str | None:
    """As `find_damage`, with each rank reading a part of the files. Every rank must call this."""
    damage = find_damage(checkpoint, accelerator.process_index, accelerator.num_processes)
    return next(filter(None, gather_object([damage])), None)


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

    Raises UserError if the checkpoint was trained on other data, in another order, or with another optimizer, or if
    its folder has the name of another step.
    """
    if folder is None:
        return TrainingState(data_fingerprint=data_fingerprint)
    state = TrainingState.load(folder / STATE_FILE)
    if CHECKPOINT.fullmatch(folder.name) and checkpoint_step(folder) != state.step:
        raise UserError(f"{folder} holds the checkpoint of step {state.step}; rename it to checkpoint-{state.step}")
    if state.data_fingerprint != data_fingerprint:
        raise UserError(
            f"{folder} was trained on other data; give the same text and tokenizer to resume, "
            f"or start a new run from its weights with --model_name_or_path {folder}"
        )
    fixed = FIXED_OPTIONS | ({"model_name_or_path": "it is an adapter of that model"} if args.use_peft else {})
    for name, saved_value in _options_of(folder).items():
        value = getattr(args, name)
        if name in fixed and value != saved_value:
            raise UserError(
                f"{name}={value}, but {folder} was trained with {saved_value}: {fixed[name]}; "
                f"give the same value, or start a new run from its weights with --model_name_or_path {folder}"
            )
    return state


def check_length(args: Arguments, folder: Path | None, state: TrainingState, max_steps: int) -> None:
    """Raises UserError if the checkpoint in `folder` has made more steps than the whole run shall have."""
    if max_steps < state.step:
        option = f"max_steps={max_steps}"
        if args.max_steps is None:
            option = f"num_train_epochs={args.num_train_epochs} (max_steps={max_steps})"
        raise UserError(
            f"{option} is below the {state.step} steps that {folder} has made; give at least "
            f"max_steps={state.step}, or resume from an earlier checkpoint"
        )


def changed_options(folder: Path, args: Arguments, state: TrainingState, accelerator: Accelerator) -> list[str]:
    """`name old -> new` for each option, and fact about the machine, in which the run differs from the checkpoint's.

    Another number of processes with the same number of samples per step is no change.
    """
    saved = _options_of(folder)
    changes = [
        f"{name} {value} -> {getattr(args, name)}"
        for name, value in saved.items()
        if name not in UNLISTED_OPTIONS and value != getattr(args, name)
    ]
    if args.dropout is None:  # the model of the checkpoint keeps its own
        changes = [change for change in changes if not change.startswith("dropout ")]
    return changes + _changed_environment(folder, saved, args, state, accelerator)


def _changed_environment(
    folder: Path, saved: dict[str, Any], args: Arguments, state: TrainingState, accelerator: Accelerator
) -> list[str]:
    """What differs in precision, device and samples per step, which depend on the launch as well as on the options."""
    path = folder.parent / ENVIRONMENT_FILE
    environment = read_json(path, "the environment of a run") if path.is_file() else {}
    now = environment_facts(None, accelerator)
    changes = [
        f"{name} {environment[name]} -> {now[name]}"
        for name in ("mixed_precision", "device")
        if name in environment and environment[name] != now[name]
    ]
    processes = environment.get("processes", now["processes"])
    micro_batches = [
        options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
        for options in (saved, vars(args))
    ]
    before, after = micro_batches[0] * processes, micro_batches[1] * now["processes"]
    if before != after and state.samples_seen != after * state.step:
        changes.append(f"samples per step {before} -> {after}")
    if args.scale_learning_rate and processes != now["processes"]:
        changes.append(f"processes, which scale the learning rate, {processes} -> {now['processes']}")
    return changes


def _options_of(folder: Path) -> dict[str, Any]:
    """The value of every option in the run of a checkpoint."""
    defaults = {
        option.name: option.default if option.default_factory is MISSING else option.default_factory()
        for group in Arguments.GROUPS
        for option in fields(group)
    }
    saved = read_config(folder / ARGUMENTS_FILE)
    return {name: saved.get(name, default) for name, default in defaults.items()}


def best_checkpoint(
    args: Arguments, folder: Path | None, state: TrainingState, accelerator: Accelerator
) -> Path | None:
    """The checkpoint with the lowest validation loss, if `load_best_model_at_end` needs it and output_dir lacks it.

    It is next to the checkpoint in `folder`, or that one itself. Raises UserError if it is nowhere, if it is damaged,
    or if there is no room to copy it. Every rank must call this.
    """
    if folder is None or not args.load_best_model_at_end or state.best_step is None:
        return None
    name = f"checkpoint-{state.best_step}"
    problem: str | None = f"it is neither in {args.run_dir} nor in {folder.parent}"
    for place in (args.run_dir / name, folder.parent / name, folder):
        if place.is_dir() and _is_best(place, state):
            problem = find_damage_together(place, accelerator)
            if problem is None and place != args.run_dir / name:
                problem = lack_of_room(args.run_dir, _size(place))
            if problem is None:
                return None if place == args.run_dir / name else place
    raise UserError(
        f"load_best_model_at_end needs {name}, which has the lowest validation loss: {problem}; "
        "resume from an earlier checkpoint, or without load_best_model_at_end"
    )


def _is_best(checkpoint: Path, state: TrainingState) -> bool:
    """Whether a checkpoint is the best one of the run that has `state`, and not that of another run."""
    try:
        saved = TrainingState.load(checkpoint / STATE_FILE)
    except UserError:
        return False
    return (saved.run_id, saved.step, saved.best_val_loss) == (state.run_id, state.best_step, state.best_val_loss)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def carry_over(best: Path, state: TrainingState, run_dir: Path) -> str:
    """Copy the best checkpoint into `run_dir`, where one of another run is set aside. Returns a note on it."""
    copy = run_dir / f"checkpoint-{state.best_step}"
    unfinished = run_dir / f".writing-{copy.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(best, unfinished)
    for path in [*unfinished.rglob("*"), unfinished]:
        fsync(path)
    if copy.exists():
        set_aside(copy, "abandoned")
    publish_folder(unfinished, copy)
    return f"{best}, the best checkpoint so far, was copied to {run_dir}"


def restore_optimizer(
    folder: Path, state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> None:
    """Load the moments of a checkpoint into `optimizer`, and its loss scale into fp16's gradient scaler."""
    restore_moments(folder, model, optimizer)
    if accelerator.scaler is not None and state.loss_scale is not None:
        restored = {"scale": state.loss_scale, "_growth_tracker": state.loss_scale_growth}
        accelerator.scaler.load_state_dict(accelerator.scaler.state_dict() | restored)
