"""Laws of `minigpt bench generate`."""

import json
from pathlib import Path

import pytest
import torch

from minigpt.benchmarks.generate import Row, markdown, twins, weight_bytes
from minigpt.commands import bench_generate


def run(*options: str) -> None:
    bench_generate.run(bench_generate.parse(options))


def test_twins_compute_the_same() -> None:
    ours, theirs = twins("float32", "cpu", layers=1)
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)
    # 124M's table and one of its twelve layers, four bytes a number; the position table is not read
    assert weight_bytes(theirs) == 4 * (50257 * 768 + 7_087_872 + 2 * 768)


def test_report_holds_a_row_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--layers", "1", "--turns", "1", "--new_tokens", "2", "--modes", "eager", "--dtypes", "float32")
    run(*small, "--device", "cpu", "--batch_sizes", "1", "2", "--output", str(tmp_path / "report"))
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [row["batch_size"] for row in report["rows"]] == [1, 2]
    assert report["bandwidth_gb_per_s"] > 0
    assert "| 2 | float32 | eager |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert report["machine"]["torch"] in capsys.readouterr().out


def test_share_is_of_the_bandwidth() -> None:
    row = Row(1, "float32", "eager", 20.0, 10.0, 2.0, 1.9, 2.1, weight_gb_per_s=10.0)
    assert markdown([row], bandwidth_gb_per_s=40.0).endswith("| 20.0 | 10.0 | 2.00 (1.90 to 2.10) | 25% |")


def test_numbers_that_cannot_be_are_named() -> None:
    for options, message in ((("--turns", "0"), "turns=0"), (("--batch_sizes", "0"), "batch_sizes=0")):
        with pytest.raises(ValueError, match=f"{message} must be at least 1"):
            run(*options)
