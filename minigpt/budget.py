"""What will a run cost? `minigpt plan CONFIG [--option value ...]` says its memory and its time before it starts.

CONFIG and the options are those of train_accelerate.py. Nothing is trained, downloaded or written; the text is not
read unless it decides the number of ids (characters) or of steps (prepared shards).
"""

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minigpt.errors import OneLineParser

if TYPE_CHECKING:
    from minigpt.arguments import Arguments
    from minigpt.forecast import Setup
    from minigpt.probe import StepTime

GIB = 2**30
PRECISIONS = {"no": "float32", "bf16": "bfloat16 (mixed)", "fp16": "float16 (mixed)"}


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        "minigpt plan",
        usage="%(prog)s CONFIG [--option value ...] [--devices N] [--fsdp] [--memory GIB] [--device D] [--json]",
        description=f"{__doc__} See train_accelerate.py --help for the options of training.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--devices", type=int, default=1, metavar="N", help="processes, each with a device (default: %(default)s)")
    add("--fsdp", action="store_true", help="shard over the devices, as accelerate_configs/fsdp2.yaml; else DDP")
    add("--memory", type=float, metavar="GIB", help="of one device: propose the largest micro-batch that fits")
    add("--device", metavar="D", help="cpu, cuda, or a GPU that is not here, as H100 (default: what is here)")
    add("--efficiency", type=float, default=0.4, metavar="X", help="share of that GPU's peak (default: %(default)s)")
    add("--no_probe", action="store_true", help="leave the time out: nothing is run")
    add("--json", action="store_true", help="print the figures as JSON")
    return parser


def main(argv: list[str]) -> None:
    """`minigpt plan`. Raises ValueError on bad input, and where no batch fits into the memory."""
    parser = _parser()
    own, words = parser.parse_known_args(argv)
    _refuse_misspelt(words, [word for word in parser._option_string_actions if word.startswith("--")])
    if own.devices < 1:
        raise ValueError(f"devices={own.devices} must be at least 1")
    if own.memory is not None and not 0 < own.memory < float("inf"):
        raise ValueError(f"memory={own.memory} must be a number of GiB above 0")
    if not 0 < own.efficiency <= 1:
        raise ValueError(f"efficiency={own.efficiency} must be above 0 and at most 1")
    if own.fsdp and own.devices == 1:
        raise ValueError("fsdp shards over several devices; give --devices")
    from minigpt.planned import planned_arguments

    budget = forecast_run(planned_arguments(words), own)
    print(json.dumps(budget.as_dict(), indent=2) if own.json else budget.as_table())


def _refuse_misspelt(words: Sequence[str], own_options: list[str]) -> None:
    """Raises ValueError for an option that is none of the training's and near one of the plan's."""
    from minigpt.arguments import Arguments

    for word in words:
        name = word.split("=")[0]
        if name.startswith("--") and name.strip("-").replace("-", "_") not in Arguments.__dataclass_fields__:
            nearest = difflib.get_close_matches(
                name.replace("-", "_").replace("__", "--", 1), own_options, n=1, cutoff=0.7
            )
            if nearest:
                raise ValueError(f"unknown option {name}; did you mean {nearest[0]}?")


