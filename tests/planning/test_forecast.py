"""Laws of the forecast of more training: it starts at the loss of the run, and more time never looks worse."""

import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minigpt.cli import main
from minigpt.commands.plan import parse
from minigpt.planning.forecast import (
    BRANCH_SPREAD,
    READING_SPREAD,
    REPETITION_SPREAD,
    RUN_SPREAD,
    FinishedRun,
    forecast,
    read_finished_run,
)
from minigpt.planning.scaling_law import LAW, TYPICAL_GAIN
from minigpt.utils.errors import UserError
from minigpt.utils.run_files import METRICS_FILE


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_file: Path, cache_dir: Path) -> Path:
    """A finished run of a few steps."""
    from accelerate.state import AcceleratorState, GradientState

    from minigpt.config.parser import parse_arguments
    from train_accelerate import train

    run_dir = tmp_path_factory.mktemp("finished") / "run"
    words = (
        f"--train_file {text_file} --tokenizer char --cache_dir {cache_dir} --output_dir {run_dir} --hidden_size 16 "
        "--num_hidden_layers 2 --num_attention_heads 2 --block_size 16 --max_steps 12 --save_steps 6 "
        "--sample_max_new_tokens 5 --report_to none --use_cpu"
    ).split()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert train(parse_arguments(words)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_the_forecast_starts_at_the_loss_of_the_run_and_falls(run_dir: Path) -> None:
    losses = [forecast(run_dir, minutes) for minutes in (1e-9, 0.001, 0.002, 0.004)]
    last = json.loads((run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines()[-1])
    assert losses[0].loss == pytest.approx(last["val/loss"])
    assert [found.loss for found in losses] == sorted((found.loss for found in losses), reverse=True)
    assert losses[0].loss * (losses[0].bits_per_nat or math.nan) == pytest.approx(last["val/bits_per_byte"])


def test_the_interval_holds_the_forecast_and_widens_with_the_time(run_dir: Path) -> None:
    widths = []
    for minutes in (0.001, 0.01, 0.1):
        found = forecast(run_dir, minutes)
        low, high = found.interval
        assert low < found.loss < high
        widths.append(math.log(high / low))
    assert widths == sorted(widths)


def test_the_forecast_is_in_minutes_of_this_run(run_dir: Path) -> None:
    """A run on a machine that is twice as fast reads twice as much in a minute."""
    before = forecast(run_dir, 0.01)
    state = next(run_dir.glob("checkpoint-12/training_state.json"))
    values = json.loads(state.read_text(encoding="utf-8"))
    state.write_text(json.dumps(values | {"elapsed_s": values["elapsed_s"] / 2}), encoding="utf-8")
    assert forecast(run_dir, 0.005).loss == pytest.approx(before.loss)


def rewrite(run_dir: Path, samples: int, loss: float) -> Path:
    """Let a finished run have read so many samples and ended with this loss."""
    state = next(run_dir.glob("checkpoint-12/training_state.json"))
    values = json.loads(state.read_text(encoding="utf-8"))
    state.write_text(json.dumps(values | {"samples_seen": samples}), encoding="utf-8")
    (run_dir / METRICS_FILE).write_text(json.dumps({"step": 12, "val/loss": loss}) + "\n", encoding="utf-8")
    return run_dir


def predicted(run_dir: Path, slope: float, text_bytes: float) -> float:
    """The relative loss of a run in the law, on a text of this slope."""
    run = read_finished_run(run_dir)
    return LAW.relative_loss(run.size, text_bytes, text_bytes / run.text_bytes, slope)


def add_options(run_dir: Path, options: str) -> None:
    arguments = run_dir / "arguments.yaml"
    arguments.write_text(arguments.read_text(encoding="utf-8") + options, encoding="utf-8")


def test_the_slope_that_was_measured_before_the_run_is_used(run_dir: Path) -> None:
    rewrite(run_dir, 4000, 3.0)
    add_options(run_dir, "text_slope: 0.6\n")
    run = read_finished_run(run_dir)
    read, minutes = run.bytes_read, run.elapsed_s / 60
    expected = 3.0 * predicted(run_dir, 0.6, 2 * read) / predicted(run_dir, 0.6, read)
    assert forecast(run_dir, minutes).loss == pytest.approx(expected)


def test_a_run_that_knows_no_slope_has_that_of_a_typical_text(run_dir: Path) -> None:
    rewrite(run_dir, 4000, 3.0)
    run = read_finished_run(run_dir)
    slope = (2048 / run.vocab_size) ** TYPICAL_GAIN
    expected = 3.0 * predicted(run_dir, slope, 2 * run.bytes_read) / predicted(run_dir, slope, run.bytes_read)
    assert forecast(run_dir, run.elapsed_s / 60).loss == pytest.approx(expected)


def test_with_dropout_repetition_does_less_harm(run_dir: Path) -> None:
    rewrite(run_dir, 4_000_000, 3.0)
    minutes = 20 * read_finished_run(run_dir).elapsed_s / 60
    without = forecast(run_dir, minutes).loss
    add_options(run_dir, "dropout: 0.1\n")
    assert forecast(run_dir, minutes).loss < without


def branch(run_dir: Path, part: float, loss: float) -> FinishedRun:
    """The run after it has read this part of its text again, with this loss."""
    run = read_finished_run(run_dir)
    return replace(run, bytes_read=(1 + part) * run.bytes_read, loss=loss)


@pytest.mark.parametrize("samples", [4000, 400_000])  # hardly repeated, and often
def test_a_branch_weighs_the_possible_runs_by_how_well_they_explain_it(run_dir: Path, samples: int) -> None:
    """Reading and repetition may do more or less than the law says; the forecast is the mean over all they may do."""
    rewrite(run_dir, samples, 3.0)
    add_options(run_dir, "text_slope: 0.6\n")
    run = read_finished_run(run_dir)

    def changes(text_bytes: float) -> tuple[float, float]:
        before, after = (predicted(run_dir, 0.6, count) for count in (run.bytes_read, text_bytes))
        law = replace(LAW, repetition=0.0)
        read_before, read_after = (
            law.relative_loss(run.size, count, count / run.text_bytes, 0.6) for count in (run.bytes_read, text_bytes)
        )
        reading = math.log(1 + (read_after - read_before) / before)
        return reading, math.log(after / before) - reading

    measured = 3.0 * math.exp(0.7 * changes(1.25 * run.bytes_read)[0] + 1.5 * changes(1.25 * run.bytes_read)[1])
    found = forecast(run_dir, run.elapsed_s / 60, branch(run_dir, 0.25, measured))

    generator = np.random.default_rng(0)
    factors = 1 + generator.normal(size=(1_000_000, 2)) * (READING_SPREAD, REPETITION_SPREAD)
    short, long = (factors @ changes(part * run.bytes_read) for part in (1.25, 2))
    weights = np.exp(-0.5 * ((math.log(measured / 3.0) - short) / BRANCH_SPREAD) ** 2)
    mean = np.average(long, weights=weights)
    variance = np.average((long - mean) ** 2, weights=weights)
    assert math.log(found.loss / 3.0) == pytest.approx(mean, abs=2e-4)
    assert found.spread == pytest.approx(math.sqrt(2 * RUN_SPREAD**2 + variance), rel=0.02)


def test_a_branch_that_did_what_the_law_says_only_narrows_the_interval(run_dir: Path) -> None:
    rewrite(run_dir, 4000, 3.0)
    minutes = read_finished_run(run_dir).elapsed_s / 60
    alone = forecast(run_dir, minutes)
    with_branch = forecast(run_dir, minutes, branch(run_dir, 0.25, forecast(run_dir, minutes / 4).loss))
    assert with_branch.loss == pytest.approx(alone.loss)
    assert with_branch.spread < alone.spread


@pytest.mark.slow
def test_the_command_trains_on(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(run_dir), "--more_minutes", "0.05", "--branch_minutes", "0"])
    command = capsys.readouterr().out.splitlines()[-1]
    words = [sys.executable, "-m", *shlex.split(command), "--output_dir", str(run_dir)]
    subprocess.run(words, capture_output=True, check=True)
    last = json.loads((run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines()[-1])
    assert last["elapsed_s"] == pytest.approx(3, abs=1)
    assert last["step"] > 12


def damage_none(run_dir: Path) -> None:
    (run_dir / "arguments.yaml").unlink()


def finetune(run_dir: Path) -> None:
    (run_dir / "arguments.yaml").write_text("model_name_or_path: gpt2\ntrain_file: a.txt\n", encoding="utf-8")


def without_checkpoint(run_dir: Path) -> None:
    for folder in run_dir.glob("checkpoint-*"):
        shutil.rmtree(folder)


def stopped(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoint-12")


def without_validation(run_dir: Path) -> None:
    (run_dir / METRICS_FILE).write_text('{"step": 12, "train/loss": 1.0}\n', encoding="utf-8")


def without_bytes(run_dir: Path) -> None:
    """As with token shards of another tool."""
    data = json.loads((run_dir / "data.json").read_text(encoding="utf-8"))
    data["splits"]["train"]["text_bytes"] = None
    (run_dir / "data.json").write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_bytes, "how many bytes"),
        (damage_none, "no folder of a run"),
        (finetune, "trained from scratch"),
        (without_checkpoint, "no checkpoint"),
        (stopped, "stopped at step 6 of 12"),
        (without_validation, "no validation loss"),
    ],
)
def test_a_run_that_cannot_be_forecast_is_refused(change: Callable[[Path], None], message: str, run_dir: Path) -> None:
    change(run_dir)
    with pytest.raises(UserError, match=message):
        forecast(run_dir, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--more_minutes", "0"], "more_minutes=0.0 must be"),
        (["--more_minutes", "1", "--branch_minutes", "2"], "branch_minutes=2.0 must be from 0 to more_minutes=1"),
        (["--more_minutes", "1", "--branch_minutes", "-1"], "branch_minutes=-1.0 must be"),
        (["--branch_minutes", "2"], "give --more_minutes too"),
    ],
)
def test_times_that_cannot_be_are_refused(words: list[str], message: str, run_dir: Path) -> None:
    with pytest.raises(UserError, match=message):
        parse([str(run_dir), *words])
