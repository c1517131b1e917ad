"""Plan a run: its memory, time and steps before it starts."""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import Arguments
from minigpt.data.corpora import open_corpus
from minigpt.data.datamodule import steps_of_run
from minigpt.data.prepare import make_tokenizer
from minigpt.data.samplers import BlockOrder
from minigpt.data.shards import open_shards
from minigpt.data.tokenizer import load_tokenizer
from minigpt.planning.memory import (
    RUNTIME_BYTES,
    TrainingSetup,
    largest_that_fits,
    parameters,
    peak_bytes,
    peak_phase,
)
from minigpt.planning.step_time import StepTime, estimate_step_time, flops_per_token, measure_step_time
from minigpt.training.overview import PRECISION_NAMES
from minigpt.training.setup import build_config
from minigpt.utils.errors import UserError
from minigpt.utils.formatting import format_flops, format_seconds
from minigpt.utils.hardware import PEAK_FLOPS, peak_memory_gib

GIB = 2**30


@dataclass(frozen=True)
class RunPlan:
    """Estimated memory and time of a run on each of its devices.

    `proposal` is the same run with the largest micro-batch that fits, if a limit was given. `steps` is None if
    it is only known after tokenizing, `time` is None if it was not measured.
    """

    setup: TrainingSetup
    proposal: TrainingSetup | None
    steps: int | None
    precision: str
    device: str
    time: StepTime | None
    time_from: str

    def as_dict(self) -> dict[str, Any]:
        """The figures, in GiB and seconds."""
        setup = self.setup
        phase, parts = peak_phase(setup)
        step_s = self.time.step_s(setup.accumulation) if self.time else None
        figures: dict[str, Any] = {
            "parameters": parameters(setup.config),
            "tokens_per_step": setup.tokens * setup.accumulation * setup.devices,
            "steps": self.steps,
            "flops_per_token": flops_per_token(setup.config, setup.block_size),
            "device": self.device,
            "devices": setup.devices,
            "precision": self.precision,
            "memory_gib": {name: size / GIB for name, size in parts.items() if size},
            "peak_gib": peak_bytes(setup) / GIB,
            "peak_at": phase,
            "step_s": step_s,
            "run_s": step_s * self.steps if step_s is not None and self.steps else None,
            "time_from": self.time_from,
        }
        if self.proposal is not None:
            figures["proposal"] = {
                "per_device_train_batch_size": self.proposal.micro_batch,
                "gradient_accumulation_steps": self.proposal.accumulation,
                "peak_gib": peak_bytes(self.proposal) / GIB,
            }
        return figures

    def as_table(self) -> str:
        """The figures as lines of text."""
        figures, setup = self.as_dict(), self.setup
        unknown_steps = "known after tokenizing; give --max_steps, or prepared shards with --data"
        lines = [
            f"  parameters       {figures['parameters']:,}",
            f"  tokens per step  {figures['tokens_per_step']:,} = {setup.micro_batch} samples x "
            f"{setup.accumulation} micro-batches x {setup.devices} device(s) x {setup.block_size} tokens",
            f"  steps            {format(figures['steps'], ',') if figures['steps'] else unknown_steps}",
            f"  device           {setup.devices} x {self.device}, {PRECISION_NAMES[self.precision]}",
            "",
            f"  peak memory per device, GiB; reached in the phase: {figures['peak_at']}",
            *(f"    {name:<26}{size:>9.3f}" for name, size in figures["memory_gib"].items()),
            f"    {'sum':<26}{figures['peak_gib']:>9.3f}",
            "",
        ]
        if figures["step_s"] is not None:
            rate = figures["tokens_per_step"] / figures["step_s"]
            achieved = figures["flops_per_token"] * rate / setup.devices
            lines += [
                f"  time per step    {format_seconds(figures['step_s'])}, {rate:,.0f} tokens/s ({self.time_from})",
                f"  arithmetic       {figures['flops_per_token'] / 1e6:,.1f} MFLOP per token, "
                f"{format_flops(achieved)} per device",
            ]
        if figures["run_s"] is not None:
            lines.append(f"  time of the run  {format_seconds(figures['run_s'])}, without evaluation and saving")
        if self.proposal is not None:
            lines.append(
                f"  largest to fit   --per_device_train_batch_size {self.proposal.micro_batch} "
                f"--gradient_accumulation_steps {self.proposal.accumulation}  "
                f"({figures['proposal']['peak_gib']:.3f} GiB)"
            )
        return "\n".join(lines).rstrip()


