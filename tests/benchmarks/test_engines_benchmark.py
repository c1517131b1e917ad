"""The table of engines: its reference is exact, engines in float32 agree, and a broken peer is one line."""

import json
import math
from pathlib import Path

import pytest
import torch

from minigpt.benchmarks.engines import llama_bench, sample_windows
from minigpt.cli import main
from minigpt.export.source import load_source
from minigpt.utils.errors import UserError
from support.tiny import CONTEXT, byte_tokenizer, tiny_model

TEXT = "Le cœur a ses raisons, que la raison ne connaît point. " * 8


def save(folder: Path) -> torch.nn.Module:
    model = tiny_model()
    model.save_pretrained(folder)
    byte_tokenizer(eos_token="<|endoftext|>").save_pretrained(folder)
    return model


@pytest.mark.slow
def test_all_engines_agree_in_float32(tmp_path: Path) -> None:
    model = save(tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = ["--window_tokens", "30", "--new_tokens", "10", "--turns", "1", "--threads", "1"]
    paths = ["--model", str(tmp_path / "run"), "--text_file", str(tmp_path / "text.txt")]
    main(["bench", "engines", *paths, *options, "--output", str(tmp_path / "report")])
    rows = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"]
    exact = rows[0]
    assert (exact["engine"], exact["dtype"], exact["largest_difference"]) == ("MiniGPT", "float32", 0.0)
    by_name = {(row["engine"], row["dtype"]): row for row in rows}
    assert len(by_name) == len(rows) == 10
    for name, tolerance in {("ONNX Runtime", "fp32"): 1e-4, ("llama.cpp", "f32"): 2e-2}.items():
        row = by_name[name]
        assert row["largest_difference"] < tolerance
        assert row["bits_per_byte"] == pytest.approx(exact["bits_per_byte"], abs=tolerance)
        assert row["greedy_equal"] == 5
    assert all(row["tokens_per_s"] > 0 for row in rows)
    nats, text_bytes, data = 0.0, 0, TEXT.encode()
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    ids = tokenizer(TEXT)["input_ids"]
    for start in [round(part * (len(ids) - 30) // 4) for part in range(5)]:
        window = torch.tensor([ids[start : start + 30]])
        nats += model(window, labels=window).loss.item() * 29
        text_bytes += len(data[start + 1 : start + 30].decode(errors="replace").encode())
    assert exact["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_impossible_windows_are_refused_before_anything_is_exported(tmp_path: Path) -> None:
    save(tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    source = load_source(tmp_path / "run", "other engines")
    with pytest.raises(UserError, match=f"the model has {CONTEXT}"):
        sample_windows(source, tmp_path / "text.txt", CONTEXT, CONTEXT)
    (tmp_path / "short.txt").write_text(TEXT[:40], encoding="utf-8")
    with pytest.raises(UserError, match="lower --window_tokens"):
        sample_windows(source, tmp_path / "short.txt", 20, 10)
    windows = sample_windows(source, tmp_path / "text.txt", 20, 10)
    ids = source.tokenizer(TEXT)["input_ids"]
    assert windows[0] == ids[:20]
    assert windows[-1] == ids[-20:]


def test_a_peer_that_does_not_run_is_one_line(tmp_path: Path) -> None:
    model = tmp_path / "m-F16.gguf"
    model.write_bytes(b"0" * 1000)
    peer = tmp_path / "llama-bench"
    with pytest.raises(UserError, match=r"llama_bench=.* does not run"):
        llama_bench(str(peer), model, 8, 2, 1)
    peer.write_text("#!/bin/sh\necho '[{\"avg_ts\": 12.5}]'\n", encoding="utf-8")
    peer.chmod(0o755)
    row = llama_bench(str(peer), model, 8, 2, 1)
    assert (row.dtype, row.size_mb, row.tokens_per_s) == ("f16", 0.001, 12.5)
    peer.write_text("#!/bin/sh\necho no model\n", encoding="utf-8")
    with pytest.raises(UserError, match="does not run"):
        llama_bench(str(peer), model, 8, 2, 1)
