"""Draw the curves of runs: loss.png and loss.pdf."""

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.utils.errors import UserError
from minigpt.utils.run_files import METRICS_FILE, read_metrics

# Okabe and Ito's palette: told apart by readers who see colours differently, and in grey print.
# OpenAI's models in lm-evaluation-harness, accuracy normalised by bytes
ON_HELLASWAG = {"guessing": 0.25, "GPT-2 124M": 0.3114, "GPT-2 1.5B": 0.5089}

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def plot_runs(run_dirs: list[Path], output_dir: Path | None = None) -> list[Path]:
    """Draw the runs into one figure, in `output_dir` or the first run's folder. Returns the files written.

    Raises UserError for a folder without metrics.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    runs = {_label(folder, run_dirs): _series(folder) for folder in run_dirs}
    with pyplot.rc_context(
        {"font.size": 9, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False}
    ):
        with_hellaswag = any(series["hellaswag/acc_norm"].size for series in runs.values())
        heights = (4, 2, 1, 1) if with_hellaswag else (4, 1, 1)
        figure, (loss, *middle, rate, speed) = pyplot.subplots(
            len(heights), 1, figsize=(7, 1.25 * sum(heights)), sharex=True, height_ratios=heights, layout="constrained"
        )
        for colour, (label, series) in zip(cycle(COLOURS), runs.items(), strict=False):
            _draw_run(loss, rate, speed, label if len(runs) > 1 else "", series, colour)
            for panel in middle:
                panel.plot(*series["hellaswag/acc_norm"], "o-", color=colour, markersize=4, linewidth=1.2)
        for panel in middle:
            _compare_with_gpt2(panel)
        loss.set_ylabel("loss (nats per token)")
        loss.legend(frameon=False)
        rate.set_ylabel("learning\nrate")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        speed.set_ylabel("tokens/s")
        speed.set_ylim(bottom=0)
        speed.set_xlabel("step (optimizer updates)")
        loss.set_title(next(iter(runs)) if len(runs) == 1 else "", loc="left")
        folder = output_dir or run_dirs[0]
        files = [folder / "loss.png", folder / "loss.pdf"]
        for file in files:
            figure.savefig(file, dpi=150)
        pyplot.close(figure)
    return files


def _draw_run(loss: Any, rate: Any, speed: Any, label: str, series: dict[str, np.ndarray], colour: str) -> None:
    prefix = f"{label}: " if label else ""
    steps, values = series["train/loss"]
    loss.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    loss.plot(steps, smoothed(values), color=colour, linewidth=1.6, label=f"{prefix}training (smoothed)")
    steps, values = series["val/loss"]
    if len(steps):
        best = f", lowest {values.min():.3f}"
        loss.plot(
            steps, values, "o--", color="black" if not label else colour, markersize=4, linewidth=1,
            label=f"{prefix}validation{best}",
        )  # fmt: skip
    rate.plot(*series["train/lr"], color=colour, linewidth=1.2)
    speed.plot(*series["train/tokens_per_sec"], color=colour, linewidth=1.2)


def _compare_with_gpt2(panel: Any) -> None:
    """What OpenAI's models reach on HellaSwag, as lines; the larger one only where the curve comes near it."""
    panel.set_ylabel("HellaSwag\naccuracy (bytes)")
    highest = max(line.get_ydata().max() for line in panel.lines if len(line.get_ydata()))
    for name, accuracy in ON_HELLASWAG.items():
        if accuracy < highest + 0.15:
            panel.axhline(accuracy, color="black", linewidth=0.8, linestyle=":")
            panel.annotate(
                name, (1, accuracy), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
            )


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over about a fiftieth of the curve, without the start's bias (as Adam's moments)."""
    weight = 1 - 1 / max(1.0, len(values) / 50)
    average, total, out = 0.0, 0.0, np.empty(len(values))
    for place, value in enumerate(values):
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        out[place] = average / total
    return out


def _series(run_dir: Path) -> dict[str, np.ndarray]:
    """Metric name → [2, N]: steps and finite values."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{run_dir}: no {METRICS_FILE}; give the folder of a run")
    lines = read_metrics(path)
    series = {}
    for name in ("train/loss", "val/loss", "train/lr", "train/tokens_per_sec", "hellaswag/acc_norm"):
        points = [(line["step"], line[name]) for line in lines if name in line]
        array = np.array(points, dtype=np.float64).reshape(-1, 2).T
        series[name] = array[:, np.isfinite(array[1])]
    if not series["train/loss"].size:
        raise UserError(f"{path}: no training loss in it yet")
    return series


def _label(folder: Path, folders: list[Path]) -> str:
    name = folder.resolve().name
    return name if sum(other.resolve().name == name for other in folders) == 1 else str(folder)
