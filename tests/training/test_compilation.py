"""Laws of a compiled training: it computes the same, and nothing is compiled again after the second step."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from minigpt.training.run_log import TrainingLog
from support.runs import metrics


def test_the_number_of_compiled_graphs_is_constant_after_the_second_step(
    tiny_run: list[str], tmp_path: Path, train_here: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    step_done = TrainingLog.step_done
    monkeypatch.setattr(
        TrainingLog, "step_done", lambda log: graphs.append(counters["stats"]["unique_graphs"]) or step_done(log)
    )
    packed = ["--packing_strategy", "bfd", "--max_steps", "20", "--eval_steps", "1", "--sample_steps", "4"]
    rest = ["--gradient_accumulation_steps", "2", "--dropout", "0", "--per_device_eval_batch_size", "5"]
    words = [*tiny_run, *packed, *rest]
    assert train_here([*words, "--torch_compile", "--torch_compile_backend", "aot_eager"]) == 0
    assert counters["graph_break"] == {}
    assert graphs[0] > 0
    assert len(graphs) == 20
    assert len(set(graphs[1:])) == 1, graphs
    eager_words = [word.replace("/run", "/eager") for word in words]
    assert train_here(eager_words) == 0
    for name in ("train/loss", "val/loss"):
        assert metrics(tmp_path / "run", name) == pytest.approx(metrics(tmp_path / "eager", name), abs=2e-6)
