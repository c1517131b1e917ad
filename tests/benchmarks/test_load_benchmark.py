"""`minigpt bench load`: the report holds what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from minigpt import cli
from minigpt.benchmarks.load import write_shards
from support.tables import unpadded


@pytest.mark.parametrize("shards", [1, 7])
@pytest.mark.parametrize("sparse", [False, True])
def test_shards_hold_all_tokens_and_sparse_ones_take_no_disk_space(tmp_path: Path, shards: int, sparse: bool) -> None:
    tokens = write_shards(tmp_path, 100_000, shards, sparse)
    assert len(tokens) == 100_000
    assert len(list(tmp_path.glob("*.bin"))) == shards
    assert np.any(tokens.read(0, 100_000)) != sparse
    used = sum(path.stat().st_blocks * 512 for path in tmp_path.glob("*.bin"))
    assert used < 50_000 if sparse else used >= 200_000


def test_rates_of_the_report_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--tokens 1000 --shards 1 7 --sparse_tokens 5000 --batch_size 2 --block_size 8 --workers 0 --seconds 0.05"
    )
    cli.main(["bench", "load", *options.split(), "--output", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [(row["tokens"], row["shards"]) for row in report["rows"]] == [(1000, 1), (1000, 7), (5000, 100)]
    for row in report["rows"]:
        assert row["tokens_per_s"] == pytest.approx(16 * row["batches_per_s"])
        assert row["batches_per_s"] > 0
    assert "| 5,000 (sparse) | 100 | 0 |" in unpadded(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--tokens", "-1"), "tokens=-1 must be above 0"),
        (("--workers", "0", "-2"), "workers=-2 must be at least 0"),
        (("--tokens", "8"), "fewer than one sample of block_size=1024"),
    ],
)
def test_impossible_numbers_are_one_line(
    capsys: pytest.CaptureFixture[str], option: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "load", *option])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
