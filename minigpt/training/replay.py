"""Replay a skipped step to find where its gradient stops being finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from minigpt.config.arguments import Arguments
from minigpt.data.samples import Samples
from minigpt.training.nonfinite import StepRecord
from minigpt.training.state import seed_step
from modeling_minigpt import MiniGPTForCausalLM


class ReplayedStep:
    """One step of a run, with the micro-batches of all its ranks, on one process."""

    def __init__(
        self,
        model: MiniGPTForCausalLM,
        samples: Samples,
        options: Arguments,
        record: StepRecord,
        autocast_dtype: torch.dtype,
    ) -> None:
        self.model, self.samples, self.options, self.record = model, samples, options, record
        self.autocast_dtype = autocast_dtype
        self.first_nonfinite_module: str | None = None
        self.its_input = ""  # the range of what went into that module
        self.first_nonfinite_gradient: str | None = None  # the module at whose input the gradient is not finite first
        self.nonfinite_samples: list[int] = []  # sample ids of the micro-batches whose loss is not finite

    def run(self) -> tuple[float, float]:
        """Forward and backward as in the run. Returns the loss (nats per token) and the norm of the gradient."""
        targets = max(1, self.samples.target_count(self.record.samples))
        total, device = 0.0, self.model.device
        for rank in range(self.record.processes):
            seed_step(self.options.seed, self.record.step, rank)
            for sample_ids in self._micro_batches(rank):
                batch = {name: rows.to(device) for name, rows in self.samples.__getitems__(sample_ids).items()}
                autocast = self.autocast_dtype != torch.float32
                with torch.autocast(device.type, self.autocast_dtype, enabled=autocast):
                    loss = self.model(**batch, num_items_in_batch=targets, use_cache=False, skip_logits=True).loss
                loss.backward()
                total += float(loss.detach())
                if not torch.isfinite(loss):
                    self.nonfinite_samples += sample_ids
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return total, float(norm)

    def _micro_batches(self, rank: int) -> Iterator[list[int]]:
        """The sample ids of one rank's micro-batches, in the order of the run."""
        samples, size = self.record.samples, self.options.per_device_train_batch_size
        for start in range(rank * size, len(samples), size * self.record.processes):
            yield samples[start : start + size]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, remember the first module with an output, or in the backward pass a gradient, that is not finite."""

        def forward_hook(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            if self.first_nonfinite_module is None and not all(map(_is_finite, _tensors(output))):
                self.first_nonfinite_module = name
                self.its_input = ", ".join(map(_range, _tensors(inputs))) or "nothing"

        def backward_hook(name: str, module: nn.Module, input_gradients: Any, output_gradients: Any) -> None:
            if self.first_nonfinite_gradient is None and not all(map(_is_finite, _tensors(input_gradients))):
                self.first_nonfinite_gradient = name

        handles = []
        for name, module in self.model.named_modules():
            if name:
                handles.append(module.register_forward_hook(partial(forward_hook, name)))
            # a module of modules may return what is no tensor, and ids have no gradient
            if name and not list(module.children()) and not isinstance(module, nn.Embedding):
                handles.append(module.register_full_backward_hook(partial(backward_hook, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def findings(self, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
        """One line for each finding: weights, first module, gradients, and the texts of the micro-batches."""
        parameters = dict(self.model.named_parameters())
        weights = [name for name, parameter in parameters.items() if not _is_finite(parameter)]
        gradients = [name for name, p in parameters.items() if p.grad is not None and not _is_finite(p.grad)]
        if not weights and not gradients and self.first_nonfinite_module is None:
            yield "everything is finite in this replay: the cause is the precision, the device or the number of ranks"
        if weights:
            yield f"weights that were not finite before the step: {', '.join(weights[:5])} ({len(weights)} in total)"
        if self.first_nonfinite_module is not None:
            yield f"first module whose output is not finite: {self.first_nonfinite_module}, of {self.its_input}"
        elif self.first_nonfinite_gradient is not None:
            yield (
                "all outputs are finite; the first module that passes on a gradient which is not finite: "
                f"{self.first_nonfinite_gradient}"
            )
        if gradients:
            yield f"gradients that are not finite: {', '.join(gradients[:5])} ({len(gradients)} in total)"
        for sample_id in self.nonfinite_samples[:8]:
            ids = self.samples[sample_id]["input_ids"].tolist()
            yield f"sample {sample_id}, in a micro-batch whose loss is not finite: {tokenizer.decode(ids)[:100]!r}"


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of floating-point numbers among the inputs or outputs of a module."""
    values = value if isinstance(value, tuple) else (value,)
    return [item for item in values if torch.is_tensor(item) and item.is_floating_point()]


def _range(tensor: torch.Tensor) -> str:
    """The range of the finite numbers of a tensor, and how many others there are."""
    finite = tensor[torch.isfinite(tensor)]
    others = tensor.numel() - finite.numel()
    span = f"{finite.min():.3g} to {finite.max():.3g}" if finite.numel() else "no finite number"
    return span + (f", and {others:,} of {tensor.numel():,} that are not finite" if others else "")
