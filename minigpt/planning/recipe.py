"""The recipe of the runs that --train_minutes chooses, and of its pilots: see docs/recipes.md."""

from typing import Any

RECIPE: dict[str, Any] = {
    "optimizer": "muon", "muon_momentum": 0.9, "muon_ns_steps": 3, "weight_decay": 0.0,
    "lr_scheduler_type": "linear", "warmup_steps": 10,
}  # fmt: skip


def learning_rates(width: int, is_muon: bool = True) -> dict[str, float]:
    """The learning rates of a model of this width. With Muon, `learning_rate` is that of embeddings and vectors.

    The best rates fall with the width, that of Muon's matrices more slowly: see docs/recipes.md.
    """
    if is_muon:
        ratio = min(1, 192 / width)
        rates = {"learning_rate": 0.02 * ratio, "muon_learning_rate": 0.02 * ratio**0.5}
    else:
        rates = {"learning_rate": 2e-3 * min(1, 256 / width)}
    return {name: float(f"{rate:.2g}") for name, rate in rates.items()}
