"""Replay a skipped step to find where its gradient stops being finite."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        """Inside, remember the first module with an output that is not finite."""

        def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                if self.first_nonfinite_module is None and torch.is_tensor(tensor) and not _is_finite(tensor):
                    self.first_nonfinite_module = name

            return hook

        handles = [module.register_forward_hook(hook_of(name)) for name, module in self.model.named_modules() if name]
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
            yield f"first module whose output is not finite: {self.first_nonfinite_module}"
        if gradients:
            yield f"gradients that are not finite: {', '.join(gradients[:5])} ({len(gradients)} in total)"
        for sample_id in self.nonfinite_samples[:8]:
            ids = self.samples[sample_id]["input_ids"].tolist()
            yield f"sample {sample_id}, in a micro-batch whose loss is not finite: {tokenizer.decode(ids)[:100]!r}"


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
