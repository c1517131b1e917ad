"""Laws of `minigpt eval --tasks` without the harness; tests/system/test_ecosystem.py has those with it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt.cli import main
from minigpt.evaluation.tasks import rows
from minigpt.hub.model_card import write_card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "piqa"], "tasks need lm-evaluation-harness: pip install 'minigpt-lm[tasks]'"),
        (["--tasks", "piqa", "--task_path", "nowhere"], "task_path=nowhere is no folder"),
        (["--text_file", "x", "--num_fewshot", "1"], "num_fewshot=1 requires --tasks"),
        (["--text_file", "x", "--items", "y"], "items=y requires --conversations or --tasks"),
        (["--tasks", "piqa", "--model", "a", "b"], "--tasks takes one model"),
    ],
)
def test_bad_options_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--model", "m", *words])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_published_metrics_are_taken_from_the_report() -> None:
    report = {
        "results": {
            "piqa": {
                "alias": "piqa",
                "acc,none": 0.6,
                "acc_stderr,none": 0.01,
                "acc_norm,none": 0.61,
                "brier,none": 1,
            },
            "group": {"alias": "group"},
        },
        "n-shot": {"piqa": 0},
    }
    assert list(rows(report)) == [("piqa", "0", "acc", 0.6, 0.01), ("piqa", "0", "acc_norm", 0.61, None)]


def test_the_card_and_its_model_index_have_the_results(
    tiny_run: list[str], train_here: Callable[[list[str]], int], tmp_path: Path
) -> None:
    assert train_here(tiny_run) == 0
    run_dir = tmp_path / "run"
    (run_dir / "evaluations").mkdir()
    result = {"task": "piqa", "shots": "5", "metric": "acc", "value": 0.61234, "stderr": 0.01}
    (run_dir / "evaluations" / "tasks.json").write_text(json.dumps({"tasks": [result]}))
    write_card(run_dir)
    card = (run_dir / "README.md").read_text()
    assert "| piqa, acc, 5-shot" in card
    assert "| 0.6123" in card
    assert "type: piqa" in card.split("---")[1]
