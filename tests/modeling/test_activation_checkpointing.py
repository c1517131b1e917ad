"""Laws of activation checkpointing: the same gradients, and in selective mode no matrix product computed twice."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minigpt.modeling.activation_checkpointing import enable_activation_checkpointing
from modeling_minigpt import MiniGPTForCausalLM

DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")


def with_dropout(model: MiniGPTForCausalLM, dropout: dict[str, float], attention: str = "sdpa") -> MiniGPTForCausalLM:
    config = type(model.config).from_dict(model.config.to_dict() | dict.fromkeys(DROPOUTS, 0.0) | dropout)
    config._attn_implementation = attention
    twin = MiniGPTForCausalLM(config)
    twin.load_state_dict(model.state_dict())
    return twin


def gradients(model: MiniGPTForCausalLM, mode: str, mixed: bool = False) -> dict[str, torch.Tensor]:
    """The gradients of one pass over the same tokens, with the same dropout masks."""
    model.train()
    enable_activation_checkpointing(model, mode)
    ids = torch.arange(24).view(2, 12) % model.config.vocab_size
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "dropout", [{}, dict.fromkeys(DROPOUTS, 0.3), {"resid_pdrop": 0.3}], ids=["no", "all", "resid"]
)
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
def test_recomputation_changes_no_bit_of_a_gradient(
    model: MiniGPTForCausalLM, mode: str, attention: str, dropout: dict[str, float], mixed: bool
) -> None:
    twins = [with_dropout(model, dropout, attention) for _ in range(2)]
    expected, recomputed = gradients(twins[0], "no", mixed), gradients(twins[1], mode, mixed)
    for name, gradient in expected.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_selective_mode_computes_no_matrix_product_twice(model: MiniGPTForCausalLM) -> None:
    flops = {}
    for mode in ("no", "selective", "full"):
        twin = with_dropout(model, {})
        with FlopCounterMode(display=False) as counter:
            gradients(twin, mode)
        flops[mode] = counter.get_total_flops()
    assert flops["no"] == flops["selective"] < flops["full"]
