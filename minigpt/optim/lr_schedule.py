"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass

import torch

from minigpt.config.arguments import Arguments
from minigpt.utils.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a decay from `learning_rate` to `min_learning_rate` that ends at `max_steps`.

    `warmup_stable_decay` stays at `learning_rate` until `num_decay_steps` are left.
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
        """The first step of the decay."""
        return self.warmup_steps if self.num_decay_steps is None else self.max_steps - self.num_decay_steps


def learning_rate_at(step: int, schedule: Schedule) -> float:
    """Learning rate for update `step` (0-based).

    Linear warm-up to `schedule.learning_rate`; then half a cosine, a line, a line after a stretch at the peak, or
    nothing down to `schedule.min_learning_rate`. Raises UserError if `step` is negative.
    Sources: Brown et al. 2020 (arXiv:2005.14165), appendix B; Hu et al. 2024 (arXiv:2404.06395) for the stretch.
    """
    if step < 0:
        raise ValueError(f"step={step} is negative")
    peak, floor, warmup = schedule.learning_rate, schedule.min_learning_rate, schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule.lr_scheduler_type == "constant":
        return peak
    start = schedule.decay_start
    progress = min(1.0, max(0, step - start) / max(1, schedule.max_steps - start))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.lr_scheduler_type == "cosine" else 1 - progress
    return floor + (peak - floor) * remaining


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group `learning_rate` times its own `lr_ratio` (1 where it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)


def build_schedule(args: Arguments, max_steps: int, processes: int) -> Schedule:
    """The learning rates of the run, times the number of processes if `scale_learning_rate` says so."""
    scale = processes if args.scale_learning_rate else 1
    decays_late = args.lr_scheduler_type == "warmup_stable_decay"
    return Schedule(
        learning_rate=args.learning_rate * scale,
        min_learning_rate=args.min_learning_rate * scale,
        warmup_steps=args.warmup_steps,
        max_steps=max_steps,
        lr_scheduler_type=args.lr_scheduler_type,
        num_decay_steps=args.num_decay_steps or max(1, max_steps // 5) if decays_late else None,
    )