@dataclass(frozen=True)
class Budget:
    """What a run will cost on each of its devices, and the setup that would use the memory best."""

    setup: "Setup"
    proposal: "Setup | None"
    steps: int | None
    precision: str
    device: str
    time: "StepTime | None"
    time_from: str

    def as_dict(self) -> dict[str, Any]:
        """The figures, in GiB and seconds."""
        from minigpt import forecast
        from minigpt.probe import flops_per_token

        setup = self.setup
        moment, parts = forecast.peak(setup)
        step_s = self.time.step_s(setup.accumulation) if self.time else None
        figures: dict[str, Any] = {
            "parameters": forecast.parameters(setup.config),
            "tokens_per_step": setup.tokens * setup.accumulation * setup.devices,
            "steps": self.steps,
            "flops_per_token": flops_per_token(setup.config, setup.block_size),
            "device": self.device,
            "devices": setup.devices,
            "precision": self.precision,
            "memory_gib": {name: size / GIB for name, size in parts.items() if size},
            "peak_gib": forecast.peak_bytes(setup) / GIB,
            "peak_at": moment,
            "step_s": step_s,
            "run_s": step_s * self.steps if step_s is not None and self.steps else None,
            "time_from": self.time_from,
        }
        if self.proposal is not None:
            figures["proposal"] = {
                "per_device_train_batch_size": self.proposal.micro_batch,
                "gradient_accumulation_steps": self.proposal.accumulation,
                "peak_gib": forecast.peak_bytes(self.proposal) / GIB,
            }
        return figures

    def as_table(self) -> str:
        """The figures to read."""
        told, setup = self.as_dict(), self.setup
        steps = (
            f"{told['steps']:,}" if told["steps"] else "as the text has; give --max_steps, or --data prepared shards"
        )
        lines = [
            f"  parameters     {told['parameters']:,}",
            f"  tokens a step  {told['tokens_per_step']:,} = {setup.micro_batch} samples x {setup.accumulation} "
            f"micro-batches x {setup.devices} device(s) x {setup.block_size} tokens",
            f"  steps          {steps}",
            f"  device         {setup.devices} x {self.device}, {PRECISIONS[self.precision]}",
            "",
            f"  memory of a device, GiB; its peak is at: {told['peak_at']}",
            *(f"    {name:<26}{size:>9.3f}" for name, size in told["memory_gib"].items()),
            f"    {'sum':<26}{told['peak_gib']:>9.3f}",
            "",
        ]
        if told["step_s"] is not None:
            rate = told["tokens_per_step"] / told["step_s"]
            lines.append(f"  a step         {_seconds(told['step_s'])}, {rate:,.0f} tokens/s ({self.time_from})")
            achieved = told["flops_per_token"] * rate / setup.devices
            lines.append(
                f"  arithmetic     {told['flops_per_token'] / 1e6:,.1f} MFLOP a token, {_flops(achieved)} a device"
            )
        if told["run_s"] is not None:
            lines.append(f"  the run        {_seconds(told['run_s'])}, evaluation, samples and saving excluded")
        if "proposal" in told:
            best = told["proposal"]
            lines.append(
                f"  fits           --per_device_train_batch_size {best['per_device_train_batch_size']} "
                f"--gradient_accumulation_steps {best['gradient_accumulation_steps']}  ({best['peak_gib']:.3f} GiB)"
            )
        return "\n".join(lines).rstrip()


def forecast_run(args: "Arguments", own: argparse.Namespace) -> Budget:
    """All that `minigpt plan` says about the run of `args`. Raises ValueError where no batch fits into the memory."""
    import torch

    from minigpt import probe
    from minigpt.forecast import RUNTIME_BYTES, Setup, largest_that_fits
    from minigpt.metrics import PEAK_FLOPS, peak_memory_gib
    from minigpt.planned import planned_config, planned_steps

    here = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
    device = own.device or here
    if device not in ("cpu", here, *PEAK_FLOPS):
        raise ValueError(f"device={device} is neither here nor one of {', '.join(PEAK_FLOPS)}")
    kind = "cpu" if device == "cpu" else "cuda"
    precision = args.mixed_precision or ("no" if kind == "cpu" else "bf16")  # as accelerate_configs have it
    config = planned_config(args)
    _import_as_the_trainer()
    setup = Setup(
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
        devices=own.devices,
        sharded=own.fsdp,
        process_bytes=peak_memory_gib(torch.device("cpu")) * GIB + RUNTIME_BYTES if kind == "cpu" else 0.0,
    )
    proposal = largest_that_fits(setup, own.memory * GIB) if own.memory is not None else None
    if own.no_probe:
        time, time_from = None, "not measured"
    elif device in PEAK_FLOPS:
        mixed = precision != "no"
        time = probe.from_data_sheet(device, config, args, setup.micro_batch, mixed, own.efficiency)
        time_from = f"{own.efficiency:.0%} of the maker's figure"
    else:
        time = probe.measured(args, config, setup.micro_batch, precision, torch.device(device))
        time_from = "measured here on a few layers"
    return Budget(setup, proposal, planned_steps(args, own.devices), precision, device, time, time_from)


def _import_as_the_trainer() -> None:
    """The libraries of a training process, so that this process is as large as one before it has a model."""
    import torch.utils.tensorboard  # noqa: F401

    import minigpt.build
    import minigpt.plot  # noqa: F401


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.1f} min"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.1f} GFLOP/s"
