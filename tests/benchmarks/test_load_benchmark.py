import json
from pathlib import Path

import pytest

from minigpt import cli


def test_rows_say_how_long_the_loader_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--tokens 1000 --shards 1 7 --sparse_tokens 5000 --batch_size 2 --block_size 8 --workers 0 --seconds 0.05"
    )
    cli.main(["bench", "load", *options.split(), "--output", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [(row["tokens"], row["shards"]) for row in report["rows"]] == [(1000, 1), (1000, 7), (5000, 100)]
    for row in report["rows"]:
        assert row["tokens_per_s"] == pytest.approx(16 * row["batches_per_s"])
        assert row["batches_per_s"] > 0
    assert "| 5,000 (sparse) | 100 | 0 |" in capsys.readouterr().out


def test_numbers_that_cannot_be_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "load", "--tokens", "-1"])
    assert stop.value.code == 2
    assert "tokens=-1 must be above 0" in capsys.readouterr().err
