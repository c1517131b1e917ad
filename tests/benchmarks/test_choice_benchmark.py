"""Laws of `minigpt bench choice`: every run has the same time, and its figures are those of the runs."""

import json
import math
from pathlib import Path

import pytest

from minigpt.benchmarks import choice
from minigpt.cli import main
from minigpt.utils.run_files import METRICS_FILE, read_metrics

MINUTES = 0.02


def last(run_dir: Path) -> dict[str, float]:
    return [line for line in read_metrics(run_dir / METRICS_FILE) if "val/loss" in line][-1]


@pytest.mark.slow
def test_the_tables_hold_what_the_runs_reached_in_their_time(
    text_file: Path, tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "GRID", ((32, 1, 300), (64, 1, 300)))
    monkeypatch.setitem(choice.RECIPE, "block_size", 16)
    monkeypatch.setitem(choice.RECIPE, "validation_split_percentage", 20)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    runs.mkdir()
    options = choice.RECIPE | {  # as if the study had been interrupted after the choice
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "tokenizer_vocab_size": 300,
        "train_file": [str(text_file)], "train_minutes": MINUTES, "use_cpu": True,
    }  # fmt: skip
    (runs / f"tale-{MINUTES}-chosen.json").write_text(
        json.dumps({"options": options, "predicted_bits_per_byte": 2.5}), encoding="utf-8"
    )
    words = ["bench", "choice", "--text", f"tale={text_file}"]
    words += ["--minutes", f"{MINUTES}", "--more_minutes", f"{MINUTES}"]
    words += ["--output_dir", str(runs), "--output", str(tmp_path / "report")]
    main(words)

    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    (row,) = report["choices"]
    assert set(row["grid"]) == {"32x1-300", "64x1-300"}
    for name, bits in [*row["grid"].items(), ("chosen", row["bits_per_byte"])]:
        run = last(runs / f"tale-{MINUTES}-{name}")
        assert run["val/bits_per_byte"] == bits
        assert run["elapsed_s"] == pytest.approx(60 * MINUTES, rel=0.5)
    assert {continued["run"].split("-", 2)[2] for continued in report["continuations"]} == {*row["grid"], "chosen"}
    suffixes = ("", f"-branch-{MINUTES / 2}", f"-continued-{MINUTES}")
    for continued in report["continuations"]:
        run_dir = runs / continued["run"]
        before, branch, after = (last(Path(f"{run_dir}{suffix}")) for suffix in suffixes)
        assert continued["loss_now"] == before["val/loss"]
        assert continued["loss_then"] == after["val/loss"]
        assert continued["error"] == pytest.approx(continued["loss"] - after["val/loss"])
        bits = continued["bits_per_byte"] - after["val/bits_per_byte"]
        assert continued["error_per_byte"] == pytest.approx(bits * math.log(2))
        assert before["elapsed_s"] < branch["elapsed_s"] < after["elapsed_s"]
        assert after["elapsed_s"] == pytest.approx(2 * 60 * MINUTES, rel=0.5)

    trained = len(started)
    assert trained == 3 * 3
    main(words)  # nothing is trained twice
    assert len(started) == trained
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
