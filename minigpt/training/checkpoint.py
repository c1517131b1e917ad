"""Write the checkpoints of a run and delete old ones.

A checkpoint is a folder `checkpoint-<step>`: a model that `from_pretrained` loads, and next to it

    optimizer.safetensors    <parameter>.<moment>, the same for every wrapper and number of ranks (of a sharded model:
                             several files, as of the weights; see minigpt.training.sharded_checkpoint)
    training_state.json      the counters of minigpt.training.state
    arguments.yaml           the options of the run
    checkpoint.json          size and SHA-256 of every file (minigpt.training.checkpoint_files)
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from minigpt.config.arguments import Arguments
from minigpt.modeling.lora import has_adapter
from minigpt.training.checkpoint_files import remove_leftovers, write_checksums
from minigpt.training.model_files import unwrapped_model, write_description, write_model
from minigpt.training.optimizer_state import (
    Tensors,
    gather_moments,
    gather_weights,
    share_of_moments,
    share_of_weights,
)
from minigpt.training.optional_files import SMALL_FILES_BYTES
from minigpt.training.sharded_checkpoint import ShardedWriter, is_sharded
from minigpt.training.state import TrainingState
from minigpt.utils.errors import RunFailure
from minigpt.utils.files import is_disk_full, lack_of_room, publish_folder, remove_folder, write_atomically
from minigpt.utils.formatting import format_bytes
from minigpt.utils.progress import print_line
from minigpt.utils.run_files import ARGUMENTS_FILE, OPTIMIZER_FILE, STATE_FILE, checkpoint_step, find_checkpoints


class Checkpoints:
    """The checkpoints of one run: when they are written, and which are kept."""

    def __init__(self, args: Arguments, tokenizer: PreTrainedTokenizerFast) -> None:
        self.args, self.tokenizer = args, tokenizer
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[str | None] | None = None
        self._sharded: ShardedWriter | None = None  # made by all ranks at the first checkpoint of a sharded model

    def due(self, state: TrainingState) -> bool:
        """Whether `save_steps` asks for a checkpoint after this step."""
        return state.is_due(self.args.save_steps)

    def save(
        self,
        state: TrainingState,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        stopping: bool = False,
    ) -> bool:
        """Write `checkpoint-<step>`, then delete the ones that are no longer kept. Every rank must call this.

        With `async_save` a thread writes the checkpoint while training continues. If the disk is full, a warning is
        printed, training continues, and the result is False on the main process. Raises RunFailure if the disk is
        full and the run ends here (`stopping`, or the last step).
        """
        problem = self._save(state, model, optimizer, accelerator, stopping)
        if problem is not None:
            if stopping or state.is_done:
                raise RunFailure(f"{problem}; free some space and resume with --resume_from_checkpoint latest")
            _warn(problem)
        accelerator.wait_for_everyone()
        return problem is None

    @contextmanager
    def saved_on_error(
        self,
        is_due: bool,
        state: TrainingState,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
    ) -> Iterator[None]:
        """Write `checkpoint-<step>` if an error inside the block would lose it, then raise the error.

        Nothing here waits for the other ranks, which may not have the error. So only the main process saves, and
        sharded weights are not saved.
        """
        try:
            yield
        except Exception:
            if is_due and accelerator.is_main_process and not (accelerator.is_fsdp2 and accelerator.num_processes > 1):
                problem = self._save(state, model, optimizer, accelerator, run_ends=True)
                saved = f"  checkpoint-{state.step} was saved before the error below"
                print_line(f"  WARNING: {problem}" if problem else saved)
            raise

    def _save(
        self,
        state: TrainingState,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        run_ends: bool,
    ) -> str | None:
        """Write the checkpoint, or start to. Returns a sentence on the main process if there is no room for it."""
        if accelerator.scaler is not None:
            scaler = accelerator.scaler.state_dict()
            state.loss_scale, state.loss_scale_growth = scaler.get("scale"), scaler.get("_growth_tracker")
        unwrapped = unwrapped_model(model, accelerator)
        by_shares = is_sharded(model) and not has_adapter(unwrapped)
        if by_shares:
            weights = share_of_weights(model, unwrapped.all_tied_weights_keys)
            moments = share_of_moments(model, optimizer)
        else:
            weights, moments = gather_weights(model), gather_moments(model, optimizer)
        self.finish()
        if by_shares:
            self._sharded = self._sharded or ShardedWriter(timedelta(seconds=self.args.ddp_timeout))
            write = partial(self._write_share, self._sharded, replace(state), model, accelerator)
        elif accelerator.is_main_process:
            write = partial(self._write, replace(state), model, accelerator)
        else:
            return None
        in_background = self.args.async_save and not self.args.push_to_hub
        if in_background and not run_ends and not state.is_done:
            # on a CPU both share the memory of model and optimizer, which the next steps change
            self._pending = self._writer.submit(write, _copied(weights), _copied(moments))
            return None
        return write(weights, moments)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        if self._pending is not None and (problem := self._pending.result()):
            _warn(problem)
        self._pending = None

    def _write(
        self, state: TrainingState, model: nn.Module, accelerator: Accelerator, weights: Tensors, moments: Tensors
    ) -> str | None:
        """Write the checkpoint of `state` and delete old ones. Returns a sentence if there is no room for it."""
        run_dir, name = self.args.run_dir, f"checkpoint-{state.step}"
        unfinished = run_dir / f".writing-{name}"
        remove_leftovers(run_dir)
        needed = sum(tensor.nbytes for tensor in (*weights.values(), *moments.values())) + SMALL_FILES_BYTES
        if problem := lack_of_room(run_dir, needed):
            return f"{name} was not saved: {problem}"
        try:
            write_model(unfinished, model, weights, self.tokenizer, accelerator)
            save_file(moments, unfinished / OPTIMIZER_FILE)
            self._write_state(unfinished, state)
            write_checksums(unfinished)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if not is_disk_full(error):
                raise
            return f"{name} was not saved: the disk of {run_dir} is full; {format_bytes(needed)} are needed"
        publish_folder(unfinished, run_dir / name)
        self._delete_old(state)
        return None

    def _write_share(
        self,
        writer: ShardedWriter,
        state: TrainingState,
        model: nn.Module,
        accelerator: Accelerator,
        weights: Tensors,
        moments: Tensors,
    ) -> str | None:
        """As `_write`, by all ranks together, each with its share of weights and moments."""
        name = f"checkpoint-{state.step}"

        def write_other_files(folder: Path) -> None:
            write_description(folder, model, self.tokenizer, accelerator)
            self._write_state(folder, state)

        if problem := writer.write(self.args.run_dir / name, weights, moments, write_other_files):
            return f"{name} was not saved: {problem}"
        if accelerator.is_main_process:
            self._delete_old(state)
        return None

    def _write_state(self, folder: Path, state: TrainingState) -> None:
        state.save(folder / STATE_FILE)
        write_atomically(folder / ARGUMENTS_FILE, self.args.as_yaml())

    def _delete_old(self, state: TrainingState) -> None:
        """Keep the newest `save_total_limit` checkpoints, the one just written, and the best one."""
        if self.args.save_total_limit is None:
            return
        kept = {state.step, state.best_step}
        for folder in find_checkpoints(self.args.run_dir)[: -self.args.save_total_limit]:
            if checkpoint_step(folder) not in kept:
                remove_folder(folder)


def _copied(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _warn(problem: str) -> None:
    print_line(f"  WARNING: {problem}; training continues")
