"""Draw the curves of runs: loss.png and loss.pdf."""

import os
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt.utils.errors import UserError
from minigpt.utils.run_files import CURVE_FILES, METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: distinguishable with any color vision, and in gray print
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")

# OpenAI's models in lm-evaluation-harness, accuracy normalized by bytes
HELLASWAG_BASELINES = {"guessing": 0.25, "GPT-2 124M": 0.3114, "GPT-2 1.5B": 0.5089}
METRICS = ("train/loss", "val/loss", "train/lr", "train/tokens_per_sec", "hellaswag/acc_norm")

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Curves = dict[str, np.ndarray]  # metric name → [2, N]: steps and values


def import_pyplot() -> Any:
    """matplotlib.pyplot for files. A notebook names a backend of its own, which is not installed for each program."""
    os.environ["MPLBACKEND"] = "agg"  # read by the first import
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def plot_runs(run_dirs: list[Path], output_dir: Path | None = None, overwrite: bool = False) -> list[Path]:
    """Draw the runs into one figure, in `output_dir`, and return the files written.

    Without `output_dir`, the figure of one run is in its folder, where it replaces the one of the trainer, and that of
    several runs is in the current folder.
    Raises UserError for a folder without metrics, and for a figure that exists elsewhere, unless `overwrite` is set.
    """
    is_own_figure = len(run_dirs) == 1 and output_dir is None
    folder = output_dir or (run_dirs[0] if is_own_figure else Path())
    files = [folder / name for name in CURVE_FILES]
    for file in files:
        if file.exists() and not is_own_figure and not overwrite:
            raise UserError(f"{file} exists; give another folder with --output_dir, or --overwrite")

    pyplot = import_pyplot()
    runs = {_label(folder, run_dirs): _read_curves(folder) for folder in run_dirs}
    with pyplot.rc_context(STYLE):
        has_hellaswag = any(curves["hellaswag/acc_norm"].size for curves in runs.values())
        heights = (4, 2, 1, 1) if has_hellaswag else (4, 1, 1)
        figure, (loss, *hellaswag, rate, speed) = pyplot.subplots(
            len(heights), 1, figsize=(7, 1.25 * sum(heights)), sharex=True, height_ratios=heights, layout="constrained"
        )
        for color, (label, curves) in zip(cycle(COLORS), runs.items(), strict=False):
            _draw_loss(loss, label if len(runs) > 1 else "", curves, color)
            rate.plot(*curves["train/lr"], color=color, linewidth=1.2)
            speed.plot(*curves["train/tokens_per_sec"], color=color, linewidth=1.2)
            for panel in hellaswag:
                panel.plot(*curves["hellaswag/acc_norm"], "o-", color=color, markersize=4, linewidth=1.2)
        for panel in hellaswag:
            _draw_hellaswag_baselines(panel)
        loss.set_ylabel("loss (nats per token)")
        loss.legend(frameon=False)
        rate.set_ylabel("learning\nrate")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        speed.set_ylabel("tokens/s")
        speed.set_ylim(bottom=0)
        speed.set_xlabel("step (optimizer updates)")
        loss.set_title(next(iter(runs)) if len(runs) == 1 else "", loc="left")
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            figure.savefig(file, dpi=150)
        pyplot.close(figure)
    return files


def _draw_loss(panel: "Axes", label: str, curves: Curves, color: str) -> None:
    """The training loss as measured and smoothed, and the validation loss. `label` is empty for a single run."""
    prefix = f"{label}: " if label else ""
    steps, values = curves["train/loss"]
    panel.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    panel.plot(steps, smoothed(values), color=color, linewidth=1.6, label=f"{prefix}training (smoothed)")
    steps, values = curves["val/loss"]
    if len(steps):
        validation_color = color if label else "black"
        lowest = f"{prefix}validation, lowest {values.min():.3f}"
        panel.plot(steps, values, "o--", color=validation_color, markersize=4, linewidth=1, label=lowest)


def _draw_hellaswag_baselines(panel: "Axes") -> None:
    """The accuracies of OpenAI's models as lines. A model that is far above the curves is not drawn."""
    panel.set_ylabel("HellaSwag\naccuracy (bytes)")
    curves = [np.asarray(line.get_ydata()) for line in panel.lines]
    highest = max(curve.max() for curve in curves if curve.size)
    for name, accuracy in HELLASWAG_BASELINES.items():
        if accuracy < highest + 0.15:
            panel.axhline(accuracy, color="black", linewidth=0.8, linestyle=":")
            panel.annotate(
                name, (1, accuracy), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
            )


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over about 1/50 of the curve, with Adam's correction of the bias at the start."""
    decay = 1 - 1 / max(1.0, len(values) / 50)
    average, weight, averages = 0.0, 0.0, np.empty(len(values))
    for index, value in enumerate(values):
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        averages[index] = average / weight
    return averages


def _read_curves(run_dir: Path) -> Curves:
    """The curves of a run, with finite values only. Raises UserError if it has no training loss."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{run_dir}: no {METRICS_FILE}; give the folder of a run")
    lines = read_metrics(path)
    curves = {}
    for name in METRICS:
        points = [(line["step"], line[name]) for line in lines if name in line]
        try:
            array = np.array(points, dtype=np.float64).reshape(-1, 2).T
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: a value of {name} is not a number") from error
        curves[name] = array[:, np.isfinite(array[1])]
    if not curves["train/loss"].size:
        raise UserError(f"{path}: no training loss in it yet; plot it after the first logged step")
    return curves


def _label(folder: Path, folders: list[Path]) -> str:
    """The name of a run's folder, or its whole path if another run has the same name."""
    name = folder.resolve().name
    return name if sum(other.resolve().name == name for other in folders) == 1 else str(folder)
