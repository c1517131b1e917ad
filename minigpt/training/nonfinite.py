"""Skip the steps whose gradient is not finite, and save what `minigpt replay` needs to run them again."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerFast

from minigpt.config.arguments import Arguments
from minigpt.training.model_files import save_model
from minigpt.training.state import TrainingState
from minigpt.utils.errors import UserError
from minigpt.utils.files import write_atomically
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
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file; give the {REPLAY_FILE} of a skipped step") from error
        except (ValueError, TypeError) as error:  # not JSON, or other keys
            raise UserError(
                f"{path}: not the record of a skipped step; give a {SKIPPED_STEPS_DIR}/step-<step>/{REPLAY_FILE}"
            ) from error


class SkippedSteps:
    """The steps of a run that were not applied because their gradient contains a NaN or an infinity."""

    def __init__(self, args: Arguments, tokenizer: PreTrainedTokenizerFast) -> None:
        self.args, self.tokenizer = args, tokenizer

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

        `samples` are the sample ids of all ranks, in the order of the run.
        """
        state.skipped_steps += 1
        if accelerator.scaler is not None:
            accelerator.scaler.update()  # without it the scaler takes this gradient for unscaled already
        folder = self.args.run_dir / SKIPPED_STEPS_DIR / f"step-{state.step:06}"
        save_model(folder, model, self.tokenizer, accelerator)
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
            write_atomically(folder / ARGUMENTS_FILE, self.args.as_yaml())
            write_atomically(folder / REPLAY_FILE, json.dumps(asdict(record), indent=2) + "\n")
            print_line(
                f"step {state.step + 1} skipped: its gradient is not finite ({grad_norm}); "
                f"{state.skipped_steps} of {self.args.max_skipped_steps} allowed. "
                f"To inspect it: minigpt replay {folder / REPLAY_FILE}"
            )
        accelerator.wait_for_everyone()


def is_applicable(grad_norm: float, scaler: torch.amp.GradScaler | None) -> bool:
    """Whether the optimizer may apply a gradient of this norm.

    In fp16 an infinity is usually an overflow: the scaler then skips the step itself and halves its scale. Only at a
    scale of 1 or less has the gradient itself diverged.
    """
    return math.isfinite(grad_norm) or (scaler is not None and scaler.get_scale() > 1)