def plan_run(
    args: Arguments,
    *,
    devices: int = 1,
    fsdp: bool = False,
    memory_gib: float | None = None,
    device: str | None = None,
    efficiency: float = 0.4,
    probe: bool = True,
) -> RunPlan:
    """Plan the run of `args` on `devices` devices, with FSDP2 if `fsdp`, otherwise with DDP.

    memory_gib: memory of one device, for which the largest micro-batch that fits is proposed.
    device: cpu, cuda or a name in `PEAK_FLOPS`; None is the device of this machine.
    efficiency: the share of its peak that an absent GPU is assumed to reach.
    probe: whether to measure the time on a device that is available.

    Raises UserError if the device is unknown, the model cannot be built, or no micro-batch fits into the memory.
    """
    available = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
    device = device or available
    if device not in ("cpu", available, *PEAK_FLOPS):
        raise UserError(f"device={device} is not available and not one of {', '.join(PEAK_FLOPS)}")
    kind = "cpu" if device == "cpu" else "cuda"
    precision = args.mixed_precision or ("no" if kind == "cpu" else "bf16")  # as the launch profiles have it
    config = planned_config(args)
    setup = TrainingSetup(
        config=config,
        block_size=args.block_size,
        micro_batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        eval_batch=args.eval_batch_size,
        compute_bytes=4 if precision == "no" else 2,
        optimizer=args.optimizer,
        attention=args.attn_implementation,
        document_attention=args.document_attention or args.packing_strategy.startswith("bfd"),
        gradient_checkpointing=args.gradient_checkpointing,
        device=kind,
        devices=devices,
        sharded=fsdp,
        process_bytes=_process_bytes() if kind == "cpu" else 0.0,
    )
    proposal = largest_that_fits(setup, memory_gib * GIB) if memory_gib is not None else None
    time: StepTime | None = None
    time_from = "not measured"
    if probe and device in PEAK_FLOPS:
        time_from = f"{efficiency:.0%} of the data sheet's peak"
        time = estimate_step_time(
            device, config, args.block_size, setup.micro_batch, is_mixed=setup.is_mixed, efficiency=efficiency
        )
    elif probe:
        time_from = "measured on this machine"
        print("measuring the time of a step (--no_probe skips this) ...", file=sys.stderr, flush=True)
        time = measure_step_time(args, config, setup.micro_batch, precision, torch.device(device))
    return RunPlan(setup, proposal, planned_steps(args, devices), precision, device, time, time_from)


def planned_config(args: Arguments) -> MiniGPTConfig:
    """The configuration of the model that the trainer would build, except for the ids of special tokens.

    Raises UserError if the shape is impossible, the model or tokenizer cannot be found, or block_size is too long.
    """
    has_vocab_size = args.model_name_or_path is not None or args.vocab_size is not None
    config = build_config(args, vocab_size=0 if has_vocab_size else _tokenizer_size(args))
    if args.block_size > config.max_position_embeddings:
        raise UserError(
            f"block_size={args.block_size} is longer than the position table; "
            f"try its max_position_embeddings, block_size={config.max_position_embeddings}"
        )
    return config


def planned_steps(args: Arguments, devices: int) -> int | None:
    """Steps of the whole run; None if the text has to be tokenized or packed to know them."""
    if args.max_steps is not None:
        return args.max_steps
    if args.data is None or args.packing_strategy != "wrapped":
        return None
    tokens = [len(open_shards(folder).train) for folder in args.data]
    samples = sum(BlockOrder(number, args.block_size, args.seed, args.stride).samples_per_epoch for number in tokens)
    return steps_of_run(args, samples, devices)


def _tokenizer_size(args: Arguments) -> int:
    """Number of ids of the run's tokenizer, also of one that is not trained yet.

    A trained 'bpe' counts as `tokenizer_vocab_size`; a very short text may give fewer ids.
    """
    if args.data is not None:
        shards = open_shards(args.data[0])
        named = None if args.tokenizer in ("bpe", "char") else args.tokenizer
        tokenizer = named or shards.tokenizer_dir
        if tokenizer is not None:
            return len(load_tokenizer(tokenizer))
        if shards.vocab_size is None:
            raise UserError(f"data={args.data[0]} has no vocabulary size; give --vocab_size or --tokenizer")
        return shards.vocab_size
    if args.tokenizer in (None, "bpe"):
        return args.tokenizer_vocab_size
    if args.tokenizer == "char":
        return len(make_tokenizer(args, open_corpus(args)))
    return len(load_tokenizer(args.tokenizer))


def _process_bytes() -> float:
    """Size of a training process on a CPU before it has a model: this one, with what only the trainer imports."""
    import torch.utils.tensorboard

    return peak_memory_gib(torch.device("cpu")) * GIB + RUNTIME_BYTES
