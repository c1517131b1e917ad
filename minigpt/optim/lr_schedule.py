"""Learning-rate schedule: the rate as a pure function of the step, so there is no state to save."""

import math
from dataclasses import dataclass

import torch

from minigpt.config.arguments import Arguments
from minigpt.utils.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to the peak `learning_rate`, then a decay to `min_learning_rate`.

    The decay would reach `min_learning_rate` at step `max_steps`, one step after the last.

    - warmup_steps, max_steps, num_decay_steps: numbers of optimizer steps; max_steps includes the warm-up.
    - lr_scheduler_type: shape of the decay, cosine or linear; constant has no decay; warmup_stable_decay stays at the
      peak until the last `num_decay_steps` steps and then decays linearly.

    Raises UserError if warm-up and decay take more than `max_steps`.
    """

    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    max_steps: int
    lr_scheduler_type: str
    num_decay_steps: int | None = None

    def __post_init__(self) -> None:
        if self.warmup_steps > self.max_steps:
            raise UserError(
                f"warmup_steps={self.warmup_steps} is more than the {self.max_steps} steps of the run; "
                f"try {self.max_steps // 10}"
            )
        if self.warmup_steps + (self.num_decay_steps or 0) > self.max_steps:
            raise UserError(
                f"warmup_steps={self.warmup_steps} and num_decay_steps={self.num_decay_steps} are more than the "
                f"{self.max_steps} steps of the run; try num_decay_steps={self.max_steps - self.warmup_steps}"
            )

    @property
    def decay_start(self) -> int:
        """The last step at the peak; the rate decreases after it."""
        return self.warmup_steps if self.num_decay_steps is None else self.max_steps - self.num_decay_steps


def build_schedule(args: Arguments, max_steps: int, processes: int) -> Schedule:
    """The schedule of a run of `max_steps` steps; `scale_learning_rate` multiplies its rates by `processes`.

    `num_decay_steps` defaults to a fifth of the run. Raises UserError if warm-up and decay take more than `max_steps`.
    """
    is_part = args.warmup_steps < 1
    scale = processes if args.scale_learning_rate else 1
    num_decay_steps = None
    if args.lr_scheduler_type == "warmup_stable_decay":
        num_decay_steps = args.num_decay_steps or max(1, max_steps // 5)
    return Schedule(
        learning_rate=args.learning_rate * scale,
        min_learning_rate=args.min_learning_rate * scale,
        warmup_steps=math.ceil(args.warmup_steps * max_steps) if is_part else int(args.warmup_steps),
        max_steps=max_steps,
        lr_scheduler_type=args.lr_scheduler_type,
        num_decay_steps=num_decay_steps,
    )


def learning_rate_at(step: float, schedule: Schedule) -> float:
    """Learning rate of the optimizer step `step` (0-based; between two steps, if the length of the run is a time).

    The warm-up starts above zero, at 1 / (warmup_steps + 1) of the peak. Raises ValueError if `step` is negative.
    Sources: Brown et al. 2020 (https://arxiv.org/abs/2005.14165), appendix B, for warm-up and cosine;
    Hu et al. 2024 (https://arxiv.org/abs/2404.06395) for warmup_stable_decay.
    """
    if step < 0:
        raise ValueError(f"step={step} is negative")
    peak, minimum, warmup_steps = schedule.learning_rate, schedule.min_learning_rate, schedule.warmup_steps
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule.lr_scheduler_type == "constant":
        return peak
    start = schedule.decay_start
    progress = min(1.0, max(0, step - start) / max(1, schedule.max_steps - start))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.lr_scheduler_type == "cosine" else 1 - progress
    return minimum + (peak - minimum) * remaining


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of every parameter group to `learning_rate` times the group's `lr_ratio` (default 1)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
