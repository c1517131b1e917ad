"""Plan a run: its memory, time and steps before it starts."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from minigpt.modeling.lora import check_modules
from minigpt.planning.communication import LINK_EFFICIENCY, OVERLAP, exposed_s
from minigpt.planning.memory import (
    FLOAT32,
    RUNTIME_BYTES,
    Adapter,
    TrainingSetup,
    all_parameters,
    largest_that_fits,
    module_widths,
    peak_bytes,
    peak_phase,
    tensor_bytes,
    too_little_memory,
    trained_parameters,
    variants,
)
from minigpt.planning.save_interval import NODE_MTBF_HOURS, SaveInterval, best_interval
from minigpt.planning.step_time import StepTime, estimate_step_time, flops_per_token, measure_step_time
from minigpt.planning.target_hardware import GPU_MARGIN, Hardware, find_hardware, which_gpu
from minigpt.training.overview import PRECISION_NAMES
from minigpt.training.setup import build_config
from minigpt.utils.errors import UserError
from minigpt.utils.formatting import format_flops, format_seconds
from minigpt.utils.hardware import peak_memory_gib

GIB = 2**30
ABOUT_AS_FAST = 1.03  # times of a step that differ by less are equal, for an estimate


@dataclass(frozen=True)
class Timing:
    """The time of a step: that of its computing, and the time in which its devices only communicate."""

    computing: StepTime
    accumulation: int
    exposed_s: float = 0.0

    @property
    def step_s(self) -> float:
        return self.computing.step_s(self.accumulation) + self.exposed_s

    @property
    def efficiency(self) -> float:
        """Tokens per second and device, relative to a run without communication."""
        return self.computing.step_s(self.accumulation) / self.step_s


@dataclass(frozen=True)
class Candidate:
    """A setup that fits into the memory, and its time if it can be estimated."""

    setup: TrainingSetup
    timing: Timing | None

    def as_dict(self) -> dict[str, Any]:
        """The options that give this setup, its memory and its time."""
        return {
            "parallelism": self.setup.parallelism,
            "gradient_checkpointing": self.setup.gradient_checkpointing,
            "per_device_train_batch_size": self.setup.micro_batch,
            "gradient_accumulation_steps": self.setup.accumulation,
            "peak_gib": peak_bytes(self.setup) / GIB,
            "step_s": self.timing.step_s if self.timing else None,
        }


@dataclass(frozen=True)
class RunPlan:
    """Estimated memory and time of a run on each of its devices.

    `candidates` are the variants of the run that fit into the memory, each with its largest micro-batch; `proposal`
    is the fastest of them, or about as fast. `steps` is None if it is only known after tokenizing, `timing` is None
    if it was not measured. `words` are the run's words on the command line.
    """

    setup: TrainingSetup
    candidates: Sequence[Candidate]
    proposal: Candidate | None
    steps: int | None
    precision: str
    hardware: Hardware
    timing: Timing | None
    time_from: str
    efficiency: float
    words: Sequence[str]
    saving: SaveInterval | None = None

    def as_dict(self) -> dict[str, Any]:
        """The figures, in GiB and seconds."""
        setup, timing = self.setup, self.timing
        phase, parts = peak_phase(setup)
        step_s = timing.step_s if timing else None
        limit = self.hardware.memory_bytes
        figures: dict[str, Any] = {
            "parameters": all_parameters(setup),
            "trained_parameters": trained_parameters(setup),
            "tokens_per_step": setup.tokens * setup.accumulation * setup.devices,
            "steps": self.steps,
            "flops_per_token": flops_per_token(setup),
            "device": self.hardware.device,
            "devices": setup.devices,
            "parallelism": setup.parallelism,
            "precision": self.precision,
            "memory_gib": {name: size / GIB for name, size in parts.items() if size},
            "peak_gib": peak_bytes(setup) / GIB,
            "peak_at": phase,
            "tensors_gib": tensor_bytes(parts) / GIB,
            "limit_gib": limit / GIB if limit is not None else None,
            "step_s": step_s,
            "communication_s": timing.exposed_s if timing else None,
            "scaling_efficiency": timing.efficiency if timing else None,
            "run_s": step_s * self.steps if step_s is not None and self.steps else None,
            "time_from": self.time_from,
        }
        if self.saving is not None:
            figures["saving"] = self.saving.as_dict()
        if self.proposal is not None:
            figures["candidates"] = [candidate.as_dict() for candidate in self.candidates]
            figures["proposal"] = self.proposal.as_dict() | {"command": self.command(self.proposal.setup)}
        return figures

    def as_table(self) -> str:
        """The figures as lines of text."""
        figures, setup = self.as_dict(), self.setup
        unknown_steps = "known after tokenizing; give --max_steps, or prepared shards with --data"
        device, *connection = self.hardware.describe(setup.devices)
        parallel = f", {setup.parallelism}" if setup.devices > 1 else ""
        lines = [
            f"  parameters       {figures['parameters']:,}{self._trained_share()}",
            f"  tokens per step  {figures['tokens_per_step']:,} = {setup.micro_batch} samples x "
            f"{setup.accumulation} micro-batches x {setup.devices} device(s) x {setup.block_size} tokens",
            f"  steps            {format(figures['steps'], ',') if figures['steps'] else unknown_steps}",
            f"  device           {device}",
            *(f"  connection       {line}" for line in connection),
            f"  run as           {PRECISION_NAMES[self.precision]}{parallel}, "
            f"gradient_checkpointing={setup.gradient_checkpointing}",
            "",
            f"  peak memory per device, GiB; reached in the phase: {figures['peak_at']}",
            *(f"    {name:<26}{size:>9.3f}" for name, size in figures["memory_gib"].items()),
            f"    {'sum':<26}{figures['peak_gib']:>9.3f}",
        ]
        if setup.device == "cuda":
            lines.append(f"    {'of which PyTorch counts':<26}{figures['tensors_gib']:>9.3f}")
        lines.append("")
        if self.timing is not None:
            rate = figures["tokens_per_step"] / figures["step_s"]
            achieved = figures["flops_per_token"] * rate / setup.devices
            lines.append(
                f"  time per step    {format_seconds(figures['step_s'])}, {rate:,.0f} tokens/s ({self.time_from})"
            )
            if self.hardware.cluster is not None and setup.devices > 1:
                lines.append(
                    f"  communication    {format_seconds(self.timing.exposed_s)} of these; scaling efficiency "
                    f"{self.timing.efficiency:.1%}"
                )
            lines.append(
                f"  arithmetic       {figures['flops_per_token'] / 1e6:,.1f} MFLOP per token, "
                f"{format_flops(achieved)} per device"
            )
        if figures["run_s"] is not None:
            lines.append(f"  time of the run  {format_seconds(figures['run_s'])}, without evaluation and saving")
        if self.saving is not None:
            size, best = self.saving.lines()
            lines += [f"  checkpoint       {size}", f"                   {best}"]
        lines += [*self._proposal_lines(), *self._assumptions()]
        return "\n".join(lines).rstrip()

    def _trained_share(self) -> str:
        if self.setup.adapter is None:
            return ""
        trained = trained_parameters(self.setup)
        return f", of which {trained:,} are trained ({trained / all_parameters(self.setup):.2%})"

    def command(self, setup: TrainingSetup) -> str:
        """The command line that trains with the micro-batch, checkpointing and sharding of `setup`."""
        cluster = self.hardware.cluster
        nodes = cluster.nodes if cluster else 1
        if setup.device == "cpu":
            profile = "cpu" if setup.devices == 1 else "cpu_ddp"
        elif setup.sharded:
            profile = setup.parallelism.lower()
        else:
            profile = "single_gpu" if setup.devices == 1 else "multi_gpu" if nodes == 1 else "multi_node"
        words = ["minigpt", "train", *self.words, "--profile", profile]
        words += ["--num_processes", str(setup.devices)] if setup.devices > 1 else []
        words += ["--num_machines", str(nodes), "--machine_rank", "R"] if nodes > 1 else []
        words += ["--main_process_ip", "ADDRESS_OF_RANK_0"] if nodes > 1 else []
        if setup.replicas > 1:
            words += ["--parallelism_config_dp_replicate_size", str(setup.replicas)]
            words += ["--parallelism_config_dp_shard_size", str(setup.shards)]
        words += ["--per_device_train_batch_size", str(setup.micro_batch)]
        words += ["--gradient_accumulation_steps", str(setup.accumulation)]
        words += ["--gradient_checkpointing", setup.gradient_checkpointing]
        return shlex.join(words)

    def _proposal_lines(self) -> list[str]:
        limit = self.hardware.memory_bytes
        if limit is None:
            return []
        if self.proposal is None:
            return ["", "  nothing fits     " + too_little_memory(self._all_variants(), limit)]
        lines = [
            "",
            f"  what fits into {limit / GIB:.1f} GiB with the same global batch (* proposed)",
            "      parallel  checkpointing  micro-batch  accumulation  peak GiB  time per step",
        ]
        for candidate in self.candidates:
            same, mark = candidate.setup, "*" if candidate is self.proposal else " "
            time = format_seconds(candidate.timing.step_s) if candidate.timing else "?"
            lines.append(
                f"    {mark} {same.parallelism:<8}  {same.gradient_checkpointing:<13}  {same.micro_batch:>11}  "
                f"{same.accumulation:>12}  {peak_bytes(same) / GIB:>8.3f}  {time:>13}"
            )
        return [*lines, "", f"  {self.command(self.proposal.setup)}"]

    def _all_variants(self) -> list[TrainingSetup]:
        return variants(_parallelisms(self.setup, self.hardware))

    def _assumptions(self) -> list[str]:
        if self.hardware.gpu is None:
            return []
        lines = [f"times that are not measured: {self.efficiency:.0%} of the peak, for each micro-batch"]
        if self.setup.devices > 1:
            lines += [
                f"communication: a ring at {LINK_EFFICIENCY:.0%} of the slowest link, "
                f"hidden behind up to {OVERLAP:.0%} of the computing",
                "scaling efficiency: relative to the same work per device without communication",
            ]
        lines.append(f"proposals leave {GPU_MARGIN:.0%} of the memory free; see docs/plan.md")
        return ["", *(f"  {'assumptions' * (number == 0):<17}{line}" for number, line in enumerate(lines))]


def plan_run(
    args: Arguments,
    *,
    devices: int = 1,
    fsdp: bool = False,
    hsdp: bool = False,
    memory_gib: float | None = None,
    device: str | None = None,
    devices_per_node: int = 8,
    link: str | None = None,
    network: str | None = None,
    efficiency: float = 0.4,
    disk_gb_per_s: float | None = None,
    node_mtbf_hours: float = NODE_MTBF_HOURS,
    probe: bool = True,
    words: Sequence[str] = (),
) -> RunPlan:
    """Plan the run of `args` on `devices` devices: with FSDP2 if `fsdp`, in each node alone if `hsdp`, else with DDP.

    memory_gib: memory of one device, for which the largest micro-batch that fits is proposed; None is that of the GPU.
    device: cpu, cuda or a name of an absent GPU that `find_gpu` knows; None is the device of this machine.
    link: what connects the GPUs of a node, a name in `LINKS`; None is what the GPU usually has.
    network: Gbit/s from each node, as 100 or 8x400; None is what machines with that link usually have.
    efficiency: the share of its peak that an absent GPU is assumed to reach.
    disk_gb_per_s, node_mtbf_hours: for the best time between checkpoints, see `best_interval`; None leaves it out.
    probe: whether to measure the time on a device that is available.
    words: the run's words on the command line, which the proposed command repeats.

    Raises UserError if the device is unknown or a GPU is meant but not named, the model cannot be built, or nothing
    fits into `memory_gib`.
    """
    present = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
    means_gpus = devices > 1 or fsdp or hsdp or memory_gib is not None or link is not None or network is not None
    if device is None and present == "cpu" and means_gpus and not args.use_cpu:
        raise UserError(which_gpu(memory_gib))
    hardware = find_hardware(device or present, present, devices, devices_per_node, link, network, memory_gib)
    kind = "cpu" if hardware.device == "cpu" else "cuda"
    if (fsdp or hsdp) and kind == "cpu":
        raise UserError(f"{'hsdp' if hsdp else 'fsdp'} needs GPUs; name one with --device")
    replicas = devices // devices_per_node if hsdp else 1
    if hsdp and (replicas == 1 or devices % devices_per_node):
        raise UserError(
            f"hsdp shards within each of several nodes: devices={devices} must be two or more times "
            f"devices_per_node={devices_per_node}"
        )
    precision = args.mixed_precision or ("no" if kind == "cpu" else "bf16")  # as the launch profiles have it
    config = planned_config(args)
    setup = training_setup(args, config, precision, kind, devices, fsdp or hsdp, replicas)
    gradient_bytes = FLOAT32 if args.ddp_comm_hook == "no" else 2

    def estimate(same: TrainingSetup, computing: StepTime | None = None) -> Timing | None:
        if computing is None:
            if hardware.gpu is None:
                return None
            computing = estimate_step_time(hardware.gpu, same, efficiency)
        waiting_s = 0.0
        if hardware.cluster is not None:
            waiting_s = exposed_s(same, hardware.cluster, computing.micro_batch_s, gradient_bytes)
        return Timing(computing, same.accumulation, waiting_s)

    limit = hardware.memory_bytes
    candidates: list[Candidate] = []
    if limit is not None:
        all_variants = variants(_parallelisms(setup, hardware))
        fitting = [same for variant in all_variants if (same := largest_that_fits(variant, limit)) is not None]
        candidates = [Candidate(same, estimate(same)) for same in fitting]
        if not candidates and memory_gib is not None:
            raise UserError(too_little_memory(all_variants, limit))
    timing, time_from = None, "not measured"
    if device is not None and hardware.gpu is not None:
        timing, time_from = estimate(setup), f"{efficiency:.0%} of the data sheet's peak"
    elif probe and (limit is None or peak_bytes(setup) <= limit):
        time_from = "measured on this machine"
        print("measuring the time of a step (--no_probe skips this) ...", file=sys.stderr, flush=True)
        measured = measure_step_time(args, config, setup.micro_batch, precision, torch.device(kind))
        timing = estimate(setup, measured)
    saving = None
    if disk_gb_per_s is not None and timing is not None:
        nodes = hardware.cluster.nodes if hardware.cluster is not None else 1
        saving = best_interval(setup, timing.step_s, nodes, disk_gb_per_s, node_mtbf_hours)
    return RunPlan(
        setup=setup,
        candidates=candidates,
        proposal=_best(candidates),
        steps=planned_steps(args, devices, timing.step_s if timing else None),
        precision=precision,
        hardware=hardware,
        timing=timing,
        time_from=time_from,
        efficiency=efficiency,
        words=words,
        saving=saving,
    )


def training_setup(
    args: Arguments,
    config: MiniGPTConfig,
    precision: str,
    device: str,
    devices: int = 1,
    sharded: bool = False,
    replicas: int = 1,
) -> TrainingSetup:
    """What decides the memory of each of `devices` devices, of the kind cpu or cuda, in the run of `args`."""
    return TrainingSetup(
        config=config,
        block_size=args.block_size,
        micro_batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        eval_batch=args.eval_batch_size,
        compute_bytes=4 if precision == "no" else 2,
        optimizer=args.optimizer,
        muon_ns_steps=args.muon_ns_steps,
        attention=args.attn_implementation,
        document_attention=args.document_attention or args.packing_strategy.startswith("bfd"),
        gradient_checkpointing=args.gradient_checkpointing,
        device=device,
        devices=devices,
        sharded=sharded,
        replicas=replicas,
        process_bytes=_process_bytes(args) if device == "cpu" else 0.0,
        adapter=planned_adapter(args, config),
    )


def _parallelisms(setup: TrainingSetup, hardware: Hardware) -> list[TrainingSetup]:
    """The setup with DDP, and on several GPUs with FSDP2 and HSDP. Sharding that was asked for stays as it is."""
    if setup.sharded or setup.devices == 1 or setup.device == "cpu":
        return [setup]
    sharded = [replace(setup, sharded=True)]
    nodes = hardware.cluster.nodes if hardware.cluster is not None else 1
    if nodes > 1 and setup.devices % nodes == 0:
        sharded.append(replace(setup, sharded=True, replicas=nodes))
    return [setup, *sharded]


def _best(candidates: Sequence[Candidate]) -> Candidate | None:
    """The first candidate that is about as fast as the fastest; the first if no time is known.

    DDP comes before FSDP2 and HSDP, and less recomputation before more.
    """
    times = [candidate.timing.step_s if candidate.timing else 0.0 for candidate in candidates]
    return next(
        (candidate for candidate, time in zip(candidates, times, strict=True) if time <= ABOUT_AS_FAST * min(times)),
        None,
    )


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


def planned_adapter(args: Arguments, config: MiniGPTConfig) -> Adapter | None:
    """The LoRA adapter that the trainer would add. Raises UserError if the model lacks one of its layers."""
    if not args.use_peft:
        return None
    modules = args.lora_target_modules or list(module_widths(config))
    check_modules(modules, list(module_widths(config)))
    return Adapter(args.lora_r, tuple(modules), args.lora_dropout)


def planned_steps(args: Arguments, devices: int, step_s: float | None) -> int | None:
    """Steps of the whole run; None if the text has to be tokenized or packed, or a step timed, to know them."""
    if args.train_minutes:
        return round(60 * args.train_minutes / step_s) if step_s is not None else None
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


def _process_bytes(args: Arguments) -> float:
    """Size of a training process on a CPU before it has a model: this one, with what only the trainer imports."""
    import torch.utils.tensorboard

    if args.use_peft:
        import peft  # noqa: F401

    return peak_memory_gib(torch.device("cpu")) * GIB + RUNTIME_BYTES
