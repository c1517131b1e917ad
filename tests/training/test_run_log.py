import json
from pathlib import Path

import pytest

from minigpt.training.run_log import forget_after, requested_trackers
from minigpt.training.state import TrainingState
from minigpt.utils.formatting import format_duration
from minigpt.utils.run_files import read_metrics


def test_a_resumed_run_forgets_what_it_will_write_again_and_what_a_kill_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in (1, 2, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "val/lo')
    forget_after(path, 2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 2]
    forget_after(tmp_path / "none.jsonl", 2)


def test_trackers_are_named_or_refused_with_the_way_to_install_them() -> None:
    assert requested_trackers(["tensorboard"]) == ["tensorboard"]
    assert requested_trackers(["none"]) == []
    assert "tensorboard" in requested_trackers(["all"])
    with pytest.raises(ValueError, match=r"report_to=nothing_like_it: .* not installed; try: pip install"):
        requested_trackers(["nothing_like_it"])


def test_a_file_that_is_no_metrics_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("hello\n")
    with pytest.raises(ValueError, match="is not JSON"):
        read_metrics(tmp_path / "a")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_times_read_like_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_state_survives_a_round_trip_and_other_files_are_refused(tmp_path: Path) -> None:
    state = TrainingState(step=3, samples_seen=24, elapsed_s=1.5, data_fingerprint="abc")
    assert state.is_best(2.0)
    assert not state.is_best(2.5)
    state.save(tmp_path / "state.json")
    assert TrainingState.load(tmp_path / "state.json") == state
    for text in ("", "[1]", '{"step": 1}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="not a training state"):
            TrainingState.load(tmp_path / "other.json")
