"""Checkpoints: writing, pruning, resuming.

checkpoint-<step>/   a model folder for from_pretrained, and beside it
    optimizer.safetensors    <parameter>.<moment>, the same for every wrapper and number of processes
    training_state.json      the counters of minigpt.state
    arguments.yaml           the options of the run
    checkpoint.json          sizes and hashes of all files (minigpt.checkpoint_files)
"""

import errno
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from minigpt.config.arguments import Arguments
from minigpt.config.parser import read_config
from minigpt.training.checkpoint_files import clear_leftovers, damage, newest_sound, seal
from minigpt.training.state import TrainingState, is_due
from minigpt.utils.errors import UserError
from minigpt.utils.files import fsync, lack_of_room, publish_folder, remove_folder
from minigpt.utils.run_files import ARGUMENTS_FILE, OPTIMIZER_FILE, STATE_FILE, find_checkpoints

ORDER_OPTIONS = {"seed", "block_size", "stride", "packing_strategy", "data_weights"}  # they decide what comes next

SMALL_FILES_BYTES = 4_000_000  # room for tokenizer, code and configs

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)

Tensors = dict[str, torch.Tensor]


class Checkpoints:
    """The checkpoints of one run: when they are written, and which are kept."""

    def __init__(self, args: Arguments, tokenizer: Any, max_steps: int) -> None:
        self.args, self.tokenizer, self.max_steps = args, tokenizer, max_steps
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[str | None] | None = None

    def due(self, state: TrainingState) -> bool:
        return is_due(state.step, self.args.save_steps, self.max_steps)

    def save(
        self,
        state: TrainingState,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        stopping: bool = False,
    ) -> None:
        """Write `checkpoint-<step>`; older ones go only after it is there. Every process must call this.

        With `async_save` the training goes on while a thread writes. A disk without room is told, and the run goes on
        with its earlier checkpoints; where it ends here (`stopping`, the last step) that is a ValueError.
        """
        weights = get_model_state_dict(model, options=_WHOLE)
        moments = _flatten(get_optimizer_state_dict(model, _bare(optimizer), options=_WHOLE).get("state", {}))
        self.finish()
        if accelerator.is_main_process:
            if accelerator.scaler is not None:
                scale = accelerator.scaler.state_dict()
                state.loss_scale, state.loss_scale_growth = scale.get("scale"), scale.get("_growth_tracker")
            write = partial(self._write, replace(state), model, accelerator)
            last = stopping or state.step == self.max_steps
            if self.args.async_save and not last and not self.args.push_to_hub:
                self._writing = self._writer.submit(write, _own(weights), _own(moments))
            elif problem := write(weights, moments):
                if last:
                    raise UserError(f"checkpoint-{state.step} was not saved: {problem}; make room and start again")
                _tell(problem)
        accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        if self._writing is not None and (problem := self._writing.result()):
            _tell(problem)
        self._writing = None

    def _write(
        self, state: TrainingState, model: nn.Module, accelerator: Accelerator, weights: Tensors, moments: Tensors
    ) -> str | None:
        """Write the checkpoint of `state`, and let older ones go. Returns why it could not be, in words."""
        run_dir, name = self.args.run_dir, f"checkpoint-{state.step}"
        aside = run_dir / f".writing-{name}"
        clear_leftovers(run_dir)
        needed = sum(tensor.nbytes for tensor in (*weights.values(), *moments.values())) + SMALL_FILES_BYTES
        if problem := lack_of_room(run_dir, needed):
            return f"{name}: {problem}"
        try:
            write_model(aside, model, weights, self.tokenizer, accelerator)
            save_file(moments, aside / OPTIMIZER_FILE)
            state.save(aside / STATE_FILE)
            (aside / ARGUMENTS_FILE).write_text(self.args.as_yaml(), encoding="utf-8")
            seal(aside)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            if not _is_full(error):
                raise
            return f"{name}: the disk of {run_dir} is full; {needed / 1e6:,.1f} MB are needed"
        publish_folder(aside, run_dir / name)
        self._prune(state)
        return None

    def _prune(self, state: TrainingState) -> None:
        if self.args.save_total_limit is None:
            return
        best = f"checkpoint-{state.best_step}"
        for folder in find_checkpoints(self.args.run_dir)[: -self.args.save_total_limit]:
            if folder.name != best:
                remove_folder(folder)


