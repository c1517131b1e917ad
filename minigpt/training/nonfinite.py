"""Skip the steps whose gradient is not finite, and save what `minigpt replay` needs to run them again."""

import json
import math
import shutil
from collections.abc import Callable
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


@dataclass(frozen=True)
class Attempt:
    """A step that may turn out not to be applicable."""

    step: int  # 0-based
    sample_ids: Callable[[], list[int]]  # of all ranks, in the order of the run
    learning_rate: float
    grad_norm: "HostCopy"


class HostCopy:
    """A number of the device that the host reads later, without waiting for what the device does in between."""

    def __init__(self, number: torch.Tensor) -> None:
        self.number, self._is_copied = number, None
        if number.is_cuda:
            self.number = torch.empty((), dtype=number.dtype, pin_memory=True)
            self.number.copy_(number, non_blocking=True)
            self._is_copied = torch.cuda.Event()
            self._is_copied.record()

    def read(self) -> float:
        """The number; waits only until it was computed."""
        if self._is_copied is not None:
            self._is_copied.synchronize()
        return float(self.number)


class SkippedSteps:
    """The steps of a run that were not applied because their gradient contains a NaN or an infinity.

    A CPU looks at the gradient's norm before the update. On a GPU the host would have to wait for the whole step to do
    so: the optimizer skips the update on the device, and the host looks when the next step is under way.
    """

    def __init__(
        self,
        args: Arguments,
        tokenizer: PreTrainedTokenizerFast,
        optional_files: OptionalFiles,
        accelerator: Accelerator,
    ) -> None:
        self.args, self.tokenizer, self.optional_files, self.accelerator = args, tokenizer, optional_files, accelerator
        self._attempt: Attempt | None = None

    def too_many(self, state: TrainingState) -> bool:
        """Whether more than `max_skipped_steps` steps were skipped."""
        return state.skipped_steps > self.args.max_skipped_steps

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        grad_norm: torch.Tensor,
        sample_ids: Callable[[], list[int]],
        learning_rate: float,
        state: TrainingState,
        model: nn.Module,
    ) -> None:
        """Apply the gradient if `grad_norm` is finite; if not, leave weights and moments. Every rank must call this.

        `sample_ids` returns those of all ranks, in the order of the run.
        """
        self._attempt = Attempt(state.step, sample_ids, learning_rate, HostCopy(grad_norm))
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        device_skips = grad_norm.device.type != "cpu" and inner.defaults.get("fused") and not self.accelerator.scaler
        if device_skips:
            inner.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]  # as GradScaler sets it
            optimizer.step()
        elif is_applicable(self._attempt.grad_norm.read(), self.accelerator.scaler):
            optimizer.step()
            self._attempt = None
        else:
            self.settle(state, model)

    def settle(self, state: TrainingState, model: nn.Module) -> None:
        """Look at the last step; if it was skipped, count and record it. Must come before the next update.

        Until then the weights are those of a skipped step. Every rank must call this.
        """
        attempt, self._attempt = self._attempt, None
        if attempt is not None and not math.isfinite(norm := attempt.grad_norm.read()):
            self._record(attempt, norm, state, model)

    def _record(self, attempt: Attempt, grad_norm: float, state: TrainingState, model: nn.Module) -> None:
        """Count a skipped step, and save its weights, options and samples.

        A record for which the disk has no room next to a checkpoint and the final model is dropped.
        """
        accelerator = self.accelerator
        state.skipped_steps += 1
        if accelerator.scaler is not None:
            accelerator.scaler.update()  # without it the scaler takes this gradient for unscaled already
        weights = gather_weights(model)
        if accelerator.is_main_process:
            record = StepRecord(
                step=attempt.step,
                samples=attempt.sample_ids(),
                processes=accelerator.num_processes,
                mixed_precision=accelerator.mixed_precision,
                learning_rate=attempt.learning_rate,
                grad_norm=repr(grad_norm),
                data_fingerprint=state.data_fingerprint,
            )
            folder = self.args.run_dir / SKIPPED_STEPS_DIR / f"step-{attempt.step:06}"
            weights_bytes = sum(tensor.nbytes for tensor in weights.values())
            is_saved = self.optional_files.write(
                "records of skipped steps",
                room_for_saving(weights_bytes) + weights_bytes + SMALL_FILES_BYTES,
                lambda: self._write(folder, record, model, weights),
            )
            way_out = f" To inspect it: minigpt replay {folder / REPLAY_FILE}" if is_saved else ""
            print_line(
                f"step {attempt.step + 1} skipped: its gradient is not finite ({grad_norm}); "
                f"{state.skipped_steps} of {self.args.max_skipped_steps} allowed.{way_out}"
            )
        accelerator.wait_for_everyone()

    def _write(self, folder: Path, record: StepRecord, model: nn.Module, weights: Tensors) -> None:
        try:
            write_model(folder, model, weights, self.tokenizer, self.accelerator)
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
