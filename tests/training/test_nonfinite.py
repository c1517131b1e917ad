"""Laws of steps whose gradient is not finite: never applied, written down, bounded, run again by `minigpt replay`."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigpt.cli import main
from minigpt.training.checkpoint_files import damage
from minigpt.training.nonfinite import EXIT_DIVERGED, is_applicable
from minigpt.utils.run_files import REPLAY_FILE, find_checkpoints
from modeling_minigpt import MiniGPTForCausalLM
from support.runs import command, finish, metrics

Train = Callable[[list[str]], int]
BAD_STEP = 3  # 0-based


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the loss of one training step infinite, once called."""
    forward, calls = MiniGPTForCausalLM.forward, [0]

    @functools.wraps(forward)
    def infinite_once(self: MiniGPTForCausalLM, *args: object, **kwargs: object) -> object:
        output = forward(self, *args, **kwargs)
        if self.training:
            if calls[0] == BAD_STEP:
                output.loss = output.loss * torch.inf
            calls[0] += 1
        return output

    return lambda: monkeypatch.setattr(MiniGPTForCausalLM, "forward", infinite_once)


def tensors(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_bad_step_changes_neither_weights_nor_optimizer_and_can_be_run_again(
    tiny_run: list[str],
    train_here: Train,
    tmp_path: Path,
    poisoned: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    each_step = ["--save_steps", "1", "--save_total_limit", "100", "--max_steps", "6"]
    assert train_here([*tiny_run, *each_step, "--output_dir", str(tmp_path / "good")]) == 0
    poisoned()
    assert train_here([*tiny_run, *each_step]) == 0
    monkeypatch.undo()
    run = tmp_path / "run"
    before, after, later = (run / f"checkpoint-{BAD_STEP + number}" for number in (0, 1, 2))
    bad = run / "bad_steps" / f"step-{BAD_STEP:06}"
    assert same(tensors(before), tensors(after))
    assert same(tensors(before), tensors(bad))
    assert same(tensors(before, "optimizer.safetensors"), tensors(after, "optimizer.safetensors"))
    assert not same(tensors(after), tensors(later)), "the run did not go on"
    assert json.loads((later / "training_state.json").read_text())["skipped_steps"] == 1
    assert all(json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").open())

    capsys.readouterr()
    main(["replay", str(bad / REPLAY_FILE)])
    first, *rest = capsys.readouterr().out.splitlines()
    loss, norm = (metrics(tmp_path / "good", f"train/{name}")[BAD_STEP + 1] for name in ("loss", "grad_norm"))
    # the same weights, samples and dropout, without the poison: what the good run measured
    assert float(first.split("loss ")[1].split()[0]) == pytest.approx(loss, abs=2e-6)
    assert float(first.split("norm ")[1]) == pytest.approx(norm, rel=1e-4)
    assert "all of it is finite here" in rest[0]


def test_a_run_that_diverges_stops_on_all_processes_with_its_checkpoint(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["--learning_rate", "1e30", "--warmup_steps", "0", "--max_grad_norm", "0", "--max_skipped_steps", "2"]
    run = finish(command(*tiny_run, *wild, processes=2))
    assert run.returncode != 0
    assert f"exitcode  : {EXIT_DIVERGED}" in run.stderr
    assert "3 of 2 allowed" in run.stdout
    assert "diverged at step" in run.stdout
    assert damage(find_checkpoints(tmp_path / "run")[-1]) is None
    records = sorted((tmp_path / "run" / "bad_steps").glob(f"step-*/{REPLAY_FILE}"))
    assert len(records) == 3
    main(["replay", str(records[0])])
    said = capsys.readouterr().out
    assert "gradient norm nan" in said or "gradient norm inf" in said
    assert "first module whose output is not finite: transformer." in said
    assert "in the micro-batch of sample" in said


def test_an_overflow_of_fp16_is_left_to_the_scaler_until_its_scale_is_down() -> None:
    assert is_applicable(1.0, None)
    assert not is_applicable(float("inf"), None)
    assert not is_applicable(float("nan"), None)
    assert is_applicable(float("inf"), torch.amp.GradScaler("cpu", init_scale=2.0**16))
    assert not is_applicable(float("inf"), torch.amp.GradScaler("cpu", init_scale=1.0))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), ("{}", "not a record"), ("x", "not a record")]
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
