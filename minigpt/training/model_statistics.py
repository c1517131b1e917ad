"""How large the activations, weights and updates of every layer are, by root mean square."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from minigpt.config.arguments import RunArguments
from minigpt.training.accelerator import whole_tensor
from minigpt.training.state import TrainingState


class ModelStatistics:
    """Measures every `log_stats_steps` steps.

    Such a step is slower, and keeps a copy of the weights. The activations are those of this rank.
    """

    def __init__(self, args: RunArguments, model: nn.Module, accelerator: Accelerator) -> None:
        self.every = args.log_stats_steps
        self.metrics: dict[str, float] = {}  # of the last step that was measured
        unwrapped: Any = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
        self.parameters = dict(unwrapped.named_parameters())
        self.layers = {f"layer_{number}": layer for number, layer in enumerate(unwrapped.transformer.layers)}

    @contextmanager
    def measured(self, state: TrainingState) -> Iterator[bool]:
        """Inside, a step is made. Yields whether it is measured, after which `metrics` are those of this step.

        Names: `stats/activation_rms/layer_0`, the output of a layer; `stats/weight_rms/layer_0`; and
        `stats/update_ratio/layer_0`, the update of the weights relative to their size before it.
        """
        if not self.every or (state.step + 1) % self.every:
            yield False
            return
        squares: dict[str, list[torch.Tensor]] = {name: [] for name in self.layers}
        handles = [
            layer.register_forward_hook(partial(_collect, squares[name])) for name, layer in self.layers.items()
        ]
        before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            yield True
        finally:
            for handle in handles:
                handle.remove()
        self.metrics = {
            f"stats/activation_rms/{name}": float(torch.stack(found).mean().sqrt()) for name, found in squares.items()
        }
        sums: dict[str, list[float]] = {}  # by part: how many weights, their squares, the squares of their updates
        for name, weights in before.items():
            update = self.parameters[name].detach() - weights
            layer = next((layer for layer in self.layers if f".layers.{layer.removeprefix('layer_')}." in name), None)
            of_part = sums.setdefault(layer or name.rsplit(".", 1)[0], [0.0, 0.0, 0.0])
            of_part[0] += weights.numel()
            of_part[1] += float(whole_tensor(weights.square().sum()))
            of_part[2] += float(whole_tensor(update.square().sum()))
        for part, (numbers, weight_squares, update_squares) in sums.items():
            self.metrics[f"stats/weight_rms/{part}"] = (weight_squares / numbers) ** 0.5
            if weight_squares:
                self.metrics[f"stats/update_ratio/{part}"] = (update_squares / weight_squares) ** 0.5


def _collect(squares: list[torch.Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook that adds the mean square of the hidden states."""
    hidden = output[0] if isinstance(output, tuple) else output
    squares.append(hidden.detach().float().square().mean())
