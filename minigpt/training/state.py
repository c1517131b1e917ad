"""The state of a run: counters that, together with the options, decide everything that follows."""

import json
import math
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from minigpt.utils.files import read_json, write_atomically


@dataclass
class TrainingState:
    """Counters of a run. Data order, learning rate and dropout are functions of these counters and the options."""

    step: int = 0  # optimizer updates done, skipped steps included
    samples_seen: int = 0
    tokens_seen: int = 0  # targets with a loss
    elapsed_s: float = 0.0  # training time; evaluation, sampling and saving excluded
    max_steps: int = 0  # the step after which the run ends; corrected by `RunLength`
    timed_step: int = 0  # the step of the last correction,
    timed_share: float = 0.0  # and how much of the time was over then
    skipped_steps: int = 0  # steps that were not applied because their gradient was not finite
    best_step: int | None = None
    best_val_loss: float | None = None
    loss_scale: float | None = None  # fp16 only
    loss_scale_growth: int | None = None
    data_fingerprint: str | None = None
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))  # identifies the run in trackers

    @property
    def is_done(self) -> bool:
        return self.step >= self.max_steps

    def is_due(self, every: int) -> bool:
        """Whether a task that runs every `every` steps and at the end (0: only at the end) runs after this step."""
        return self.step == self.max_steps or (every > 0 and self.step % every == 0)

    def advance(self, samples: int, tokens: int) -> None:
        """Count one step."""
        self.step += 1
        self.samples_seen += samples
        self.tokens_seen += tokens

    def is_best(self, val_loss: float | None) -> bool:
        """Whether `val_loss` is the lowest so far; if so, it is stored. None (no validation) and NaN never are."""
        if val_loss is None or not math.isfinite(val_loss):
            return False
        if self.best_val_loss is not None and val_loss >= self.best_val_loss:
            return False
        self.best_step, self.best_val_loss = self.step, val_loss
        return True

    def save(self, path: Path) -> None:
        """Write the counters as JSON."""
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "TrainingState":
        """Read what `save` wrote. Raises UserError if the file is not a training state."""
        names = [counter.name for counter in fields(cls)]
        values = read_json(path, "a training state of MiniGPT", names)
        return cls(**{name: values[name] for name in names})


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout by (seed, step, rank): a resumed run needs no saved generator, and evaluation cannot disturb it."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


class TrainingClock:
    """Adds the time spent in training to `state.elapsed_s`; time inside `paused()` is not counted."""

    def __init__(self, state: TrainingState) -> None:
        self.state = state
        self._since = time.perf_counter()

    def tick(self) -> None:
        """Bring `state.elapsed_s` up to date."""
        now = time.perf_counter()
        self.state.elapsed_s += now - self._since
        self._since = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude what happens inside from the training time."""
        self.tick()
        try:
            yield
        finally:
            self._since = time.perf_counter()
