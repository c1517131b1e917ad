"""Skip steps whose gradient is not finite, and record what is needed to replay them."""

import json
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from minigpt.config.arguments import Arguments
from minigpt.training.checkpoint import save_model
from minigpt.training.state import TrainingState
from minigpt.utils.errors import UserError
from minigpt.utils.run_files import ARGUMENTS_FILE, REPLAY_FILE

EXIT_DIVERGED = 76  # too many steps left out: saved and stopped, the recipe needs another look


class SkippedSteps:
    """Steps whose gradient has a NaN or an infinity in it."""

    def __init__(self, args: Arguments, tokenizer: Any) -> None:
        self.args, self.tokenizer = args, tokenizer

    def too_many(self, state: TrainingState) -> bool:
        return state.skipped_steps > self.args.max_skipped_steps

    def skip(
        self,
        state: TrainingState,
        model: nn.Module,
        accelerator: Accelerator,
        samples: list[int],
        learning_rate: float,
        grad_norm: float,
    ) -> None:
        """Count step `state.step` as skipped and write it down. Every process must call this.

        `samples` are those of the step on all processes, in the order of the run.
        """
        state.skipped_steps += 1
        if accelerator.scaler is not None:
            accelerator.scaler.update()  # else it would hold this gradient for unscaled
        folder = self.args.run_dir / "bad_steps" / f"step-{state.step:06}"
        save_model(folder, model, self.tokenizer, accelerator)
        if accelerator.is_main_process:
            (folder / ARGUMENTS_FILE).write_text(self.args.as_yaml(), encoding="utf-8")
            record = {
                "step": state.step,
                "samples": samples,
                "processes": accelerator.num_processes,
                "mixed_precision": accelerator.mixed_precision,
                "learning_rate": learning_rate,
                "grad_norm": repr(grad_norm),
                "data_fingerprint": state.data_fingerprint,
            }
            (folder / REPLAY_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            print(
                f"step {state.step + 1} is left out: its gradient is not finite ({grad_norm}); "
                f"{state.skipped_steps} of {self.args.max_skipped_steps} allowed. "
                f"To look at it: minigpt replay {folder / REPLAY_FILE}",
                flush=True,
            )
        accelerator.wait_for_everyone()


def is_applicable(grad_norm: float, scaler: Any) -> bool:
    """Whether the optimizer may take a gradient of this norm.

    In fp16 an infinity is usually an overflow: the scaler then leaves the step out by itself and halves its scale.
    Only where the scale is down to 1 has the gradient itself diverged.
    """
    return math.isfinite(grad_norm) or (scaler is not None and scaler.get_scale() > 1)


def read_record(file: Path) -> dict[str, Any]:
    """What `skip` wrote. Raises UserError for a file that is something else."""
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        record["samples"], record["processes"], record["step"]
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; give the {REPLAY_FILE} of a step that was left out") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a record of a step; give a bad_steps/step-<step>/{REPLAY_FILE}") from error
    return record
