"""Laws of skipped steps: never applied, recorded, limited in number, and replayed by `minigpt replay`."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minigpt.cli import main
from minigpt.training.checkpoint_files import find_damage
from minigpt.training.nonfinite import is_applicable
from minigpt.utils.errors import EXIT_DIVERGED
from minigpt.utils.run_files import REPLAY_FILE, find_checkpoints
from modeling_minigpt import MiniGPTForCausalLM
from support.runs import command, finish, metrics
from support.tensors import different_tensors

Train = Callable[[list[str]], int]
SKIPPED_STEP = 3  # 0-based


@pytest.fixture
def poison_one_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, makes the loss of training step `SKIPPED_STEP` infinite."""
    forward, calls = MiniGPTForCausalLM.forward, [0]

    @functools.wraps(forward)
    def infinite_once(self: MiniGPTForCausalLM, *args: object, **kwargs: object) -> object:
        output = forward(self, *args, **kwargs)
        if self.training:
            if calls[0] == SKIPPED_STEP:
                output.loss = output.loss * torch.inf
            calls[0] += 1
        return output

    return lambda: monkeypatch.setattr(MiniGPTForCausalLM, "forward", infinite_once)


def test_a_skipped_step_changes_neither_weights_nor_optimizer_and_can_be_replayed(
    tiny_run: list[str],
    train_here: Train,
    tmp_path: Path,
    poison_one_step: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    each_step = ["--save_steps", "1", "--save_total_limit", "100", "--max_steps", "6"]
    assert train_here([*tiny_run, *each_step, "--output_dir", str(tmp_path / "healthy")]) == 0
    capsys.readouterr()
    poison_one_step()
    assert train_here([*tiny_run, *each_step]) == 0
    monkeypatch.undo()
    run = tmp_path / "run"
    before, after, later = (run / f"checkpoint-{SKIPPED_STEP + number}" for number in (0, 1, 2))
    skipped = run / "skipped_steps" / f"step-{SKIPPED_STEP:06}"
    output = capsys.readouterr().out
    assert f"step {SKIPPED_STEP + 1} skipped: its gradient is not finite (nan); 1 of 10 allowed." in output
    assert f"minigpt replay {skipped / REPLAY_FILE}" in output
    assert different_tensors(before, after) == []
    assert different_tensors(before, skipped) == []
    assert different_tensors(before, after, "optimizer.safetensors") == []
    assert different_tensors(after, later), "training did not continue"
    assert json.loads((later / "training_state.json").read_text())["skipped_steps"] == 1
    assert all(json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").open())

    main(["replay", str(skipped / REPLAY_FILE)])
    first, finding = capsys.readouterr().out.splitlines()
    loss, norm = (metrics(tmp_path / "healthy", f"train/{name}")[SKIPPED_STEP + 1] for name in ("loss", "grad_norm"))
    # same weights, samples and dropout, but without the poison: the replay equals the healthy run's step
    assert float(first.split("loss ")[1].split()[0]) == pytest.approx(loss, abs=2e-6)
    assert float(first.split("norm ")[1]) == pytest.approx(norm, rel=1e-4)
    assert finding.startswith("everything is finite in this replay")


def test_a_run_that_diverges_stops_on_all_ranks_after_saving_a_checkpoint(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diverging = ["--learning_rate", "1e30", "--warmup_steps", "0", "--max_grad_norm", "0", "--max_skipped_steps", "2"]
    run = finish(command(*tiny_run, *diverging, processes=2))
    assert run.returncode == EXIT_DIVERGED
    assert "3 of 2 allowed" in run.stdout
    assert "diverged at step" in run.stdout
    assert find_damage(find_checkpoints(tmp_path / "run")[-1]) is None
    records = sorted((tmp_path / "run" / "skipped_steps").glob(f"step-*/{REPLAY_FILE}"))
    assert len(records) == 3
    main(["replay", str(records[0])])
    output = capsys.readouterr().out
    assert "gradient norm nan" in output or "gradient norm inf" in output
    assert "first module whose output is not finite: transformer." in output
    assert "in a micro-batch whose loss is not finite" in output


def test_records_of_skipped_steps_leave_room_for_the_checkpoint(
    small_disk: tuple[Path, Callable[[int], None]],
    tiny_run: list[str],
    train_here: Train,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk, _ = small_disk
    (disk / "ballast").write_bytes(bytes(6_000_000))  # room for a checkpoint and the final model, and not much more
    diverging = ["--learning_rate", "1e30", "--warmup_steps", "0", "--max_grad_norm", "0", "--max_skipped_steps", "2"]
    assert train_here([*tiny_run, *diverging, "--output_dir", str(disk / "run")]) == EXIT_DIVERGED
    output = capsys.readouterr().out
    assert output.count("WARNING: records of skipped steps are not written while the disk is full") == 1
    assert output.count("skipped: its gradient is not finite") == 3
    assert "minigpt replay" not in output
    assert not (disk / "run" / "skipped_steps").exists()
    assert find_damage(find_checkpoints(disk / "run")[-1]) is None


def test_an_fp16_overflow_is_left_to_the_scaler_until_its_scale_is_1() -> None:
    assert is_applicable(1.0, None)
    assert not is_applicable(float("inf"), None)
    assert not is_applicable(float("nan"), None)
    assert is_applicable(float("inf"), torch.amp.GradScaler("cpu", init_scale=2.0**16))
    assert not is_applicable(float("inf"), torch.amp.GradScaler("cpu", init_scale=1.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), *[(content, "not the record") for content in ("{}", "[]", "x", '{"step": 1}')]],
)
def test_a_file_that_is_no_record_is_refused(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / REPLAY_FILE).write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["replay", str(tmp_path / REPLAY_FILE)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
