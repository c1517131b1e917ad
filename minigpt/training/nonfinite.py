"""Skip the steps whose gradient is not finite, and save what `minigpt replay` needs to run them again."""

import json
import math
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerFast

from minigpt.config.arguments import Arguments
from minigpt.training.model_files import write_model
from minigpt.training.optimizer_state import Tensors, gather_weights
from minigpt.training.optional_files import SMALL_FILES_BYTES, OptionalFiles, room_for_saving
from minigpt.training.state import TrainingState
from minigpt.utils.errors import UserError
from minigpt.utils.files import read_json, write_atomically
from minigpt.utils.progress import print_line
from minigpt.utils.run_files import ARGUMENTS_FILE, REPLAY_FILE, SKIPPED_STEPS_DIR


@dataclass(frozen=True)
class StepRecord:
    """A skipped step: what `minigpt replay` needs besides its weights and options."""

    step: int  # 0-based
    samples: list[int]  # sample ids of all ranks, in the order of the run
    processes: int
    mixed_precision: str
    learning_rate: float
    grad_norm: str  # nan, inf or -inf, which JSON has no number for
    data_fingerprint: str | None

    @classmethod
    def load(cls, path: Path) -> "StepRecord":
        """Raises UserError if there is no such file, or it is not the record of a skipped step."""
        names = [entry.name for entry in fields(cls)]
        record = f"the record of a skipped step, {SKIPPED_STEPS_DIR}/step-<step>/{REPLAY_FILE}"
        values = read_json(path, record, names)
        saved = cls(**{name: values[name] for name in names})
        if not saved._is_valid():
            raise UserError(f"{path}: not {record}: a value has another type")
        return saved

    def _is_valid(self) -> bool:
        numbers = isinstance(self.samples, list) and all(type(sample) is int for sample in self.samples)
        counts = type(self.step) is int and self.step >= 0 and type(self.processes) is int and self.processes > 0
        rate = isinstance(self.learning_rate, float) and math.isfinite(self.learning_rate)
        texts = isinstance(self.mixed_precision, str) and isinstance(self.grad_norm, str)
        return numbers and bool(self.samples) and counts and rate and texts


class SkippedSteps:
    """The steps of a run that were not applied because their gradient contains a NaN or an infinity."""

    def __init__(self, args: Arguments, tokenizer: PreTrainedTokenizerFast, optional_files: OptionalFiles) -> None:
        self.args, self.tokenizer, self.optional_files = args, tokenizer, optional_files

    def too_many(self, state: TrainingState) -> bool:
        """Whether more than `max_skipped_steps` steps were skipped."""
        return state.skipped_steps > self.args.max_skipped_steps

    def record(
        self,
        state: TrainingState,
        model: nn.Module,
        accelerator: Accelerator,
        samples: list[int],
        learning_rate: float,
        grad_norm: float,
    ) -> None:
        """Count step `state.step` as skipped, and save its weights, options and samples. Every rank must call this.

        `samples` are the sample ids of all ranks, in the order of the run. A record for which the disk has no room
        next to a checkpoint and the final model is dropped.
        """
        state.skipped_steps += 1
        if accelerator.scaler is not None:
            accelerator.scaler.update()  # without it the scaler takes this gradient for unscaled already
        weights = gather_weights(model)
        if accelerator.is_main_process:
            record = StepRecord(
                step=state.step,
                samples=samples,
                processes=accelerator.num_processes,
                mixed_precision=accelerator.mixed_precision,
                learning_rate=learning_rate,
                grad_norm=repr(grad_norm),
                data_fingerprint=state.data_fingerprint,
            )
            folder = self.args.run_dir / SKIPPED_STEPS_DIR / f"step-{state.step:06}"
            weights_bytes = sum(tensor.nbytes for tensor in weights.values())
            is_saved = self.optional_files.write(
                "records of skipped steps",
                room_for_saving(weights_bytes) + weights_bytes + SMALL_FILES_BYTES,
                lambda: self._write(folder, record, model, weights, accelerator),
            )
            way_out = f" To inspect it: minigpt replay {folder / REPLAY_FILE}" if is_saved else ""
            print_line(
                f"step {state.step + 1} skipped: its gradient is not finite ({grad_norm}); "
                f"{state.skipped_steps} of {self.args.max_skipped_steps} allowed.{way_out}"
            )
        accelerator.wait_for_everyone()

    def _write(
        self, folder: Path, record: StepRecord, model: nn.Module, weights: Tensors, accelerator: Accelerator
    ) -> None:
        try:
            write_model(folder, model, weights, self.tokenizer, accelerator)
            write_atomically(folder / ARGUMENTS_FILE, self.args.as_yaml())
            write_atomically(folder / REPLAY_FILE, json.dumps(asdict(record), indent=2) + "\n")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # half a record cannot be replayed
            raise


def is_applicable(grad_norm: float, scaler: torch.amp.GradScaler | None) -> bool:
    """Whether the optimizer may apply a gradient of this norm.

    In fp16 an infinity is usually an overflow: the scaler then skips the step itself and halves its scale. Only at a
    scale of 1 or less has the gradient itself diverged.
    """
    return math.isfinite(grad_norm) or (scaler is not None and scaler.get_scale() > 1)
