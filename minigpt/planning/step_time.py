"""Measure or estimate the time of a training step.

The time of a step is `accumulation` micro-batches and one update, and both are straight lines in the number of layers:
what one layer more costs (its products, and what every small operation costs besides), and all that is outside the
layers. For a GPU that is not here: the arithmetic of the model over a share of the maker's figure.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from minigpt.config.arguments import Arguments
from minigpt.modeling.activation_checkpointing import enable_activation_checkpointing
from minigpt.modeling.flops import train_flops_per_token
from minigpt.modeling.loss import in_place_cross_entropy
from minigpt.optim.optimizer import build_optimizer
from minigpt.planning.memory import parameters
from minigpt.utils.hardware import PEAK_FLOPS
from minigpt.utils.malloc import keep_freed_memory
from modeling_minigpt import MiniGPTForCausalLM

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

WHOLE_LAYERS = 4  # a model of so many layers runs as it is

FEW_LAYERS = 3

WARM_UP_S, BUDGET_S = 1.0, 4.0  # for the first turns, which do not count, and for those that do

TURNS = (2, 60)  # that count, at least and at most


@dataclass(frozen=True)
class StepTime:
    """Seconds of one micro-batch (forward and backward) and of one update, on one device."""

    micro_batch_s: float
    update_s: float

    def step_s(self, accumulation: int) -> float:
        return accumulation * self.micro_batch_s + self.update_s


def line(few: tuple[int, StepTime], more: tuple[int, StepTime], layers: int) -> StepTime:
    """The times at `layers`, on the straight lines through those at two other numbers of layers."""
    (low, at_low), (high, at_high) = few, more
    share = (layers - low) / (high - low)

    def at(first: float, second: float) -> float:
        return max(first, first + share * (second - first))  # noise may make a small layer's time negative

    return StepTime(at(at_low.micro_batch_s, at_high.micro_batch_s), at(at_low.update_s, at_high.update_s))


def measured(args: Arguments, config: Any, micro_batch: int, precision: str, device: torch.device) -> StepTime:
    """Run steps of `micro_batch` samples of `block_size` tokens of one model, or of two small ones in turns."""
    if device.type == "cpu":
        keep_freed_memory()
    layers = config.num_hidden_layers
    numbers = [layers] if layers <= WHOLE_LAYERS else [1, FEW_LAYERS]
    steppers = [_Stepper(args, config, number, micro_batch, precision, device) for number in numbers]
    turns: list[list[StepTime]] = [[] for _ in steppers]
    started = time.perf_counter()
    for stepper in steppers:
        stepper.take()  # compiles kernels, makes the optimizer's state
    while time.perf_counter() - started < WARM_UP_S:  # small models are slower while malloc's heap still grows
        for stepper in steppers:
            stepper.take()
    started = time.perf_counter()
    least, most = TURNS
    while len(turns[0]) < least or (len(turns[0]) < most and time.perf_counter() - started < BUDGET_S):
        for stepper, times in zip(steppers, turns, strict=True):
            times.append(stepper.take())
    medians = [
        StepTime(statistics.median(t.micro_batch_s for t in times), statistics.median(t.update_s for t in times))
        for times in turns
    ]
    if len(medians) == 1:
        return medians[0]
    return line((numbers[0], medians[0]), (numbers[1], medians[1]), layers)


class _Stepper:
    """Training steps of a model with `layers` layers, on random tokens."""

    def __init__(
        self, args: Arguments, config: Any, layers: int, micro_batch: int, precision: str, device: torch.device
    ) -> None:
        config = type(config).from_dict(config.to_dict() | {"num_hidden_layers": layers})
        config._attn_implementation = args.attn_implementation
        self.device, self.precision, self.max_norm = device, precision, args.max_grad_norm
        self.model = MiniGPTForCausalLM(config).to(device).train()
        self.model.loss_function = in_place_cross_entropy
        enable_activation_checkpointing(self.model, args.gradient_checkpointing)
        self.optimizer = build_optimizer(self.model, args, device)
        self.ids = torch.randint(config.vocab_size, (micro_batch, args.block_size), device=device)

    def take(self) -> StepTime:
        """One step of one micro-batch."""
        began = self._now()
        dtype, mixed = DTYPES[self.precision], self.precision != "no"
        with torch.autocast(self.device.type, dtype, enabled=mixed, cache_enabled=False):
            loss = self.model(
                self.ids, shift_labels=self.ids, num_items_in_batch=self.ids.numel(), use_cache=False, skip_logits=True
            ).loss
        loss.backward()
        between = self._now()
        if self.max_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepTime(between - began, self._now() - between)

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def flops_per_token(config: Any, block_size: int) -> float:
    """Forward and backward, by the formula that the trainer's MFU uses."""
    return train_flops_per_token(parameters(config), config, block_size)


def from_data_sheet(name: str, config: Any, args: Arguments, micro_batch: int, mixed: bool, share: float) -> StepTime:
    """The time on a GPU that is not here, at `share` of its peak; float32 counts as TF32, half as fast."""
    peak = PEAK_FLOPS[name] * share * (1.0 if mixed else 0.5)
    return StepTime(micro_batch * args.block_size * flops_per_token(config, args.block_size) / peak, 0.0)
