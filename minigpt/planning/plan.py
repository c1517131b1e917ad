"""Plan a run: its memory, time and steps before it starts."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minigpt.utils.errors import UserError

if TYPE_CHECKING:
    from minigpt.config.arguments import Arguments
    from minigpt.planning.memory import Setup
    from minigpt.planning.step_time import StepTime
import sys
from itertools import takewhile

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import TEXT_SOURCES, Arguments
from minigpt.config.parser import parse_arguments, read_config
from minigpt.data.corpora import open_corpus
from minigpt.data.datamodule import steps_of_run
from minigpt.data.samplers import SampleOrder
from minigpt.data.shards import open_shards
from minigpt.data.tokenizer import load_tokenizer
from minigpt.utils.formatting import format_flops, format_seconds

GIB = 2**30

PRECISIONS = {"no": "float32", "bf16": "bfloat16 (mixed)", "fp16": "float16 (mixed)"}


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
        from minigpt.planning import memory
        from minigpt.planning.step_time import flops_per_token

        setup = self.setup
        moment, parts = memory.peak(setup)
        step_s = self.time.step_s(setup.accumulation) if self.time else None
        figures: dict[str, Any] = {
            "parameters": memory.parameters(setup.config),
            "tokens_per_step": setup.tokens * setup.accumulation * setup.devices,
            "steps": self.steps,
            "flops_per_token": flops_per_token(setup.config, setup.block_size),
            "device": self.device,
            "devices": setup.devices,
            "precision": self.precision,
            "memory_gib": {name: size / GIB for name, size in parts.items() if size},
            "peak_gib": memory.peak_bytes(setup) / GIB,
            "peak_at": moment,
            "step_s": step_s,
            "run_s": step_s * self.steps if step_s is not None and self.steps else None,
            "time_from": self.time_from,
        }
        if self.proposal is not None:
            figures["proposal"] = {
                "per_device_train_batch_size": self.proposal.micro_batch,
                "gradient_accumulation_steps": self.proposal.accumulation,
                "peak_gib": memory.peak_bytes(self.proposal) / GIB,
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
            lines.append(f"  a step         {format_seconds(told['step_s'])}, {rate:,.0f} tokens/s ({self.time_from})")
            achieved = told["flops_per_token"] * rate / setup.devices
            lines.append(
                f"  arithmetic     {told['flops_per_token'] / 1e6:,.1f} MFLOP per token, "
                f"{format_flops(achieved)} per device"
            )
        if told["run_s"] is not None:
            lines.append(f"  the run        {format_seconds(told['run_s'])}, evaluation, samples and saving excluded")
        if "proposal" in told:
            best = told["proposal"]
            lines.append(
                f"  fits           --per_device_train_batch_size {best['per_device_train_batch_size']} "
                f"--gradient_accumulation_steps {best['gradient_accumulation_steps']}  ({best['peak_gib']:.3f} GiB)"
            )
        return "\n".join(lines).rstrip()


def forecast_run(args: "Arguments", own: argparse.Namespace) -> Budget:
    """All that `minigpt plan` says about the run of `args`. Raises UserError where no batch fits into the memory."""
    import torch

    from minigpt.planning import step_time
    from minigpt.planning.memory import RUNTIME_BYTES, Setup, largest_that_fits
    from minigpt.planning.plan import planned_config, planned_steps
    from minigpt.utils.hardware import PEAK_FLOPS, peak_memory_gib

    here = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
    device = own.device or here
    if device not in ("cpu", here, *PEAK_FLOPS):
        raise UserError(f"device={device} is neither here nor one of {', '.join(PEAK_FLOPS)}")
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
        time = step_time.from_data_sheet(device, config, args, setup.micro_batch, mixed, own.efficiency)
        time_from = f"{own.efficiency:.0%} of the maker's figure"
    else:
        time = step_time.measured(args, config, setup.micro_batch, precision, torch.device(device))
        time_from = "measured here on a few layers"
    return Budget(setup, proposal, planned_steps(args, own.devices), precision, device, time, time_from)


def _import_as_the_trainer() -> None:
    """The libraries of a training process, so that this process is as large as one before it has a model."""
    import torch.utils.tensorboard  # noqa: F401


def planned_arguments(words: Sequence[str]) -> Arguments:
    """The options of the run. A preset that leaves its text to the command line can be planned without it."""
    if not words or words[0].startswith("-"):
        raise UserError("give a preset first, as in: minigpt plan configs/quickstart.yaml")
    sys.argv[0] = "minigpt plan"  # the parser of the options names itself by it
    presets = takewhile(lambda word: not word.startswith("-"), words)
    named = {f"--{key}" for preset in presets for key in read_config(preset)} | {word.split("=")[0] for word in words}
    has_text = any(f"--{source}" in named for source in TEXT_SOURCES)
    # any text: the shape does not depend on it, or the error below says so
    args = parse_arguments([*words, *([] if has_text else ["--corpus", "python-docs"])], words[0])
    if not has_text and args.tokenizer == "char" and args.vocab_size is None:
        raise UserError("tokenizer=char: the text decides how many ids there are; give --train_file or --vocab_size")
    return args


def planned_config(args: Arguments) -> Any:
    """The configuration of the model as `minigpt.build` would make it, without its tokenizer where that is not there.

    Raises UserError where the model cannot be found or options do not go together.
    """
    dropout = {} if args.dropout is None else dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), args.dropout)
    multiple = args.pad_vocab_size_to_multiple_of or 1
    if args.model_name_or_path is not None:
        try:
            config = MiniGPTConfig.from_pretrained(args.model_name_or_path, **dropout)
        except OSError as error:
            raise UserError(f"model_name_or_path={args.model_name_or_path}: {' '.join(str(error).split())}") from error
        config.vocab_size = -(-config.vocab_size // multiple) * multiple
    else:
        rows = args.vocab_size or -(-_ids(args) // multiple) * multiple
        no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
        shape = {"max_position_embeddings": args.block_size} | args.shape | {"vocab_size": rows}
        config = MiniGPTConfig(**(no_dropout | dropout | shape))
    if args.block_size > config.max_position_embeddings:
        raise UserError(
            f"block_size={args.block_size} is longer than the position table; "
            f"try its max_position_embeddings, block_size={config.max_position_embeddings}"
        )
    return config


def _ids(args: Arguments) -> int:
    """How many ids the tokenizer has, or will have once it is trained."""
    if args.data is not None:
        shards = open_shards(args.data[0])
        if args.tokenizer is None and shards.tokenizer_dir is None and shards.vocab_size is None:
            raise UserError(f"data={args.data[0]} does not say how many ids it has; give --vocab_size or --tokenizer")
        source = args.tokenizer or shards.tokenizer_dir
        return shards.vocab_size or len(load_tokenizer(source or ""))
    if args.tokenizer == "char":
        corpus = open_corpus(args)
        characters: set[str] = set()
        for documents in (corpus.train, corpus.validation):
            for text, _ in documents.pieces():
                characters.update(str(text))
        return len(characters) + 1  # <|endoftext|>
    if args.tokenizer in (None, "bpe"):
        return args.tokenizer_vocab_size
    return len(load_tokenizer(args.tokenizer))


def planned_steps(args: Arguments, devices: int) -> int | None:
    """Steps of the whole run; None where only a text that is not prepared yet knows."""

    if args.max_steps is not None:
        return args.max_steps
    if args.data is None or args.packing_strategy != "wrapped":
        return None
    tokens = [len(open_shards(folder).train) for folder in args.data]
    samples = sum(SampleOrder(number, args.block_size, args.seed, args.stride).samples for number in tokens)
    return steps_of_run(args, samples, devices)
