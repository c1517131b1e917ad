"""Estimate the memory and time of a run before it starts.

PRESET and the options are those of `minigpt train`; see its --help. Nothing is kept. Text is read only if the
vocabulary (of characters) or the number of steps (of prepared shards) depends on it. The last two lines below train
something for a short time: tiny models on a sample of the text, and a copy of the run.

    minigpt plan quickstart --hidden_size 384
    minigpt plan --train_file my.txt --train_minutes 10        what `minigpt train` would choose for this time, and why
    minigpt plan runs/quickstart --more_minutes 5              the loss of a finished run after more training
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.utils.command_line import CommandParser, check_positive, lacks_preset, unknown_option
from minigpt.utils.errors import UserError
from minigpt.utils.formatting import format_duration

if TYPE_CHECKING:
    from minigpt.config.arguments import Arguments
    from minigpt.planning.forecast import Forecast

PROGRAM = "minigpt plan"
EPILOG = """\
For GPUs a table shows what fits into 90 % of their memory, with DDP, FSDP2, HSDP and each --gradient_checkpointing,
and the command line of the fastest. Communication takes the time of a ring: (n - 1) / n x size / bandwidth + (n - 1) x
latency for an all-gather or a reduce-scatter, twice that for an all-reduce. It reaches 80 % of the slowest link, and
hides behind up to 80 % of the computing. docs/plan.md has all formulas and assumptions.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt plan`; those of the run are in `training`."""
    parser = CommandParser(
        PROGRAM,
        __doc__,
        usage="%(prog)s PRESET [--option value ...] [--devices N] [--fsdp | --hsdp] [--memory GIB] [--device D]",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--devices", type=int, default=1, metavar="N", help="number of devices, one process each (default: 1)")
    add("--fsdp", action="store_true", help="shard over the devices, as the launch profile fsdp2 does (default: DDP)")
    add("--hsdp", action="store_true", help="shard over the devices of each node, as the launch profile hsdp does")
    add("--memory", type=float, metavar="GIB", help="memory of one device, to propose what fits (default: the GPU's)")
    add(
        "--device",
        metavar="D",
        help='cpu, cuda, or an absent GPU such as A10G or "NVIDIA H100 80GB HBM3" (default: that of this machine)',
    )
    add("--devices_per_node", type=int, default=8, metavar="N", help="devices of one node (default: %(default)s)")
    add("--link", metavar="L", help='what connects them, such as "PCIe 4" or "NVLink 4" (default: what the GPU has)')
    add(
        "--network",
        metavar="GBIT",
        help="Gbit/s from each node to the others, such as 100 or 8x400 (default: 8x400 with NVLink 4, 100 with PCIe)",
    )
    add(
        "--efficiency",
        type=float,
        default=0.4,
        metavar="X",
        help="share of its peak that an absent GPU reaches (default: %(default)s)",
    )
    add(
        "--disk_gb_per_s",
        type=float,
        metavar="X",
        help="what the nodes write to the disk of the run, GB/s, to propose --save_steps",
    )
    add(
        "--node_mtbf_hours",
        type=float,
        metavar="H",
        help="mean time between two failures of a node (default: what was published for Llama 3)",
    )
    add("--more_minutes", type=float, metavar="N", help="forecast the loss of a finished run after N more minutes")
    add(
        "--branch_minutes",
        type=float,
        metavar="N",
        help="for the forecast, train a copy of the run for N minutes (default: half of more_minutes, at most 5; 0: "
        "forecast by the fitted law alone)",
    )
    add("--no_probe", action="store_true", help="do not measure the time of a step")
    add("--json", action="store_true", help="print the figures as JSON")
    args, words = parser.parse_known_args(argv)
    if args.more_minutes is not None:
        args.run_dir = _run_to_forecast(args, words)
        return args
    if args.branch_minutes is not None:
        raise UserError("branch_minutes is for the forecast of a finished run; give --more_minutes too")
    check_positive(args, "devices", "devices_per_node")
    if args.memory is not None and not 0 < args.memory < float("inf"):
        raise UserError(f"memory={args.memory} must be a number of GiB above 0")
    for name in ("disk_gb_per_s", "node_mtbf_hours"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"{name}={getattr(args, name)} must be a number above 0")
    if not 0 < args.efficiency <= 1:
        raise UserError(f"efficiency={args.efficiency} must be above 0 and at most 1")
    if args.fsdp and args.devices == 1:
        raise UserError("fsdp shards over several devices; give --devices")
    if args.fsdp and args.hsdp:
        raise UserError("give either --fsdp or --hsdp")
    _check_spelling(words, list(parser._option_string_actions))
    args.training, args.words, args.chooses = _parse_run(words), words, lacks_preset(words)
    if args.chooses and (args.device is not None or args.no_probe):
        raise UserError(
            "train_minutes without a preset: the options are chosen by measuring this device; drop --device "
            "and --no_probe, or give a preset"
        )
    return args


def run(args: argparse.Namespace) -> None:
    """Print the plan or the forecast. Raises UserError if the model cannot be built or does not fit."""
    if args.more_minutes is not None:
        outlook = _forecast(args)
        print(json.dumps(outlook.as_dict(), indent=2) if args.json else f"{outlook}\n\n  {outlook.command}")
        return
    from minigpt.planning.plan import plan_run
    from minigpt.planning.save_interval import NODE_MTBF_HOURS
    from minigpt.planning.timed_preset import choose

    choice = choose(args.words, PROGRAM, args.devices) if args.chooses else None
    plan = plan_run(
        choice.args if choice else args.training,
        devices=args.devices,
        fsdp=args.fsdp,
        hsdp=args.hsdp,
        memory_gib=args.memory,
        device=args.device,
        devices_per_node=args.devices_per_node,
        link=args.link,
        network=args.network,
        efficiency=args.efficiency,
        disk_gb_per_s=args.disk_gb_per_s,
        node_mtbf_hours=args.node_mtbf_hours or NODE_MTBF_HOURS,
        probe=not args.no_probe,
        words=args.words,
    )
    if args.json:
        print(json.dumps(plan.as_dict() | ({"chosen": choice.as_dict()} if choice else {}), indent=2))
        return
    if choice is not None:
        print("".join(f"  {line}\n" for line in choice.lines()))
    print(plan.as_table())


def _run_to_forecast(args: argparse.Namespace, words: Sequence[str]) -> Path:
    """The folder of the run. Raises UserError for times that cannot be, and anything but a folder."""
    if not 0 < args.more_minutes < float("inf"):
        raise UserError(f"more_minutes={args.more_minutes} must be a number of minutes above 0")
    if args.branch_minutes is not None and not 0 <= args.branch_minutes <= args.more_minutes:
        raise UserError(f"branch_minutes={args.branch_minutes} must be from 0 to more_minutes={args.more_minutes:g}")
    if len(words) != 1 or words[0].startswith("-"):
        raise UserError("more_minutes: give the folder of a run, as in: minigpt plan runs/quickstart --more_minutes 5")
    return Path(words[0])


def _forecast(args: argparse.Namespace) -> "Forecast":
    """The forecast, after a branch of the run was trained, if one is wanted."""
    from minigpt.experiments.branch import default_branch_minutes, forecast_with_branch
    from minigpt.planning.forecast import forecast

    minutes = default_branch_minutes(args.more_minutes) if args.branch_minutes is None else args.branch_minutes
    if minutes == 0:
        return forecast(args.run_dir, args.more_minutes)
    duration = format_duration(60 * minutes)
    print(f"training a copy of {args.run_dir} for {duration} to see how its loss changes ...", file=sys.stderr)
    return forecast_with_branch(args.run_dir, args.more_minutes, minutes)


def _parse_run(words: Sequence[str]) -> "Arguments":
    """The options of the run. A preset without a source of text can be planned without one."""
    from minigpt.config.arguments import TEXT_SOURCES
    from minigpt.config.parser import parse_arguments, read_config
    from minigpt.config.presets import find_preset

    if (not words or words[0].startswith("-")) and not lacks_preset(words):
        raise UserError("give a preset first, as in: minigpt plan quickstart; or a text and --train_minutes")
    presets = takewhile(lambda word: not word.startswith("-"), words)
    given = {f"--{key}" for preset in presets for key in read_config(find_preset(preset))}
    given |= {word.split("=")[0].replace("-", "_").replace("__", "--", 1) for word in words}
    has_text = any(f"--{source}" in given for source in TEXT_SOURCES)
    # any text will do: the shape does not depend on it, except in the case below
    placeholder = [] if has_text or lacks_preset(words) else ["--corpus", "python-docs"]
    args = parse_arguments([*words, *placeholder], program=PROGRAM)
    if not has_text and args.tokenizer == "char" and args.vocab_size is None:
        raise UserError("tokenizer=char: the vocabulary size depends on the text; give --train_file or --vocab_size")
    return args


def _check_spelling(words: Sequence[str], plan_options: list[str]) -> None:
    """Raises UserError for an unknown option; it may be meant for the plan or for the training."""
    from minigpt.config.arguments import Arguments

    run_options = [f"--{name}" for name in Arguments.__dataclass_fields__]
    for word in words:
        name = word.split("=")[0]
        if name.startswith("--") and name.replace("-", "_").replace("__", "--", 1) not in run_options:
            if name.startswith("--no_") and f"--{name[5:]}" in run_options:  # the negation of a switch
                continue
            raise UserError(unknown_option(word, [*plan_options, *run_options]))
