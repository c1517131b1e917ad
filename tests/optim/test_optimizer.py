"""Laws of the optimizer: which parameters decay, which are Muon's, and how far Muon moves a matrix."""

import copy

import pytest
import torch
from torch import nn

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import OptimizerArguments
from minigpt.optim.optimizer import build_optimizer
from modeling_minigpt import MiniGPTForCausalLM

CPU = torch.device("cpu")


@pytest.fixture
def model() -> MiniGPTForCausalLM:
    torch.manual_seed(0)
    return MiniGPTForCausalLM(
        MiniGPTConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8
        )
    )


def one_step(model: nn.Module, args: OptimizerArguments) -> dict[str, torch.Tensor]:
    """Every parameter after one step on a fixed batch."""
    model = copy.deepcopy(model).eval()
    optimizer = build_optimizer(model, args, CPU)
    ids = torch.arange(16).reshape(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_matrices_decay_and_vectors_do_not(model: MiniGPTForCausalLM, optimizer: str) -> None:
    without = one_step(model, OptimizerArguments(optimizer=optimizer, weight_decay=0.0, learning_rate=1e-2))
    with_decay = one_step(model, OptimizerArguments(optimizer=optimizer, weight_decay=0.5, learning_rate=1e-2))
    for name in without:
        changed = not torch.equal(without[name], with_decay[name])
        assert changed == (without[name].ndim >= 2), name


def test_every_parameter_is_in_exactly_one_group(model: MiniGPTForCausalLM) -> None:
    for optimizer in ("adamw", "muon"):
        groups = build_optimizer(model, OptimizerArguments(optimizer=optimizer), CPU).param_groups
        parameters = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(parameters) == sorted(id(parameter) for parameter in model.parameters())


def test_muon_moves_a_matrix_about_equally_in_every_direction_for_any_size_of_gradient(
    model: MiniGPTForCausalLM,
) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    build_optimizer(model, OptimizerArguments(optimizer="muon", weight_decay=0.0), CPU).step()
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            rows, columns = parameter.shape
            heads = model.config.num_attention_heads if name.endswith(("q_proj.weight", "k_proj.weight")) else 1
            distances = torch.linalg.svdvals((before[name] - parameter.detach()).view(heads, -1, columns))
            distances /= 0.02 * max(1, rows / columns) ** 0.5
            assert distances.max() < 1.25, name
            assert distances.median() > 0.6, name  # five iterations leave the smallest singular values below that


def test_muon_leaves_all_but_the_layers_matrices_to_adamw(model: MiniGPTForCausalLM) -> None:
    adamw = one_step(model, OptimizerArguments(optimizer="adamw"))
    muon = one_step(model, OptimizerArguments(optimizer="muon"))
    for name in adamw:
        is_hidden_matrix = ".layers." in name and adamw[name].ndim == 2
        assert torch.equal(adamw[name], muon[name]) == (not is_hidden_matrix), name
