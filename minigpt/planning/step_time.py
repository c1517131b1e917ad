"""Measure or estimate the time of a training step.

The time of a step is `accumulation` micro-batches and one update. Both are linear in the number of layers: a constant
part outside the layers, and a part per layer with its products and its small operations. For a GPU that is not
available here, the time is the model's arithmetic divided by a share of the GPU's peak, and the memory traffic of the
update divided by a share of its memory bandwidth.
"""

import statistics
import time
from dataclasses import dataclass

import torch

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import Arguments
from minigpt.modeling.activation_checkpointing import enable_activation_checkpointing
from minigpt.modeling.flops import train_flops_per_token
from minigpt.modeling.lora import add_adapter
from minigpt.modeling.loss import in_place_cross_entropy
from minigpt.optim.optimizer import build_optimizer
from minigpt.planning.memory import (
    TrainingSetup,
    all_parameters,
    is_attention_recomputed,
    layer_matrix_parameters,
    muon_matrices,
    trained_parameters,
)
from minigpt.utils.hardware import Gpu
from minigpt.utils.malloc import keep_freed_memory
from modeling_minigpt import MiniGPTForCausalLM

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_WHOLE_LAYERS = 4  # a model with at most this many layers is measured whole
PROBE_LAYERS = (1, 3)  # otherwise two models with so many layers are measured
WARM_UP_S, MEASURING_S = 1.0, 4.0
MIN_ROUNDS, MAX_ROUNDS = 2, 60  # of measured steps

BANDWIDTH_EFFICIENCY = 0.8  # share of a GPU's memory bandwidth that the update reaches; an assumption
SELECTIVE_OVERHEAD = 0.04  # of selective checkpointing, in addition to what has FLOPs; measured on a CPU
# AdamW reads weight, gradient and two moments and writes all but the gradient; clipping reads the gradient twice and
# writes it once. All in float32
UPDATE_BYTES_PER_PARAMETER = (4 + 3 + 3) * 4


@dataclass(frozen=True)
class StepTime:
    """Seconds of one micro-batch (forward and backward) and of one update, on one device."""

    micro_batch_s: float
    update_s: float

    def step_s(self, accumulation: int) -> float:
        """Seconds of a step with `accumulation` micro-batches."""
        return accumulation * self.micro_batch_s + self.update_s


def extrapolate(few: tuple[int, StepTime], more: tuple[int, StepTime], layers: int) -> StepTime:
    """The time with `layers` layers, linear through the times with two other numbers of layers."""
    (few_layers, few_time), (more_layers, more_time) = few, more
    factor = (layers - few_layers) / (more_layers - few_layers)

    def linear(first_s: float, second_s: float) -> float:
        return max(first_s, first_s + factor * (second_s - first_s))  # noise can make the difference negative

    return StepTime(
        linear(few_time.micro_batch_s, more_time.micro_batch_s), linear(few_time.update_s, more_time.update_s)
    )


def measure_step_time(
    args: Arguments,
    config: MiniGPTConfig,
    micro_batch: int,
    precision: str,
    device: torch.device,
    measuring_s: float = MEASURING_S,
) -> StepTime:
    """Time steps of `micro_batch` samples for about `measuring_s` seconds, on the whole model or on two small ones."""
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    layers = config.num_hidden_layers
    numbers = [layers] if layers <= MAX_WHOLE_LAYERS else list(PROBE_LAYERS)
    timers = [_StepTimer(args, config, number, micro_batch, precision, device) for number in numbers]
    times: list[list[StepTime]] = [[] for _ in timers]
    started = time.perf_counter()
    for timer in timers:
        timer.time_step()  # loads kernels, creates the optimizer's state
    while time.perf_counter() - started < WARM_UP_S:  # small models are slower while malloc's heap still grows
        for timer in timers:
            timer.time_step()
    started = time.perf_counter()
    while len(times[0]) < MIN_ROUNDS or (len(times[0]) < MAX_ROUNDS and time.perf_counter() - started < measuring_s):
        for timer, measured in zip(timers, times, strict=True):
            measured.append(timer.time_step())
    medians = [
        StepTime(
            statistics.median(step.micro_batch_s for step in measured),
            statistics.median(step.update_s for step in measured),
        )
        for measured in times
    ]
    if len(medians) == 1:
        return medians[0]
    return extrapolate((numbers[0], medians[0]), (numbers[1], medians[1]), layers)


