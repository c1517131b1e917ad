"""Laws of the plotted curves: every run in one figure, and smoothing equals its closed form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minigpt.training.plot import plot_runs, smoothed
from minigpt.utils.errors import UserError


def write_run(folder: Path, steps: int) -> Path:
    folder.mkdir()
    lines = [
        {"step": step, "train/loss": 5 / step, "train/lr": 1e-3, "train/tokens_per_sec": 1e4}
        for step in range(1, steps)
    ]
    lines.append({"step": steps, "val/loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_one_and_several_runs_become_a_png_and_a_pdf(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, steps) for name, steps in [("a", 300), ("b", 3)]]
    for run_dirs, folder in ((runs[:1], None), (runs, tmp_path / "both")):
        png, pdf = plot_runs(run_dirs, folder)
        assert png.parent == (folder or runs[0])
        assert png.read_bytes().startswith(b"\x89PNG")
        assert pdf.read_bytes().startswith(b"%PDF")


def test_a_figure_is_drawn_from_a_notebook_whose_backend_is_not_installed(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", 5)
    words = [sys.executable, "-m", "minigpt", "plot", str(run_dir)]
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run(words, env=os.environ | backend, check=True, capture_output=True)
    assert (run_dir / "loss.png").is_file()


def test_a_figure_of_several_runs_replaces_none_unless_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write_run(tmp_path / name, steps) for name, steps in [("a", 30), ("b", 3)]]
    own = plot_runs(runs[:1])
    before = [file.read_bytes() for file in own]
    monkeypatch.chdir(tmp_path)
    files = plot_runs(runs)
    assert [file.absolute() for file in files] == [tmp_path / "loss.png", tmp_path / "loss.pdf"]
    assert [file.read_bytes() for file in own] == before
    (tmp_path / "loss.png").write_bytes(b"mine")
    (tmp_path / "loss.pdf").unlink()
    for run_dirs, folder in ((runs, None), (runs, tmp_path), (runs[:1], tmp_path)):
        with pytest.raises(
            UserError, match=r"loss\.png exists; give another folder with --output_dir, or --overwrite"
        ):
            plot_runs(run_dirs, folder)
    assert (tmp_path / "loss.png").read_bytes() == b"mine"
    plot_runs(runs, overwrite=True)
    assert (tmp_path / "loss.png").read_bytes() != b"mine"


def test_a_folder_without_a_training_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metrics.jsonl; give the folder of a run"):
        plot_runs([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "val/loss": 2.0}\n')
    with pytest.raises(ValueError, match="no training loss in it yet"):
        plot_runs([tmp_path])


@pytest.mark.parametrize("points", [1, 3, 50, 400])
def test_smoothing_is_the_exponentially_weighted_mean_of_all_points_so_far(points: int) -> None:
    values = np.random.default_rng(0).normal(size=points)
    decay = 1 - 1 / max(1.0, points / 50)
    for index, value in enumerate(smoothed(values)):
        weights = decay ** np.arange(index, -1, -1, dtype=np.float64)
        assert value == pytest.approx(np.average(values[: index + 1], weights=weights), abs=1e-12)
