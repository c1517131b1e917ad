"""The state of a run: the counters that, with the options, decide everything that follows."""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minigpt.utils.errors import UserError


@dataclass
class TrainingState:
    """Counters of a run. The data order, the learning rate and dropout are functions of these and of the options."""

    step: int = 0  # optimizer updates done
    samples_seen: int = 0
    tokens_seen: int = 0  # targets that had a loss
    elapsed_s: float = 0.0  # training time; evaluation, sampling and saving excluded
    skipped_steps: int = 0  # of them, those whose gradient was not finite
    best_step: int | None = None
    best_val_loss: float | None = None
    loss_scale: float | None = None  # fp16 only
    loss_scale_growth: int | None = None
    data_fingerprint: str | None = None
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))  # trackers know the run by it

    def advance(self, samples: int, tokens: int) -> None:
        """Count one update."""
        self.step += 1
        self.samples_seen += samples
        self.tokens_seen += tokens

    def is_best(self, val_loss: float | None) -> bool:
        """Whether `val_loss` is the lowest so far; if so it is remembered. None, where none was taken, is not."""
        if val_loss is None or (self.best_val_loss is not None and val_loss >= self.best_val_loss):
            return False
        self.best_step, self.best_val_loss = self.step, val_loss
        return True

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "TrainingState":
        """Raises UserError when the file is no training state."""
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{f.name: values[f.name] for f in fields(cls)})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a training state of MiniGPT") from error


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout by (seed, step, process): a resumed run needs no saved generator, nothing else can disturb it."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


class TrainingClock:
    """Adds the time spent training to `state.elapsed_s`; `paused()` leaves a stretch out."""

    def __init__(self, state: TrainingState) -> None:
        self.state = state
        self._since = time.perf_counter()

    def tick(self) -> None:
        """Bring `state.elapsed_s` up to now."""
        now = time.perf_counter()
        self.state.elapsed_s += now - self._since
        self._since = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.tick()
        try:
            yield
        finally:
            self._since = time.perf_counter()


def is_due(step: int, every: int, last_step: int) -> bool:
    """Whether something that happens every `every` steps (0: only at the end) happens after `step`."""
    return step == last_step or (every > 0 and step % every == 0)
