"""Laws of a branch: it computes what the run did, and neither the run nor the world notices it."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from minigpt.cli import main
from minigpt.config.arguments import Arguments
from minigpt.config.parser import parse_arguments
from minigpt.experiments.branch import branch_options, default_branch_minutes, train_branch
from minigpt.experiments.runs import PlannedRun
from minigpt.planning.forecast import FinishedRun, forecast, read_finished_run
from minigpt.planning.scaling_law import ModelSize


def finished(**options: object) -> FinishedRun:
    """A run of a minute."""
    args = Arguments(train_file=["a.txt"], **options)  # type: ignore[arg-type]
    return FinishedRun(args, ModelSize(1e5, 1e4), 300, 1e6, 5e5, 60.0, 3.0, 2.0)


def test_a_branch_is_half_of_the_time_but_never_hours() -> None:
    assert default_branch_minutes(2) == 1
    assert default_branch_minutes(600) == 5


def test_a_branch_keeps_what_a_run_computes_and_reports_to_nobody() -> None:
    computes = {
        "hidden_size": 64, "dropout": 0.1, "per_device_train_batch_size": 3, "use_cpu": True,
        "mixed_precision": "bf16",
    }  # fmt: skip
    tells = {
        "push_to_hub": True, "hub_model_id": "a/b", "hub_private_repo": True, "report_to": ["wandb"], "run_name": "c",
        "load_best_model_at_end": True, "hellaswag_steps": 5, "profile_steps": [1, 2], "save_steps": 7,
    }  # fmt: skip
    options = branch_options(finished(**computes, **tells), minutes=1)
    assert {name: options[name] for name in computes} == computes
    unset = Arguments(train_file=["a.txt"])
    args = replace(unset, **{name: options[name] for name in tells if name in options})
    assert args.report_to == ["none"]
    assert args.save_steps == 0
    others = set(tells) - {"report_to", "save_steps"}
    assert {name: getattr(args, name) for name in others} == {name: getattr(unset, name) for name in others}


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def test_a_forecast_trains_a_branch_and_leaves_no_trace(
    tiny_config: Path,
    tmp_path: Path,
    started: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = PlannedRun([str(tiny_config)], tmp_path / "runs" / "tiny")
    run.train(parse_arguments([*run.words, "--output_dir", str(run.run_dir)], program="test"))
    before = contents(tmp_path / "runs")
    monkeypatch.chdir(run.run_dir)
    main(["plan", ".", "--more_minutes", "0.04"])
    assert len(started) == 2
    assert contents(tmp_path / "runs") == before
    printed = capsys.readouterr()
    assert "for 0:01" in printed.err
    assert "with 0:02 more about" in printed.out

    main(["plan", str(run.run_dir), "--more_minutes", "0.04", "--branch_minutes", "0"])
    assert len(started) == 2
    assert capsys.readouterr().err == ""

    kept = train_branch(run.run_dir, 0.02, tmp_path / "branch")
    assert kept.elapsed_s == pytest.approx(kept.args.train_minutes * 60, abs=1)
    assert kept.bytes_read > read_finished_run(run.run_dir).bytes_read
    assert forecast(run.run_dir, 0.04, kept).spread < forecast(run.run_dir, 0.04).spread
    started_before = len(started)
    assert train_branch(run.run_dir, 0.02, tmp_path / "branch") == kept
    assert len(started) == started_before
    options = yaml.safe_load((tmp_path / "branch.yaml").read_text(encoding="utf-8"))
    assert options["train_minutes"] == pytest.approx(kept.args.train_minutes)