def write_model(
    folder: Path, model: nn.Module, weights: dict[str, torch.Tensor], tokenizer: Any, accelerator: Accelerator
) -> None:
    """A folder that `from_pretrained` loads: weights, configs, modelling code, tokenizer."""
    # keep_fp32_wrapper=False would take mixed precision out of the very model that is still training
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    bare.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def save_model(folder: Path, model: nn.Module, tokenizer: Any, accelerator: Accelerator) -> None:
    """The weights as they are now, as a folder that `from_pretrained` loads. Every process must call this."""
    weights = get_model_state_dict(model, options=_WHOLE)
    if accelerator.is_main_process:
        write_model(folder, model, weights, tokenizer, accelerator)


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
            fsync(path)
            path.replace(args.run_dir / path.name)
        aside.rmdir()
    accelerator.wait_for_everyone()


def checkpoint_to_resume(args: Arguments) -> tuple[Path | None, list[str]]:
    """The folder that `resume_from_checkpoint` means (None: start from the beginning), and notes on damaged ones.

    'latest' is the newest one that is whole; without any it starts from the beginning, so that one command both starts
    and restarts a run. Raises UserError when the folder is no checkpoint, or all there are have been damaged.
    """
    if args.resume_from_checkpoint is None:
        return None, []
    if args.resume_from_checkpoint == "latest":
        folder, notes = newest_sound(args.run_dir)
        if folder is None and notes:
            raise UserError(f"{notes[0]}; no checkpoint is whole, start anew with --overwrite_output_dir")
        return folder, notes
    folder = Path(args.resume_from_checkpoint)
    if not (folder / STATE_FILE).is_file() and not (folder / OPTIMIZER_FILE).is_file():
        there = ", ".join(path.name for path in find_checkpoints(folder))
        hint = f"it holds {there}: name one of them" if there else "name a checkpoint-<step> folder, or 'latest'"
        raise UserError(f"resume_from_checkpoint={folder}: not a checkpoint of MiniGPT; {hint}")
    if problem := damage(folder):
        raise UserError(f"resume_from_checkpoint={folder} is damaged: {problem}; 'latest' takes the newest whole one")
    return folder, []


def load_training_state(folder: Path | None, args: Arguments, data_fingerprint: str) -> TrainingState:
    """The counters in a checkpoint, or of a new run.

    Raises UserError when it was trained on other data, or saw it in another order than it would from here on.
    """
    if folder is None:
        return TrainingState(data_fingerprint=data_fingerprint)
    state = TrainingState.load(folder / STATE_FILE)
    if state.data_fingerprint != data_fingerprint:
        raise UserError(
            f"{folder} was trained on other data; give the same text and tokenizer to go on, "
            f"or start a new run from its weights with --model_name_or_path {folder}"
        )
    before = read_config(folder / ARGUMENTS_FILE)
    for option in fields(args):
        value, old_value = getattr(args, option.name), before.get(option.name, option.default)
        if option.name in ORDER_OPTIONS and value != old_value:
            raise UserError(
                f"{option.name}={value}, but {folder} was trained with {old_value} and would see other samples; "
                f"give the same, or start a new run from its weights with --model_name_or_path {folder}"
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


def _own(tensors: Tensors) -> Tensors:
    """Tensors that the training will not change: on a CPU the state dicts share the memory of model and optimizer."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _is_full(error: Exception) -> bool:
    """Whether a file could not be written for want of room; safetensors wraps the system's error in one of its own."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in str(error)


def _tell(problem: str) -> None:
    print(f"  NOT SAVED, the run goes on: {problem}", flush=True)
