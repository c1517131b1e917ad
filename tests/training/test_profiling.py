"""Laws of profiles and statistics: they measure what happened, and do not change it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigpt.utils.run_files import METRICS_FILE, read_metrics
from support.runs import command, finish, metrics
from support.tensors import different_tensors

Train = Callable[[list[str]], int]


def test_a_profile_has_the_steps_that_were_asked_for_and_changes_nothing(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    assert train_here([*tiny_run, "--output_dir", str(tmp_path / "plain")]) == 0
    assert train_here([*tiny_run, "--profile_steps", "3", "5", "--log_stats_steps", "4"]) == 0
    assert different_tensors(tmp_path / "plain", tmp_path / "run") == []
    assert metrics(tmp_path / "plain", "train/loss") == metrics(tmp_path / "run", "train/loss")
    folder = tmp_path / "run" / "profile"
    (trace,) = folder.glob("*.json")
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [event for event in events if event.get("name") == "Optimizer.step#AdamW.step"]
    assert len(steps) == 3
    table = (folder / "table_0.txt").read_text()
    assert "aten::addmm" in table
    assert "Self CPU" in table


def test_a_run_that_ends_before_the_last_profiled_step_still_writes_the_trace(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    assert train_here([*tiny_run, "--profile_steps", "11", "99"]) == 0
    assert list((tmp_path / "run" / "profile").glob("*.json"))
    assert (tmp_path / "run" / "profile" / "table_0.txt").exists()


def rms(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).double().square().mean().sqrt())


def test_the_statistics_are_those_of_the_weights_before_and_after_the_step(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    assert train_here([*tiny_run, "--log_stats_steps", "4", "--save_steps", "1", "--save_total_limit", "20"]) == 0
    lines = read_metrics(tmp_path / "run" / METRICS_FILE)
    found = {line["step"]: line for line in lines if any(name.startswith("stats/") for name in line)}
    assert list(found) == [4, 8, 12]
    for step in (4, 8, 12):
        before, after = (
            load_file(tmp_path / "run" / f"checkpoint-{number}" / "model.safetensors") for number in (step - 1, step)
        )
        for layer in (0, 1):
            names = [name for name in before if f".layers.{layer}." in name]
            size = rms([before[name] for name in names])
            update = rms([after[name] - before[name] for name in names])
            assert found[step][f"stats/weight_rms/layer_{layer}"] == pytest.approx(size, rel=1e-4)
            assert found[step][f"stats/update_ratio/layer_{layer}"] == pytest.approx(update / size, rel=1e-3)
            assert found[step][f"stats/activation_rms/layer_{layer}"] > 0
        assert "stats/weight_rms/transformer.embed_tokens" in found[step]


@pytest.mark.parametrize("steps", [["3"], ["5", "4"], ["0", "2"], ["1", "2", "3"]])
def test_steps_that_are_no_range_are_refused(tiny_run: list[str], steps: list[str]) -> None:
    run = finish(command(*tiny_run, "--profile_steps", *steps))
    assert run.returncode == 2
    assert "profile_steps=" in run.stderr
    assert "must be two steps" in run.stderr
