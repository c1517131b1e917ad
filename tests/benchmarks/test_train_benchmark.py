"""`minigpt bench train` and `minigpt bench loss`: fair comparisons, and reports that hold what was measured."""

import json
import statistics
from pathlib import Path

import pytest

from minigpt.benchmarks import loss
from minigpt.benchmarks.train import Shape, Turn, summarize
from minigpt.commands import bench_loss, bench_train
from minigpt.utils.errors import UserError
from support.tables import unpadded

SHAPE = Shape(layers=1, heads=2, hidden=16, vocab_size=50, block_size=8, batch_size=2)


def test_ratios_are_taken_turn_by_turn() -> None:
    def turn(seconds: float, memory_gib: float = 1.0) -> Turn:
        return Turn([seconds, seconds, 9.0], memory_gib)

    turns = {"minigpt": [turn(1.0), turn(2.0), turn(4.0)], "bare": [turn(2.0), turn(2.0, 3.0), turn(6.0)]}
    minigpt, bare = summarize(turns, SHAPE, product_flops=1e9, data_sheet_flops=4e9)
    assert (minigpt.ratio, minigpt.ratio_low, minigpt.ratio_high, minigpt.step_ms) == (1.0, 1.0, 1.0, 2000.0)
    assert (bare.ratio, bare.ratio_low, bare.ratio_high, bare.memory_gib) == (1.5, 1.0, 2.0, 3.0)
    assert minigpt.tokens_per_s == 16 / 2.0
    assert minigpt.mfu_data_sheet == pytest.approx(minigpt.mfu / 4)


@pytest.mark.slow
def test_report_agrees_with_its_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for name, number in vars(SHAPE).items() for word in (f"--{name}", str(number))]
    counts = ["--turns", "1", "--steps", "2", "--warmup", "1", "--device", "cpu", "--mixed_precision", "no"]
    trainers = ["--trainers", "minigpt", "bare", "minigpt-ddp"]
    output = ["--output", str(tmp_path / "report")]
    bench_train.run(bench_train.parse([*words, *counts, *trainers, *output]))
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["shape"] == vars(SHAPE)
    medians = {trainer: statistics.median(turns[0]["seconds"]) for trainer, turns in report["turns"].items()}
    assert list(medians) == ["minigpt", "bare", "minigpt-ddp"]
    for row in report["rows"]:
        assert row["ratio"] == pytest.approx(medians[row["trainer"]] / medians["minigpt"])
        assert row["tokens_per_s"] == pytest.approx(16 / medians[row["trainer"]])
        assert row["memory_gib"] > 0
    ten_steps_ms = [1e4 * seconds for seconds in report["turns"]["minigpt"][0]["seconds"]]
    assert any(abs(duration - round(duration)) > 1e-6 for duration in ten_steps_ms), "times are cut to milliseconds"
    assert "| bare |" in unpadded((tmp_path / "report.md").read_text(encoding="utf-8"))
    assert report["machine"]["torch"] in capsys.readouterr().out


def test_target_loss_is_reached_at_or_below_it() -> None:
    row = loss.Row(seed=1, nanogpt_s=80.0, nanogpt_loss=1.9, minigpt_s=20.0, minigpt_loss=1.9)
    assert unpadded(loss.markdown([row], 1.9)).endswith("| 1 | 80.0 | 1.9000 | 20.0 | 1.9000 | yes | 4.00 |")
    assert "| no |" in unpadded(loss.markdown([row], 1.89))


@pytest.mark.slow
def test_run_of_the_preset_reports_the_time_and_loss_of_its_last_step(text_file: Path, tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        "tokenizer: char\nhidden_size: 16\nnum_hidden_layers: 1\nnum_attention_heads: 2\nmax_steps: 3\n"
        "per_device_train_batch_size: 2\nlogging_steps: 1\nsample_steps: 0\n",
        encoding="utf-8",
    )
    seconds, nats = loss.train_minigpt(str(preset), text_file, seed=1, folder=tmp_path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    assert (last["step"], last["elapsed_s"], last["val/loss"]) == (3, seconds, nats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nanogpt", "."], "nanogpt=.*no model.py there"),
        (["--trainers", "nanogpt", "minigpt"], "nanogpt=None: no model.py there"),
        (["--trainers", "bare"], "trainers must contain minigpt"),
        (["--steps", "0"], "steps=0 must be above 0"),
        (["--hidden", "-8"], "hidden=-8 must be above 0"),
    ],
)
def test_impossible_comparisons_of_training_are_refused(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        bench_train.parse(options)


def test_an_odd_batch_for_two_processes_is_refused_before_anything_is_trained() -> None:
    words = ["--trainers", "minigpt", "minigpt-ddp", "--device", "cpu"]
    for batch in ([], ["--batch_size", "3"]):  # on a CPU, the default is a single sample
        with pytest.raises(UserError, match="give an even --batch_size"):
            bench_train.run(bench_train.parse([*words, *batch]))


def test_impossible_comparisons_of_losses_are_refused(tmp_path: Path) -> None:
    words = ["--nanogpt", str(tmp_path), "--train_file", str(tmp_path / "text")]
    with pytest.raises(UserError, match=r"nanogpt=.*no train.py there"):
        bench_loss.parse(words)
    (tmp_path / "train.py").touch()
    with pytest.raises(UserError, match=r"train_file=.*no such file"):
        bench_loss.parse(words)
    (tmp_path / "text").touch()
    with pytest.raises(UserError, match="no such file or preset"):
        bench_loss.parse([*words, "--preset", "nowhere"])
