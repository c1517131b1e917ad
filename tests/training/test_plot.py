import json
from pathlib import Path

import numpy as np
import pytest

from minigpt.training.plot import plot_runs, smoothed


def run(folder: Path, steps: int) -> Path:
    folder.mkdir()
    lines = [
        {"step": step, "train/loss": 5 / step, "train/lr": 1e-3, "train/tokens_per_sec": 1e4}
        for step in range(1, steps)
    ]
    lines.append({"step": steps, "val/loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_one_and_several_runs_become_a_png_and_a_pdf(tmp_path: Path) -> None:
    runs = [run(tmp_path / name, steps) for name, steps in [("a", 300), ("b", 3)]]
    for folders in ([runs[0]], runs):
        png, pdf = plot_runs(folders)
        assert png.parent == runs[0]
        assert png.read_bytes().startswith(b"\x89PNG")
        assert pdf.read_bytes().startswith(b"%PDF")


def test_a_folder_without_a_curve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metrics.jsonl; give the folder of a run"):
        plot_runs([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "val/loss": 2.0}\n')
    with pytest.raises(ValueError, match="no training loss in it yet"):
        plot_runs([tmp_path])


def test_smoothing_keeps_a_constant_and_leaves_a_short_curve_alone() -> None:
    assert smoothed(np.full(400, 3.0)) == pytest.approx(np.full(400, 3.0))
    short = np.array([4.0, 2.0, 3.0])
    assert smoothed(short) == pytest.approx(short)
    noise = np.random.default_rng(0).normal(size=1000)
    assert smoothed(noise)[100:].std() < 0.3
