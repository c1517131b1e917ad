"""Write the model in training as a folder that `from_pretrained` loads."""

import shutil
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minigpt.config.arguments import Arguments
from minigpt.modeling.lora import has_adapter, save_adapter
from minigpt.training.optimizer_state import Tensors, gather_weights
from minigpt.training.optional_files import SMALL_FILES_BYTES
from minigpt.training.sharded_checkpoint import is_sharded
from minigpt.training.state import TrainingState
from minigpt.utils.errors import RunFailure
from minigpt.utils.files import fsync, is_disk_full, lack_of_room, publish_folder
from minigpt.utils.progress import print_line
from minigpt.utils.run_files import (
    ARGUMENTS_FILE,
    CHECKSUMS_FILE,
    OPTIMIZER_FILES,
    STATE_FILE,
    WEIGHT_FILES,
    find_files,
)


def write_model(
    folder: Path, model: nn.Module, weights: Tensors, tokenizer: PreTrainedTokenizerFast, accelerator: Accelerator
) -> None:
    """Write `weights`, the configs, the modeling code and the tokenizer into `folder`. An adapter needs no code."""
    unwrapped = unwrapped_model(model, accelerator)
    if has_adapter(unwrapped):
        save_adapter(unwrapped, folder, weights)
        tokenizer.save_pretrained(folder)
        return
    # copies no longer share memory, by which transformers recognizes a tied head: it would be stored twice
    weights = {name: tensor for name, tensor in weights.items() if name not in unwrapped.all_tied_weights_keys}
    unwrapped.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def write_description(
    folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast, accelerator: Accelerator
) -> None:
    """Write what `write_model` does, except the weights."""
    unwrapped_model(model, accelerator).save_pretrained(folder, state_dict={})
    tokenizer.save_pretrained(folder)


def unwrapped_model(model: nn.Module, accelerator: Accelerator) -> PreTrainedModel:
    """The model without its wrappers."""
    # keep_fp32_wrapper=False would turn mixed precision off in the model that is still training
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    assert isinstance(unwrapped, PreTrainedModel)
    return unwrapped


def write_final_model(
    args: Arguments,
    state: TrainingState,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    accelerator: Accelerator,
) -> None:
    """Write the current model, or the best one with `load_best_model_at_end`, into the run's folder.

    Every rank must call this. Each file replaces an older one atomically. Raises RunFailure if the disk is full.
    """
    best, last = (args.run_dir / f"checkpoint-{step}" for step in (state.best_step, state.step))
    is_saved = is_sharded(model) and last.is_dir()  # no rank has room for a large model
    weights = {} if is_saved else gather_weights(model)
    if accelerator.is_main_process:
        is_best = args.load_best_model_at_end and state.best_step is not None
        if is_best and not best.is_dir():  # it found no room on the disk
            print_line(
                f"  WARNING: {best.name}, the best one, could not be saved: "
                f"the final model is that of step {state.step}"
            )
        source = best if is_best and best.is_dir() else last if is_saved else None
        unfinished = args.run_dir / ".writing-model"
        shutil.rmtree(unfinished, ignore_errors=True)
        way_out = "free some space and resume with --resume_from_checkpoint latest"
        needed = sum(tensor.nbytes for tensor in weights.values())
        if source is not None:
            needed = sum(path.stat().st_size for path in find_files(source, WEIGHT_FILES))
        if problem := lack_of_room(args.run_dir, needed + SMALL_FILES_BYTES):
            raise RunFailure(f"the final model was not saved: {problem}; {way_out}")
        try:
            if source is not None:
                not_the_model = shutil.ignore_patterns(*OPTIMIZER_FILES, STATE_FILE, ARGUMENTS_FILE, CHECKSUMS_FILE)
                shutil.copytree(source, unfinished, ignore=not_the_model)
            else:
                write_model(unfinished, model, weights, tokenizer, accelerator)
            for path in unfinished.rglob("*"):
                fsync(path)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if not is_disk_full(error):
                raise
            problem = f"the disk of {args.run_dir} is full"
            raise RunFailure(f"the final model was not saved: {problem}; {way_out}") from error
        written = [path.name for path in unfinished.iterdir()]
        for path in unfinished.iterdir():
            if path.is_dir():  # as additional_chat_templates
                publish_folder(path, args.run_dir / path.name)
            else:
                path.replace(args.run_dir / path.name)
        unfinished.rmdir()
        for path in find_files(args.run_dir, WEIGHT_FILES):
            if path.name not in written:  # of a model that was saved by another number of ranks
                path.unlink()
        fsync(args.run_dir)
    accelerator.wait_for_everyone()
