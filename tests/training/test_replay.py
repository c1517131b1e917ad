"""Laws of the replay: the module in which a NaN or an infinity begins is named, in either pass, with its input."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minigpt.config.arguments import Arguments
from minigpt.data.samples import TokenBlocks
from minigpt.data.shards import Shard, Tokens
from minigpt.training.nonfinite import StepRecord
from minigpt.training.replay import ReplayedStep
from support.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("error")  # the command would show them
MODULES = ["embed_tokens", "layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj", "norm"]


class Poisoned(torch.autograd.Function):
    """Passes a tensor on; one number of its gradient becomes a NaN."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = torch.nan
        return gradient


@pytest.fixture
def step(tmp_path: Path) -> ReplayedStep:
    torch.arange(400).remainder(90).to(torch.uint16).numpy().tofile(tmp_path / "train.bin")
    samples = TokenBlocks(Tokens([Shard(tmp_path / "train.bin", 400)], "<u2"), 16)  # type: ignore[arg-type]
    record = StepRecord(3, [0, 16, 32, 48], 1, "no", 1e-3, "nan", None)
    options = Arguments(train_file=["x"], per_device_train_batch_size=2, block_size=16)
    return ReplayedStep(tiny_model().train(), samples, options, record, torch.float32)


def module(step: ReplayedStep, name: str) -> nn.Module:
    return step.model.get_submodule(f"transformer.{name}")


def test_everything_finite_is_said_to_be(step: ReplayedStep) -> None:
    with step.watched():
        step.run()
    assert step.first_nonfinite_module is None
    assert step.first_nonfinite_gradient is None
    assert not any(hooks for part in step.model.modules() for hooks in (part._forward_hooks, part._backward_hooks))


@pytest.mark.parametrize("name", [entry for entry in MODULES if entry != "embed_tokens"])
def test_the_first_module_whose_output_is_not_finite_is_named_with_the_range_of_its_input(
    step: ReplayedStep, name: str
) -> None:
    seen: list[torch.Tensor] = []

    def poison(part: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        seen.append(inputs[0])
        return output * torch.tensor(float("inf"))

    module(step, name).register_forward_hook(poison)
    with step.watched():
        step.run()
    assert step.first_nonfinite_module == f"transformer.{name}"
    assert step.its_input == f"{seen[0].min():.3g} to {seen[0].max():.3g}"


@pytest.mark.parametrize("name", MODULES[1:])
def test_the_first_module_that_passes_on_a_gradient_which_is_not_finite_is_named(
    step: ReplayedStep, name: str
) -> None:
    """The poison is in the module: its output's gradient is still finite."""
    part = module(step, name)
    forward = part.forward
    part.forward = lambda tensor: forward(Poisoned.apply(tensor))  # type: ignore[method-assign]
    with step.watched():
        _, norm = step.run()
    assert norm != norm
    assert step.first_nonfinite_module is None
    assert step.first_nonfinite_gradient == f"transformer.{name}"
