"""Laws of what makes the host wait for the device: nothing does between two log lines.

The steps run on `meta` tensors, which have no values: reading one, as for a number on the host, raises an error.
"""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_accelerate
from minigpt.config.arguments import OptimizerArguments
from minigpt.config.parser import parse_arguments
from minigpt.optim.optimizer import build_optimizer
from minigpt.training.accelerator import on_device
from minigpt.training.nonfinite import HostCopy
from minigpt.training.run_dir import OutputDir
from support.runs import ROOT

META = torch.device("meta")


class NoUpdate(torch.optim.SGD):
    """Stands for the fused optimizer of a GPU, which `meta` tensors have no kernel for."""

    def step(self) -> None:  # type: ignore[override]
        assert self.found_inf.device == META


@pytest.mark.parametrize("options", [[], ["--packing_strategy", "bfd"], ["--document_attention"]], ids=str)
def test_no_step_reads_a_value_from_the_device(
    options: list[str],
    tiny_run: list[str],
    train_here: Callable[[list[str]], int],  # only for its clean state of accelerate
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = []
    monkeypatch.setattr(HostCopy, "read", lambda copy: reads.append(copy) or 1.0)
    args = parse_arguments(
        [*tiny_run, *options, "--gradient_accumulation_steps", "2"], ROOT / "configs" / "quickstart.yaml"
    )
    with OutputDir(args) as output_dir:
        run = train_accelerate.set_up(args, output_dir)
        run.accelerator.state.device = META
        run.model.to(META)
        run.optimizer = NoUpdate(run.model.parameters(), fused=False)
        run.optimizer.defaults["fused"] = True
        run.batches = on_device(run.data_module.batches(args, 0, 0, 1), META, run.model.config)
        run.model.train()
        for _ in range(3):
            loss, grad_norm = train_accelerate.take_step(run, learning_rate=1e-3)
    assert loss.device == grad_norm.device == META
    assert len(reads) == 2  # of the norms of the first two steps, each while the next step is under way


class Reads(TorchDispatchMode):
    """Counts how often a value is read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += operation.overloadpacket == torch.ops.aten._local_scalar_dense
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_skips_a_step_by_itself_without_reading_the_flag(name: str, model: torch.nn.Module) -> None:
    optimizer = build_optimizer(model, OptimizerArguments(optimizer=name), torch.device("cpu"))

    def step(found_inf: float) -> None:
        ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
        model(input_ids=ids, labels=ids).loss.backward()
        if found_inf:
            next(model.parameters()).grad[0, 0] = torch.nan
            model.transformer.layers[0].mlp.up_proj.weight.grad[0, 0] = torch.inf
        optimizer.found_inf = torch.tensor(found_inf)
        with Reads() as reads:
            optimizer.step()
        assert reads.count == 0
        optimizer.zero_grad()

    def values() -> list[torch.Tensor]:
        moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
        return [tensor.clone() for tensor in (*model.parameters(), *moments)]

    step(0.0)
    before = values()
    step(1.0)
    assert all(map(torch.equal, before, values()))
    step(0.0)
    assert not all(map(torch.equal, before, values()))
