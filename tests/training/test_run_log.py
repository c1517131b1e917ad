"""Laws of the log of a run and of its counters."""

import json
import math
from pathlib import Path

import pytest

from minigpt.training.run_log import forget_after, requested_trackers
from minigpt.training.state import TrainingState
from minigpt.utils.errors import UserError
from minigpt.utils.formatting import format_duration
from minigpt.utils.run_files import read_metrics


def test_a_resumed_run_drops_later_lines_and_a_line_that_a_kill_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in (1, 2, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "val/lo')
    forget_after(path, 2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 2]
    forget_after(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_tracker_that_is_not_installed_is_refused_with_the_way_to_install_it() -> None:
    assert requested_trackers(["tensorboard"]) == ["tensorboard"]
    assert requested_trackers(["none"]) == []
    assert "tensorboard" in requested_trackers(["all"])
    with pytest.raises(ValueError, match=r"report_to=nothing_like_it: .* not installed; try: pip install"):
        requested_trackers(["nothing_like_it"])


def test_a_file_that_is_not_a_metrics_file_is_refused(tmp_path: Path) -> None:
    good = '{"step": 1, "train/loss": 1.0}\n'
    for number, line in enumerate(("hello", "[1]", '{"loss": 1}', "", "\x00"), start=1):
        (tmp_path / "a").write_text(good * number + line + "\n" + good, encoding="utf-8")
        with pytest.raises(UserError, match=f"a line {number + 1} is not a line of metrics"):
            read_metrics(tmp_path / "a")


@pytest.mark.parametrize("length", range(0, 30, 7))
def test_a_last_line_cut_short_by_a_kill_is_dropped(tmp_path: Path, length: int) -> None:
    good = '{"step": 1, "train/loss": 1.0}\n'
    (tmp_path / "a").write_text(good + good[:length], encoding="utf-8")
    assert read_metrics(tmp_path / "a") == [{"step": 1, "train/loss": 1.0}]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_state_survives_a_round_trip_and_other_files_are_refused(tmp_path: Path) -> None:
    state = TrainingState(step=3, samples_seen=24, elapsed_s=1.5, data_fingerprint="abc")
    assert state.is_best(2.0)
    assert not state.is_best(2.5)
    assert not state.is_best(None)
    assert not state.is_best(math.nan)
    assert not TrainingState().is_best(math.nan)
    state.save(tmp_path / "state.json")
    assert TrainingState.load(tmp_path / "state.json") == state
    for content in (b"", b"[1]", b'{"step": 1}', b"\xff\xfe"):
        (tmp_path / "other.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"not a training state|not UTF-8"):
            TrainingState.load(tmp_path / "other.json")


@pytest.mark.parametrize(("every", "due"), [(0, [7]), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (9, [7])])
def test_a_periodic_task_runs_at_multiples_and_at_the_end(every: int, due: list[int]) -> None:
    assert [step for step in range(1, 8) if TrainingState(step=step, max_steps=7).is_due(every)] == due
