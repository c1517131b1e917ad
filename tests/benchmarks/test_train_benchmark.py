"""Laws of `minigpt bench train` and `minigpt bench loss`."""

import json
import statistics
from pathlib import Path
from types import ModuleType

import pytest

from minigpt.benchmarks import loss
from minigpt.benchmarks.train import summarize
from minigpt.commands import bench_loss, bench_train

SHAPE = {"layers": 1, "heads": 2, "hidden": 16, "vocab_size": 50, "block_size": 8, "batch_size": 2}


def run(module: ModuleType, *options: str) -> None:
    module.run(module.parse(options))


def test_ratios_are_taken_turn_by_turn() -> None:
    def turn(seconds: float, memory_gib: float = 1.0) -> dict[str, object]:
        return {"seconds": [seconds, seconds, 9.0], "memory_gib": memory_gib}

    turns = {"minigpt": [turn(1.0), turn(2.0), turn(4.0)], "bare": [turn(2.0), turn(2.0, 3.0), turn(6.0)]}
    ours, bare = summarize(turns, SHAPE, ceiling_flops=1e9)
    assert (ours.ratio, ours.ratio_low, ours.ratio_high, ours.step_ms) == (1.0, 1.0, 1.0, 2000.0)
    assert (bare.ratio, bare.ratio_low, bare.ratio_high, bare.memory_gib) == (1.5, 1.0, 2.0, 3.0)
    assert ours.tokens_per_s == 16 / 2.0


def test_report_says_what_its_turns_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [word for name, number in SHAPE.items() for word in (f"--{name}", str(number))]
    counts = ("--turns", "1", "--steps", "2", "--warmup", "1", "--device", "cpu", "--mixed_precision", "no")
    run(
        bench_train,
        *small,
        *counts,
        "--ways",
        "minigpt",
        "bare",
        "minigpt-ddp",
        "--output",
        str(tmp_path / "report"),
    )
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    medians = {way: statistics.median(turns[0]["seconds"]) for way, turns in report["turns"].items()}
    for row in report["rows"]:
        assert row["ratio"] == pytest.approx(medians[row["way"]] / medians["minigpt"])
        assert row["tokens_per_s"] == pytest.approx(16 / medians[row["way"]])
        assert row["memory_gib"] > 0
    assert "| bare |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert report["machine"]["torch"] in capsys.readouterr().out


def test_a_loss_is_reached_at_or_below_the_goal() -> None:
    row = {"seed": 1, "nanogpt_s": 80.0, "nanogpt_loss": 1.9, "minigpt_s": 20.0, "minigpt_loss": 1.9, "ratio": 4.0}
    assert loss.markdown([row], 1.9).endswith("| 1 | 80.0 | 1.9000 | 20.0 | 1.9000 | yes | 4.00 |")
    assert "| no |" in loss.markdown([row], 1.89)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nanogpt=.*no model.py there"):
        run(bench_train, "--nanogpt", str(tmp_path))
    with pytest.raises(ValueError, match=r"nanogpt=.*no train.py there"):
        run(bench_loss, "--nanogpt", str(tmp_path), "--train_file", "x")
    with pytest.raises(ValueError, match="ways must hold minigpt"):
        run(bench_train, "--ways", "bare")
    with pytest.raises(ValueError, match="give an even --batch_size"):
        run(bench_train, "--ways", "minigpt", "minigpt-ddp", "--batch_size", "3")
