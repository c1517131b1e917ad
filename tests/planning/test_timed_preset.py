"""Laws of `minigpt train --train_minutes` without a preset: it trains on time, and keeps what it chose as a preset."""

import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.config.parser import parse_arguments
from minigpt.planning import pilot, timed_preset
from minigpt.planning.time_budget import TimedRun
from minigpt.planning.timed_preset import HEADER, with_chosen_preset
from minigpt.utils.errors import UserError
from minigpt.utils.run_files import ARGUMENTS_FILE, METRICS_FILE, read_metrics


@pytest.fixture
def words(text_file: Path, cache_dir: Path, tmp_path: Path) -> list[str]:
    """A run of three seconds. The shape is given, so only one combination is measured."""
    return (
        f"--train_file {text_file} --cache_dir {cache_dir} --output_dir {tmp_path / 'run'} --train_minutes 0.05 "
        "--tokenizer_vocab_size 300 --hidden_size 16 --num_hidden_layers 2 --block_size 16 --report_to none --use_cpu"
    ).split()


@pytest.fixture
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(words: list[str], program: str, processes: int) -> TimedRun:
        raise AssertionError("measured before the command line was checked")

    monkeypatch.setattr(timed_preset, "choose", choose)


def test_a_run_without_a_preset_trains_on_time_and_leaves_one(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "minigpt", "train", *words]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "predicted" in process.stdout
    last = read_metrics(tmp_path / "run" / METRICS_FILE)[-1]
    preset, recorded = tmp_path / "run.yaml", tmp_path / "run" / ARGUMENTS_FILE
    planned_s = 60 * parse_arguments([str(preset)]).train_minutes  # a fast machine would over-fit in three seconds
    assert planned_s <= 3
    assert last["elapsed_s"] == pytest.approx(planned_s, rel=0.2)
    assert last["val/bits_per_byte"] > 0
    assert preset.read_text(encoding="utf-8").startswith(HEADER)
    assert parse_arguments([str(preset)]) == parse_arguments([str(recorded)])
    monkeypatch.setattr(pilot, "STEPS", 30)
    monkeypatch.setattr(pilot, "SHORT_STEPS", 15)
    again = with_chosen_preset([*words, "--overwrite_output_dir"], "minigpt train")
    assert again == [str(preset), "--overwrite_output_dir"]
    assert "overwrite_output_dir" not in preset.read_text(encoding="utf-8")


@pytest.mark.usefixtures("nothing_is_measured")
def test_a_file_of_the_user_is_not_replaced(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("hidden_size: 8\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.yaml would be replaced"):
        with_chosen_preset([*words, "--overwrite_output_dir"], "minigpt train")
    assert (tmp_path / "run.yaml").read_text(encoding="utf-8") == "hidden_size: 8\n"


@pytest.mark.usefixtures("nothing_is_measured")
def test_a_run_that_is_there_is_resumed_with_its_own_options(words: list[str], tmp_path: Path) -> None:
    recorded = tmp_path / "run" / ARGUMENTS_FILE
    recorded.parent.mkdir()
    recorded.write_text("hidden_size: 24\n", encoding="utf-8")
    resuming = [*words, "--resume_from_checkpoint", "latest"]
    assert with_chosen_preset(resuming, "minigpt train") == [str(recorded), *resuming]
    with pytest.raises(UserError, match="already holds a run"):
        with_chosen_preset(words, "minigpt train")
    recorded.unlink()
    with pytest.raises(UserError, match="holds no run"):
        with_chosen_preset(resuming, "minigpt train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train_file no/such/file.txt", "no such file"),
        ("--tokenizer no/such/folder", "no such"),
        ("--hidden_size 16 --num_attention_heads 3", "num_attention_heads=3"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    options: str, message: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=message):
        with_chosen_preset([*words, *options.split()], "minigpt train")
    assert list(tmp_path.iterdir()) == []