class _StepTimer:
    """Times training steps on random tokens, of the configured model with `layers` layers."""

    def __init__(
        self,
        args: Arguments,
        config: MiniGPTConfig,
        layers: int,
        micro_batch: int,
        precision: str,
        device: torch.device,
    ) -> None:
        config = type(config).from_dict(config.to_dict() | {"num_hidden_layers": layers})
        config._attn_implementation = args.attn_implementation
        self.device, self.precision, self.max_norm = device, precision, args.max_grad_norm
        self.model = MiniGPTForCausalLM(config).train()
        self.model.to(device)
        self.model.loss_function = in_place_cross_entropy
        if args.use_peft:
            add_adapter(self.model, args)
            self.model.train()
        enable_activation_checkpointing(self.model, args.gradient_checkpointing)
        self.optimizer = build_optimizer(self.model, args, device)
        self.ids = torch.randint(config.vocab_size, (micro_batch, args.block_size), device=device)

    def time_step(self) -> StepTime:
        """The time of one step with one micro-batch."""
        started = self._now()
        dtype, is_mixed = DTYPES[self.precision], self.precision != "no"
        with torch.autocast(self.device.type, dtype, enabled=is_mixed, cache_enabled=False):
            loss = self.model(
                self.ids, shift_labels=self.ids, num_items_in_batch=self.ids.numel(), use_cache=False, skip_logits=True
            ).loss
        loss.backward()
        backward_done = self._now()
        if self.max_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepTime(backward_done - started, self._now() - backward_done)

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def flops_per_token(setup: TrainingSetup) -> float:
    """FLOPs of forward and backward for one token, by the formula of the trainer's MFU."""
    return train_flops_per_token(all_parameters(setup), setup.config, setup.block_size, trained_parameters(setup))


def recomputed_flops_per_token(setup: TrainingSetup) -> float:
    """FLOPs that activation checkpointing repeats for one token: layers in the forward pass, or their attention."""
    config = setup.config
    attention = 4 * config.num_hidden_layers * config.hidden_size * setup.block_size
    if setup.gradient_checkpointing == "full":
        return attention + 2 * config.num_hidden_layers * layer_matrix_parameters(config)
    return attention if is_attention_recomputed(setup) else 0.0


def muon_flops(config: MiniGPTConfig, ns_steps: int) -> float:
    """FLOPs of Muon's Newton-Schulz steps: two products with the Gram matrix of each matrix, and its square."""
    total = 0.0
    for (rows, columns), count in muon_matrices(config).items():
        short, long = sorted((rows, columns))
        total += count * ns_steps * (4 * short**2 * long + 2 * short**3)
    return config.num_hidden_layers * total


def estimate_step_time(gpu: Gpu, setup: TrainingSetup, efficiency: float) -> StepTime:
    """The time on a GPU that is not available, at `efficiency` of its peak; float32 counts as TF32, half as fast."""
    rate = gpu.peak_flops * efficiency
    flops = flops_per_token(setup)
    if setup.gradient_checkpointing == "selective":
        flops *= 1 + SELECTIVE_OVERHEAD
    flops += recomputed_flops_per_token(setup)
    update_s = UPDATE_BYTES_PER_PARAMETER * trained_parameters(setup) / setup.shards
    update_s /= BANDWIDTH_EFFICIENCY * gpu.bytes_per_s
    if setup.optimizer == "muon":
        update_s += (
            muon_flops(setup.config, setup.muon_ns_steps) / (setup.devices // setup.replicas) / rate
        )  # each computes a share of the matrices
    return StepTime(setup.tokens * flops / (rate if setup.is_mixed else rate / 2), update_s)
