"""`minigpt verify-resume` finds a run that resumes exactly equal, and says where one that does not first differs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from minigpt.cli import main
from minigpt.training.verify_resume import differences
from support.runs import ROOT


@pytest.fixture
def config(tiny_run: list[str], tmp_path: Path) -> str:
    """tiny_run as a YAML file, with dropout and Muon."""
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
        pytest.param(
            ["--config_file", str(ROOT / "accelerate_configs" / "cpu_ddp.yaml")], marks=pytest.mark.slow, id="ddp"
        ),
    ],
)
def test_a_run_that_resumes_exactly_is_found_equal(
    config: str, launch: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    main(["verify-resume", config, "--steps", "6", *launch])
    assert "the same, bit for bit" in capfd.readouterr().out


def test_the_first_difference_is_named(
    tiny_run: list[str], tmp_path: Path, train_here: Callable[[list[str]], int]
) -> None:
    straight, other = tmp_path / "run", tmp_path / "other"
    for folder in (straight, other):
        assert train_here([*tiny_run, "--output_dir", str(folder)]) == 0
    assert list(differences(straight, other, 5, 12)) == []
    weights = load_file(other / "checkpoint-12" / "optimizer.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 0.5
    save_file(weights, other / "checkpoint-12" / "optimizer.safetensors")
    [only] = differences(straight, other, 5, 12)
    assert only.startswith(f"{name} of optimizer.safetensors after step 12: largest difference 0.")
    lines = [json.loads(line) for line in (other / "metrics.jsonl").open()]
    lines[8]["train/loss"] += 1e-7
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert next(differences(straight, other, 5, 12)).startswith(f"train/loss of step {lines[8]['step']} is ")


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
