"""Replay a skipped step to find where its gradient stops being finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Step:
    """One step of a run with all its micro-batches, on one process."""

    def __init__(self, model: Any, samples: Any, options: Any, record: dict[str, Any], dtype: Any) -> None:
        self.model, self.samples, self.options, self.record, self.dtype = model, samples, options, record, dtype
        self.first_module: str | None = None
        self.bad_samples: list[int] = []

    def run(self) -> tuple[float, float]:
        """Forward and backward as the run did. Returns the loss (nats per token) and the norm of the gradient."""
        import torch

        from minigpt.training.state import seed_step

        targets = max(1, self.samples.targets(self.record["samples"]))
        total, device = 0.0, self.model.device
        for rank in range(self.record["processes"]):
            seed_step(self.options.seed, self.record["step"], rank)
            for numbers in self._micro_batches(rank):
                batch = {name: rows.to(device) for name, rows in self.samples.__getitems__(numbers).items()}
                with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                    share = self.model(**batch, num_items_in_batch=targets, use_cache=False, skip_logits=True).loss
                share.backward()
                total += float(share.detach())
                if not torch.isfinite(share):
                    self.bad_samples += numbers
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return total, float(norm)

    def _micro_batches(self, rank: int) -> Iterator[list[int]]:
        samples, size = self.record["samples"], self.options.per_device_train_batch_size
        for first in range(rank * size, len(samples), size * self.record["processes"]):
            yield samples[first : first + size]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Remember the first module whose output is not finite."""
        import torch

        def look(name: str) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                if self.first_module is None and torch.is_tensor(tensor) and not torch.isfinite(tensor).all():
                    self.first_module = name

            return hook

        handles = [module.register_forward_hook(look(name)) for name, module in self.model.named_modules() if name]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def findings(self, tokenizer: Any) -> Iterator[str]:
        """What there is to say, a line each: weights, first module, gradients, and the texts at fault."""
        import torch

        def not_finite(tensors: dict[str, Any]) -> list[str]:
            return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]

        parameters = dict(self.model.named_parameters())
        weights = not_finite(parameters)
        gradients = not_finite({name: p.grad for name, p in parameters.items() if p.grad is not None})
        if not weights and not gradients and self.first_module is None:
            yield "all of it is finite here: what happened came from the precision, the device or the processes"
        if weights:
            yield f"weights that were not finite before the step: {', '.join(weights[:5])} ({len(weights)} in all)"
        if self.first_module is not None:
            yield f"first module whose output is not finite: {self.first_module}"
        if gradients:
            yield f"gradients that are not finite: {', '.join(gradients[:5])} ({len(gradients)} in all)"
        for number in self.bad_samples[:8]:
            ids = self.samples[number]["input_ids"].tolist()
            yield f"in the micro-batch of sample {number}: {tokenizer.decode(ids)[:100]!r}"
