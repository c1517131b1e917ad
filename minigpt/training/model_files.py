"""Write the model in training as a folder that `from_pretrained` loads."""

import shutil
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minigpt.config.arguments import Arguments
from minigpt.training.optimizer_state import Tensors, gather_weights
from minigpt.training.state import TrainingState
from minigpt.utils.files import fsync
from minigpt.utils.run_files import ARGUMENTS_FILE, OPTIMIZER_FILE, STATE_FILE


def write_model(
    folder: Path, model: nn.Module, weights: Tensors, tokenizer: PreTrainedTokenizerFast, accelerator: Accelerator
) -> None:
    """Write `weights`, the configs, the modeling code and the tokenizer into `folder`."""
    # keep_fp32_wrapper=False would turn mixed precision off in the model that is still training
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    assert isinstance(unwrapped, PreTrainedModel)
    # copies no longer share memory, by which transformers recognizes a tied head: it would be stored twice
    weights = {name: tensor for name, tensor in weights.items() if name not in unwrapped.all_tied_weights_keys}
    unwrapped.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def save_model(folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast, accelerator: Accelerator) -> None:
    """Write the model with its current weights into `folder`. Every rank must call this."""
    weights = gather_weights(model)
    if accelerator.is_main_process:
        write_model(folder, model, weights, tokenizer, accelerator)


def write_final_model(
    args: Arguments,
    state: TrainingState,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    accelerator: Accelerator,
) -> None:
    """Write the current model, or the best one with `load_best_model_at_end`, into the run's folder.

    Every rank must call this. Each file replaces an older one atomically.
    """
    weights = gather_weights(model)
    if accelerator.is_main_process:
        best = args.run_dir / f"checkpoint-{state.best_step}"
        unfinished = args.run_dir / ".writing-model"
        shutil.rmtree(unfinished, ignore_errors=True)
        if args.load_best_model_at_end and best.is_dir():
            not_the_model = shutil.ignore_patterns(OPTIMIZER_FILE, STATE_FILE, ARGUMENTS_FILE)
            shutil.copytree(best, unfinished, ignore=not_the_model)
        else:
            write_model(unfinished, model, weights, tokenizer, accelerator)
        for path in unfinished.iterdir():
            fsync(path)
            path.replace(args.run_dir / path.name)
        unfinished.rmdir()
    accelerator.wait_for_everyone()
