"""How often to save: too often costs the time of saving, too seldom the steps that a failure undoes.

The best time between two checkpoints that each take d seconds, with a failure every M seconds in the mean, is about
sqrt(2 d M). Source: Daly 2006, A higher order estimate of the optimum checkpoint interval for restart dumps, which has
the next term, - d.
"""

import math
from dataclasses import dataclass
from typing import Any

from minigpt.planning.memory import FLOAT32, TrainingSetup, optimizer_bytes, trained_parameters
from minigpt.utils.formatting import format_bytes, format_seconds

# 419 unexpected interruptions in 54 days on 2,048 nodes of eight GPUs: The Llama 3 Herd of Models, 2024, section 3.3
NODE_MTBF_HOURS = 6300.0
RESTART_S = 300.0  # to notice a failure, start again and load the checkpoint


@dataclass(frozen=True)
class SaveInterval:
    """The best interval of a run, and what failures cost with it. Times in seconds."""

    checkpoint_bytes: int
    save_s: float
    failure_s: float  # mean time between two failures of any node
    step_s: float

    @property
    def save_steps(self) -> int:
        return max(1, round((math.sqrt(2 * self.save_s * self.failure_s) - self.save_s) / self.step_s))

    @property
    def saving_share(self) -> float:
        """The share of the time that goes into saving."""
        return self.save_s / (self.save_steps * self.step_s + self.save_s)

    @property
    def lost_share(self) -> float:
        """The share of the time that goes into steps that are made again, and into restarts."""
        return min(1.0, (self.save_steps * self.step_s / 2 + RESTART_S) / (self.failure_s + RESTART_S))

    def as_dict(self) -> dict[str, Any]:
        return {
            "checkpoint_bytes": self.checkpoint_bytes,
            "save_s": self.save_s,
            "hours_between_failures": self.failure_s / 3600,
            "save_steps": self.save_steps,
            "saving_share": self.saving_share,
            "lost_share": self.lost_share,
        }

    def lines(self) -> list[str]:
        every = format_seconds(self.save_steps * self.step_s)
        return [
            f"{format_bytes(self.checkpoint_bytes)}, written in {format_seconds(self.save_s)}; a failure every "
            f"{format_seconds(self.failure_s)}",
            f"best --save_steps {self.save_steps:,}, every {every}: {self.saving_share:.1%} of the time for saving, "
            f"{self.lost_share:.1%} lost by failures",
        ]


def best_interval(
    setup: TrainingSetup, step_s: float, nodes: int, disk_gb_per_s: float, node_mtbf_hours: float
) -> SaveInterval:
    """The best interval for a run whose steps wait while a checkpoint is written.

    disk_gb_per_s: what all nodes together write, in 10^9 bytes per second; without sharding, rank 0 alone writes.
    node_mtbf_hours: mean time between two failures of one node.
    """
    size = FLOAT32 * trained_parameters(setup) + optimizer_bytes(setup)
    return SaveInterval(size, size / (disk_gb_per_s * 1e9), 3600 * node_mtbf_hours / nodes, step_s)
