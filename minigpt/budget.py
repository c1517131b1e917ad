"""What will a run cost? `minigpt plan CONFIG [--option value ...]` says its memory and its time before it starts.

CONFIG and the options are those of train_accelerate.py. Nothing is trained, downloaded or written; the text is not
read unless it decides the number of ids (characters) or of steps (prepared shards).
"""

import argparse
import json
import sys
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
    own, words = _parser().parse_known_args(argv)
    if own.devices < 1:
        raise ValueError(f"devices={own.devices} must be at least 1")
    if own.memory is not None and not 0 < own.memory < float("inf"):
        raise ValueError(f"memory={own.memory} must be a number of GiB above 0")
    if not 0 < own.efficiency <= 1:
        raise ValueError(f"efficiency={own.efficiency} must be above 0 and at most 1")
    if own.fsdp and own.devices == 1:
        raise ValueError("fsdp shards over several devices; give --devices")
    budget = forecast_run(planned_arguments(words), own)
    print(json.dumps(budget.as_dict(), indent=2) if own.json else budget.as_table())


def planned_arguments(words: Sequence[str]) -> "Arguments":
    """The options of the run. A preset that leaves its text to the command line can be planned without it."""
    from minigpt.arguments import TEXT_SOURCES
    from minigpt.command_line import parse_arguments, read_config

    words = list(words)
    if not words or words[0].startswith("-"):
        raise ValueError("give a preset first, as in: minigpt plan configs/quickstart.yaml")
    sys.argv[0] = "minigpt plan"  # the parser of the options names itself by it
    configs = [word for word in words if not word.startswith("-") and word.endswith((".yaml", ".yml"))]
    named = {key for config in configs for key in read_config(config)} | {word.split("=")[0] for word in words}
    if not any(name in named or f"--{name}" in named for name in TEXT_SOURCES):
        words += ["--corpus", "python-docs"]  # any: the shape does not depend on it, or says so
        if "--tokenizer" not in named and any(read_config(config).get("tokenizer") == "char" for config in configs):
            raise ValueError("tokenizer=char: the text decides how many ids there are; give --train_file")
    return parse_arguments(words, words[0])


def planned_config(args: "Arguments") -> Any:
    """The configuration of the model as `minigpt.build` would make it, without its tokenizer where that is not there.

    Raises ValueError where the model cannot be found or options do not go together.
    """
    from configuration_minigpt import MiniGPTConfig

    dropout = {} if args.dropout is None else dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), args.dropout)
    multiple = args.pad_vocab_size_to_multiple_of or 1
    if args.model_name_or_path is not None:
        try:
            config = MiniGPTConfig.from_pretrained(args.model_name_or_path, **dropout)
        except OSError as error:
            raise ValueError(
                f"model_name_or_path={args.model_name_or_path}: {' '.join(str(error).split())}"
            ) from error
        config.vocab_size = -(-config.vocab_size // multiple) * multiple
    else:
        rows = args.vocab_size or -(-_ids(args) // multiple) * multiple
        no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
        shape = {"max_position_embeddings": args.block_size} | args.shape | {"vocab_size": rows}
        config = MiniGPTConfig(**(no_dropout | dropout | shape))
    if args.block_size > config.max_position_embeddings:
        raise ValueError(
            f"block_size={args.block_size} is longer than the position table; "
            f"try its max_position_embeddings, block_size={config.max_position_embeddings}"
        )
    return config


def _ids(args: "Arguments") -> int:
    """How many ids the tokenizer has, or will have once it is trained."""
    from minigpt.corpora import open_corpus
    from minigpt.shards import open_shards
    from minigpt.tokenization import load_tokenizer

    if args.data is not None:
        shards = open_shards(args.data[0])
        if args.tokenizer is None and shards.tokenizer_dir is None and shards.vocab_size is None:
            raise ValueError(f"data={args.data[0]} does not say how many ids it has; give --vocab_size or --tokenizer")
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


def planned_steps(args: "Arguments", devices: int) -> int | None:
    """Steps of the whole run; None where only a text that is not prepared yet knows."""
    from minigpt.data import SampleOrder, steps_of_run
    from minigpt.shards import open_shards

    if args.max_steps is not None:
        return args.max_steps
    if args.data is None or args.packing_strategy != "wrapped":
        return None
    tokens = [len(open_shards(folder).train) for folder in args.data]
    samples = sum(SampleOrder(number, args.block_size, args.seed, args.stride).samples for number in tokens)
    return steps_of_run(args, samples, devices)


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

    here = "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"
    device = own.device or here
    if device not in ("cpu", here, *PEAK_FLOPS):
        raise ValueError(f"device={device} is neither here nor one of {', '.join(PEAK_FLOPS)}")
    if args.optimizer == "muon" and own.fsdp:
        raise ValueError("optimizer=muon needs whole matrices and FSDP2 shards them; use optimizer=adamw")
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
