"""`minigpt bench generate`: both models compute the same, and the report holds what was measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

from minigpt.benchmarks.generate import Row, equal_models, markdown, weight_bytes
from minigpt.commands import bench_generate
from minigpt.utils.errors import UserError
from support.tables import unpadded


def run(*options: str) -> None:
    bench_generate.run(bench_generate.parse(options))


def test_both_models_compute_the_same_and_read_the_same_weights() -> None:
    minigpt, gpt2 = equal_models("float32", "cpu", layers=1)
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(minigpt(ids).logits, gpt2(ids).logits, atol=1e-5, rtol=0)
    positions = minigpt.get_parameter("transformer.embed_positions.weight")
    assert weight_bytes(gpt2) == sum(parameter.nbytes for parameter in minigpt.parameters()) - positions.nbytes


def test_report_has_a_row_for_each_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--layers", "1", "--turns", "1", "--new_tokens", "2", "--modes", "eager", "--dtypes", "float32")
    run(*small, "--device", "cpu", "--batch_sizes", "1", "2", "--output", str(tmp_path / "report"))
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [row["batch_size"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        speeds = row["minigpt_tokens_per_s"] / row["gpt2_tokens_per_s"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["ratio"] == pytest.approx(speeds)  # with a single turn
    assert report["bandwidth_gb_per_s"] > 0
    assert "| 2 | float32 | eager |" in unpadded((tmp_path / "report.md").read_text(encoding="utf-8"))
    assert report["machine"]["torch"] in capsys.readouterr().out


@pytest.mark.slow  # llama.cpp's file of GPT-2's vocabulary takes half a minute
def test_the_loop_and_llama_cpp_are_measured_in_the_same_turns(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    binary = tmp_path / "llama-bench"  # counts its calls, and reads the file that it is given as gguf does
    script = [
        f"#!{sys.executable}",
        "import sys",
        "from gguf import GGUFReader",
        f"open({str(calls)!r}, 'a').write(f'{{len(GGUFReader(sys.argv[2]).tensors)}}\\n')",
        """print('[{"avg_ts": 5}]')""",
    ]
    binary.write_text("\n".join(script))
    binary.chmod(0o755)
    small = ("--layers", "1", "--turns", "2", "--new_tokens", "2", "--modes", "loop", "--dtypes", "bfloat16")
    run(*small, "--llama_bench", str(binary), "--batch_sizes", "1", "2", "--output", str(tmp_path / "report"))
    rows = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"]
    assert [row["llama_cpp_tokens_per_s"] for row in rows] == [5, None]
    assert calls.read_text().split() == ["16"] * 3  # a layer of 12 tensors, two tables and a norm; a warm-up turn
    assert "| llama.cpp tokens/s |" in unpadded((tmp_path / "report.md").read_text(encoding="utf-8"))


def test_last_column_is_the_share_of_the_bandwidth() -> None:
    row = Row(1, "float32", "eager", 20.0, 10.0, 2.0, 1.9, 2.1, weight_gb_per_s=10.0)
    assert unpadded(markdown([row], bandwidth_gb_per_s=40.0)).endswith("| 20.0 | 10.0 | 2.00 (1.90 to 2.10) | 25% |")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--turns", "0"), "turns=0 must be above 0"),
        (("--batch_sizes", "4", "0"), "batch_sizes=0 must be above 0"),
        (("--threads", "-1"), "threads=-1 must be above 0"),
        (("--output", "nowhere/report"), "output=nowhere/report: its folder does not exist"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_measured(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_generate.parse(options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_absent_device_is_a_user_error() -> None:
    with pytest.raises(UserError, match="device=cuda cannot be used"):
        run("--device", "cuda")
