"""Profile some steps: where their time goes, as a trace for https://ui.perfetto.dev and as a table."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProfileKwargs

from minigpt.config.arguments import Arguments
from minigpt.training.state import TrainingState
from minigpt.utils.files import write_atomically
from minigpt.utils.run_files import PROFILE_DIR

TABLE_ROWS = 30


class StepProfiler:
    """Profiles the steps `profile_steps`, first and last, of every rank, into the folder profile/ of the run."""

    def __init__(self, args: Arguments, accelerator: Accelerator) -> None:
        self.accelerator, self.folder = accelerator, args.run_dir / PROFILE_DIR
        self.first, self.last = args.profile_steps or (0, 0)
        self._stack = ExitStack()
        self._profile: Any = None  # torch.profiler.profile

    def before_step(self, state: TrainingState) -> None:
        """Start if the step after `state.step` is the first one."""
        if state.step + 1 == self.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            options = ProfileKwargs(record_shapes=True, profile_memory=True, output_trace_dir=str(self.folder))
            self._profile = self._stack.enter_context(self.accelerator.profile(options))

    def after_step(self, state: TrainingState) -> Path | None:
        """Stop after the last step. Returns the file of the table."""
        if self._profile is None or not (state.step == self.last or state.is_done):
            return None
        profile = self._profile
        self.close()
        time = "self_device_time_total" if self.accelerator.device.type == "cuda" else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=time, row_limit=TABLE_ROWS, max_name_column_width=80)
        path = self.folder / f"table_{self.accelerator.process_index}.txt"
        write_atomically(path, table)
        return path

    def close(self) -> None:
        """Stop, also before the last step: the trace has the steps until then."""
        self._stack.close()
        self._profile = None
