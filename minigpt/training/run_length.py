"""The length of a run and its learning rate: fixed in steps, or by `train_minutes`."""

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from minigpt.config.arguments import Arguments
from minigpt.optim.lr_schedule import Schedule, learning_rate_at
from minigpt.training.state import TrainingState


class RunLength:
    """When a run ends, as `state.max_steps`, and the learning rate on the way there.

    With `train_minutes`, `state.max_steps` is corrected at every logged step, when the speed of the run is known. The
    learning rate follows the time: when half of it is over, the rate is that of half of the steps of `schedule`.
    Between two corrections both are functions of the state, so a resumed run takes the same steps.
    """

    def __init__(self, args: Arguments, schedule: Schedule, state: TrainingState) -> None:
        self.schedule, self.limit_s = schedule, 60 * args.train_minutes
        self._since_step, self._since_s = state.step, state.elapsed_s
        if not self.limit_s or state.step == 0:
            state.max_steps = schedule.max_steps
        elif state.is_done:  # the run is resumed, perhaps with more minutes
            self._correct(state, state.elapsed_s, state.elapsed_s / state.step)

    def learning_rate(self, state: TrainingState) -> float:
        """The learning rate of the next step."""
        if not self.limit_s or state.step < self.schedule.warmup_steps:
            return learning_rate_at(state.step, self.schedule)
        steps_to_come = max(1, state.max_steps - state.timed_step)
        share = state.timed_share + (1 - state.timed_share) * (state.step - state.timed_step) / steps_to_come
        return learning_rate_at(max(self.schedule.warmup_steps, share * self.schedule.max_steps), self.schedule)

    def correct(self, state: TrainingState, accelerator: Accelerator) -> None:
        """Bring `state.max_steps` in line with the time that is left. All ranks must call this after the same step.

        A GPU may still compute the last steps; they are counted at the next correction.
        """
        if not self.limit_s:
            return
        elapsed = broadcast(torch.tensor([state.elapsed_s], device=accelerator.device))  # all ranks take the same time
        elapsed_s = float(elapsed)
        self._correct(state, elapsed_s, (elapsed_s - self._since_s) / (state.step - self._since_step))
        self._since_step, self._since_s = state.step, elapsed_s

    def _correct(self, state: TrainingState, elapsed_s: float, step_s: float) -> None:
        state.max_steps = state.step + max(0, round((self.limit_s - elapsed_s) / step_s))
        state.timed_step, state.timed_share = state.step, min(1.0, elapsed_s / self.limit_s)
