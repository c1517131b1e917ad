"""Laws of the loss that leaves its gradient in the place of the logits."""

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from minigpt.modeling import loss as loss_module


def gradients(loss_function: object, logits: Tensor, targets: Tensor, **kwargs: float) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of three times the loss by what the logits are made of."""
    source = logits.clone().requires_grad_()
    loss = loss_function(source * 1, None, logits.shape[-1], shift_labels=targets, **kwargs)  # type: ignore[operator]
    (3 * loss).backward()
    assert source.grad is not None
    return loss.detach(), source.grad


@pytest.mark.parametrize("chunk_numbers", [1, 40, 1 << 20])
def test_loss_and_gradient_equal_those_of_transformers(monkeypatch: pytest.MonkeyPatch, chunk_numbers: int) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_NUMBERS", chunk_numbers)
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 7, 13) * 3, torch.randint(13, (2, 7))
    targets[0, 2:5] = -100
    ours, our_gradient = gradients(loss_module.in_place_cross_entropy, logits, targets, num_items_in_batch=11.0)
    theirs, their_gradient = gradients(ForCausalLMLoss, logits, targets, num_items_in_batch=11.0)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-6, rtol=0)


def test_without_a_gradient_the_logits_stay_as_they_are() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 5, 13), torch.randint(13, (1, 5))
    before = logits.clone()
    with torch.inference_mode():
        loss_module.in_place_cross_entropy(logits, None, 13, num_items_in_batch=1, shift_labels=targets)
    assert torch.equal(logits, before)


def test_nothing_as_large_as_the_logits_is_kept() -> None:
    logits = torch.zeros(1, 64, 1000, requires_grad=True)
    copy, held = logits * 1, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        loss = loss_module.in_place_cross_entropy(
            copy, None, 1000, num_items_in_batch=64, shift_labels=torch.zeros(1, 64).long()
        )
    assert sum(held) < 1000
    loss_node = loss.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    assert loss_node.gradient.data_ptr() == copy.data_ptr()
    loss.backward()
    assert loss_node.gradient is None  # also where the loss itself is held on to
