"""Laws of `minigpt verify-resume`: an exact resume is reported as equal, and any difference is named."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from minigpt.cli import main
from minigpt.training.verify_resume import differences, run_trainer


@pytest.fixture
def config(tiny_run: list[str], tmp_path: Path) -> str:
    """`tiny_run` as a YAML file, with dropout and Muon."""
    pairs = zip(tiny_run, [*tiny_run[1:], "--"], strict=True)
    options = {
        word[2:]: True if value.startswith("--") else yaml.safe_load(value)
        for word, value in pairs
        if word.startswith("--")
    }
    options |= {"optimizer": "muon", "train_file": [options["train_file"]], "report_to": ["none"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    return str(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "launch",
    [
        [],
        pytest.param(["--config_file", "cpu_ddp"], marks=pytest.mark.slow, id="ddp"),
    ],
)
def test_an_exact_resume_is_reported_as_equal(
    config: str, launch: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    main(["verify-resume", config, "--steps", "6", *launch])
    assert "equal, bit for bit: " in capfd.readouterr().out


def test_every_difference_is_named_and_the_earliest_comes_first(
    tiny_run: list[str], tmp_path: Path, train_here: Callable[[list[str]], int]
) -> None:
    first, second = tmp_path / "run", tmp_path / "other"
    for folder in (first, second):
        assert train_here([*tiny_run, "--output_dir", str(folder)]) == 0
    assert list(differences(first, second, 5, 12)) == []
    optimizer_file = second / "checkpoint-12" / "optimizer.safetensors"
    moments = load_file(optimizer_file)
    changed, missing = sorted(moments)[:2]
    moments[changed].view(-1)[0] += 0.5
    del moments[missing]
    save_file(moments, optimizer_file)
    value_difference, name_difference = differences(first, second, 5, 12)
    assert value_difference.startswith(f"{changed} after step 12: largest difference 0.")
    assert name_difference == f"{missing} after step 12 is in one of the runs only"
    assert len(list(differences(second, first, 5, 12))) == 2
    lines = [json.loads(line) for line in (second / "metrics.jsonl").open()]
    lines[8]["train/loss"] += 1e-7
    (second / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert next(differences(first, second, 5, 12)).startswith(f"train/loss of step {lines[8]['step']} is ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1"], "stop_after=0 must be above 0 and below steps=1"),
        (["--steps", "4", "--stop_after", "4"], "stop_after=4 must be above 0"),
        (["--steps", "4", "--learning_rte", "1"], "did you mean --learning_rate"),
        (["--steps", "4", "--hidden_size", "7"], "hidden_size=7"),
    ],
)
def test_bad_input_is_one_line(
    config: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["verify-resume", config, *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_trainer_that_crashes_is_not_reported_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    crash = [sys.executable, "-c", "raise ZeroDivisionError('a bug')"]
    monkeypatch.setattr("minigpt.training.verify_resume.trainer_command", lambda options, profile: crash)
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a bug"):
        run_trainer(None, [])
