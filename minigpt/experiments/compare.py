"""Compare two configurations fairly: pairs of runs with the same seed, until the difference is settled."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt.experiments.paired_test import Interval, confidence_sequence, pairs_until_finite
from minigpt.experiments.runs import PlannedRun, Result
from minigpt.utils.files import write_atomically
from minigpt.utils.formatting import format_duration, markdown_table
from minigpt.utils.run_files import DATA_FILE

COMPARISON_FILE = "comparison.json"
PROGRAM = "minigpt compare"


@dataclass(frozen=True)
class Pair:
    """Two runs with the same seed."""

    seed: int
    a: Result
    b: Result

    @property
    def has_same_tokens(self) -> bool:
        """Whether both runs were measured on the same tokens, so that their losses per token can be compared."""
        a, b = (json.loads((run.run_dir / DATA_FILE).read_text(encoding="utf-8")) for run in (self.a, self.b))
        return bool(a["fingerprint"] == b["fingerprint"])


@dataclass
class Comparison:
    """The pairs so far, and what they say about "B minus A".

    smallest_difference: the comparison is also settled when any difference must be smaller than this, in `unit`.
    """

    a_name: str
    b_name: str
    smallest_difference: float
    max_pairs: int
    pairs: list[Pair] = field(default_factory=list)

    @property
    def is_per_token(self) -> bool:
        return all(pair.has_same_tokens for pair in self.pairs)

    @property
    def unit(self) -> str:
        return "nats per token" if self.is_per_token else "bits per byte"

    def losses(self, pair: Pair) -> tuple[float, float]:
        """The losses of a pair, in `unit`."""
        if self.is_per_token:
            return pair.a.loss, pair.b.loss
        return pair.a.bits_per_byte or math.inf, pair.b.bits_per_byte or math.inf

    @property
    def difference(self) -> Interval:
        """B's loss minus A's: the mean and the interval of its true value."""
        return confidence_sequence([b - a for a, b in map(self.losses, self.pairs)])

    @property
    def time_ratio(self) -> Interval:
        """B's training time divided by A's: the geometric mean and the interval of its true value."""
        logs = confidence_sequence([math.log(pair.b.elapsed_s / pair.a.elapsed_s) for pair in self.pairs])
        return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(min(logs.high, 700)))

    @property
    def diverged(self) -> list[str]:
        """The configurations that diverged in some pair."""
        names = {"A": any(pair.a.diverged for pair in self.pairs), "B": any(pair.b.diverged for pair in self.pairs)}
        return [name for name, has_diverged in names.items() if has_diverged]

    @property
    def is_settled(self) -> bool:
        """Whether more pairs are needless: one is better, or neither is by more than `smallest_difference`."""
        if self.diverged:
            return True
        difference = self.difference
        return 0 not in difference or max(-difference.low, difference.high) < self.smallest_difference

    def verdict(self) -> str:
        """The result in a sentence."""
        if self.diverged:
            return f"{' and '.join(self.diverged)} diverged"
        difference = self.difference
        amount = f"B's loss minus A's is {difference.mean:+.4f} {self.unit}"
        if len(self.pairs) < pairs_until_finite():
            return f"{amount}; an interval needs {pairs_until_finite()} pairs"
        amount += f" ({difference.low:+.4f} to {difference.high:+.4f})"
        if 0 not in difference:
            return f"{'B' if difference.mean < 0 else 'A'} is better: {amount}"
        if self.is_settled:
            return f"settled, no difference of {self.smallest_difference} or more: {amount}"
        return f"not settled: {amount}"

    def as_dict(self) -> dict[str, Any]:
        """All figures, as JSON has them: an interval that is still infinite has no ends."""
        return {
            "a": self.a_name,
            "b": self.b_name,
            "unit": self.unit,
            "pairs": [
                {
                    "seed": pair.seed,
                    "a_loss": _finite(self.losses(pair)[0]),
                    "b_loss": _finite(self.losses(pair)[1]),
                    "a_s": _finite(pair.a.elapsed_s),
                    "b_s": _finite(pair.b.elapsed_s),
                }
                for pair in self.pairs
            ],
            "loss_difference": None if self.diverged else _as_dict(self.difference),
            "time_ratio": None if self.diverged else _as_dict(self.time_ratio),
            "is_settled": self.is_settled,
            "verdict": self.verdict(),
        }

    def as_table(self) -> str:
        """The pairs as a table, and the verdict."""
        head = ("seed", f"A, {self.unit}", "B", "B - A", "A, time", "B, time")
        rows = []
        for pair in self.pairs:
            a_loss, b_loss = self.losses(pair)
            times = ("-" if run.diverged else format_duration(run.elapsed_s) for run in (pair.a, pair.b))
            rows.append((str(pair.seed), f"{a_loss:.4f}", f"{b_loss:.4f}", f"{b_loss - a_loss:+.4f}", *times))
        lines = [f"A: {self.a_name}", f"B: {self.b_name}", "", markdown_table(head, rows, numeric=True), ""]
        lines.append(self.verdict())
        if not self.diverged:
            time = self.time_ratio
            known = f" ({time.low:.3f} to {time.high:.3f})" if math.isfinite(self.difference.high) else ""
            lines.append(f"B takes {time.mean:.3f} times A's time{known}")
        return "\n".join(lines)


def compare(
    a: Sequence[str],
    b: Sequence[str],
    output_dir: Path,
    *,
    seed: int,
    max_pairs: int,
    smallest_difference: float,
    profile: str | None = None,
    report: Callable[[str], None] = print,
) -> Comparison:
    """Train pairs of runs until their difference is settled, at most `max_pairs`.

    a, b: the words of the two command lines, each with its preset first. Pair n has the seed `seed` + n - 1, which
    decides initial weights, data order and dropout. A and B take turns in going first. Finished runs in `output_dir`
    are not trained again. Writes comparison.json after every pair.
    """
    comparison = Comparison(" ".join(a), " ".join(b), smallest_difference, max_pairs)
    for number in range(max_pairs):
        plans = [
            PlannedRun([*words, "--seed", str(seed + number)], output_dir / name / f"seed-{seed + number}")
            for name, words in (("A", a), ("B", b))
        ]
        arguments = [plan.arguments(PROGRAM) for plan in plans]  # both are checked before anything is trained
        results: dict[int, Result] = {}
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            results[index] = plans[index].train(arguments[index], profile)
        comparison.pairs.append(Pair(seed + number, results[0], results[1]))
        write_atomically(output_dir / COMPARISON_FILE, json.dumps(comparison.as_dict(), indent=2) + "\n")
        report(f"pair {number + 1}: {comparison.verdict()}")
        if comparison.is_settled:
            break
    return comparison


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _as_dict(interval: Interval) -> dict[str, float | None]:
    return {"mean": interval.mean, "low": _finite(interval.low), "high": _finite(interval.high)}
