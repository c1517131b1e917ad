"""Laws of in-place cross-entropy: the loss and gradient of transformers, from a fraction of the memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from minigpt.modeling import loss as loss_module
from minigpt.modeling.loss import (
    IGNORE_INDEX,
    chunked_loss_sum,
    compiled_loss_sum,
    fused_loss_sum,
    in_place_cross_entropy,
)

LossFunction = Callable[..., Tensor]


def loss_and_gradient(
    loss_function: LossFunction, logits: Tensor, targets: Tensor, count: float
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of three times the loss with respect to a copy of the logits."""
    source = logits.clone().requires_grad_()
    loss = loss_function(source * 1, None, logits.shape[-1], shift_labels=targets, num_items_in_batch=count)
    (3 * loss).backward()
    assert source.grad is not None
    return loss.detach(), source.grad


@pytest.mark.parametrize("chunk_elements", [1, 40, 1 << 20])
def test_loss_and_gradient_equal_those_of_transformers(monkeypatch: pytest.MonkeyPatch, chunk_elements: int) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 7, 13) * 3, torch.randint(13, (2, 7))
    targets[0, 2:5] = -100
    loss, gradient = loss_and_gradient(in_place_cross_entropy, logits, targets, 11.0)
    expected_loss, expected_gradient = loss_and_gradient(ForCausalLMLoss, logits, targets, 11.0)
    # float32 sums in another order
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=0)


def test_logits_without_a_gradient_are_not_changed() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 5, 13), torch.randint(13, (1, 5))
    before = logits.clone()
    with torch.inference_mode():
        in_place_cross_entropy(logits, None, 13, num_items_in_batch=1, shift_labels=targets)
    assert torch.equal(logits, before)


def allocated_bytes(loss_function: LossFunction, trace_file: Path) -> tuple[int, int]:
    """Memory allocated by a linear head, its loss and the backward pass: the peak, and what the loss still holds."""
    torch.manual_seed(0)
    hidden_states, head = torch.randn(1, 256, 8), torch.nn.Linear(8, 5000, bias=False)
    targets = torch.randint(5000, (1, 256))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = loss_function(head(hidden_states), None, 5000, shift_labels=targets, num_items_in_batch=256)
        loss.backward()
        torch.zeros(1)  # an allocation whose record shows what is held while the loss still exists
    profile.export_chrome_trace(str(trace_file))
    events = json.loads(trace_file.read_text(encoding="utf-8"))["traceEvents"]
    memory_events = sorted(
        ((event["ts"], event["args"]) for event in events if event.get("name") == "[memory]"), key=lambda pair: pair[0]
    )
    before = memory_events[0][1]["Total Allocated"] - memory_events[0][1]["Bytes"]
    totals = [values["Total Allocated"] - before for _, values in memory_events]
    return max(totals), totals[-1]


def test_memory_is_that_of_the_logits_and_is_free_after_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 8 * 5000)
    logits_bytes = 256 * 5000 * 4
    peak, after_backward = allocated_bytes(in_place_cross_entropy, tmp_path / "in_place.json")
    assert peak < 1.25 * logits_bytes  # the logits, a few rows of 8 / 256, and gradients of the tiny head
    assert after_backward < 0.25 * logits_bytes
    usual_peak, _ = allocated_bytes(ForCausalLMLoss, tmp_path / "usual.json")
    assert usual_peak > 2.5 * logits_bytes  # the usual loss is far above the bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overwrite", [True, False])
def test_the_loss_for_gpus_equals_the_one_in_chunks(dtype: torch.dtype, overwrite: bool) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(60, 500)).to(dtype)
    targets = torch.randint(500, (60,))
    targets[::7] = IGNORE_INDEX
    logits[0] = torch.inf  # of an ignored target
    expected, fused, compiled = logits.clone(), logits.clone(), logits.clone()
    loss = chunked_loss_sum(expected, targets, overwrite)
    for copy, function in ((fused, fused_loss_sum), (compiled, torch.compile(fused_loss_sum, backend="aot_eager"))):
        assert function(copy, targets, overwrite).item() == pytest.approx(loss.item(), rel=1e-6)
        assert torch.allclose(
            copy[1:].float(), expected[1:].float(), rtol=0, atol=1e-6 if dtype.itemsize == 4 else 4e-3
        )
    assert torch.equal(expected, logits) != overwrite


@pytest.mark.slow  # the compiler takes ten seconds
def test_the_compiler_makes_few_kernels_of_the_loss_for_all_rows() -> None:
    from torch._inductor import metrics

    logits, targets = torch.randn(3000, 5000), torch.randint(5000, (3000,))
    metrics.reset()
    loss = compiled_loss_sum()(logits.clone(), targets, True)
    assert loss.item() == pytest.approx(chunked_loss_sum(logits, targets, True).item(), rel=1e-6)
    assert metrics.generated_kernel_count <= 6
