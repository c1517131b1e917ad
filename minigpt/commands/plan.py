"""Estimate the memory and time of a run before it starts.

CONFIG and the options are those of `minigpt train`, by whose --help they are listed. Nothing is trained, downloaded
or written. The text is read only if it decides the vocabulary size (characters) or the number of steps (prepared
shards).
"""

import argparse
import difflib
import json
from collections.abc import Sequence

from minigpt.utils.errors import CommandParser, UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        "minigpt plan",
        __doc__,
        usage="%(prog)s CONFIG [--option value ...] [--devices N] [--fsdp] [--memory GIB] [--device D] [--json]",
    )
    add = parser.add_argument
    add("--devices", type=int, default=1, metavar="N", help="processes, each with a device (default: %(default)s)")
    add("--fsdp", action="store_true", help="shard over the devices as the launch profile fsdp2 does; else DDP")
    add("--memory", type=float, metavar="GIB", help="memory of one device: suggests the largest micro-batch that fits")
    add("--device", metavar="D", help="cpu, cuda, or a GPU that is not here, such as H100 (default: what is here)")
    add("--efficiency", type=float, default=0.4, metavar="X", help="share of that GPU's peak (default: %(default)s)")
    add("--no_probe", action="store_true", help="do not measure the time: nothing is run")
    add("--json", action="store_true", help="print the figures as JSON")
    args, words = parser.parse_known_args(argv)
    _check_spelling(words, [word for word in parser._option_string_actions if word.startswith("--")])
    if args.devices < 1:
        raise UserError(f"devices={args.devices} must be at least 1")
    if args.memory is not None and not 0 < args.memory < float("inf"):
        raise UserError(f"memory={args.memory} must be a number of GiB above 0")
    if not 0 < args.efficiency <= 1:
        raise UserError(f"efficiency={args.efficiency} must be above 0 and at most 1")
    if args.fsdp and args.devices == 1:
        raise UserError("fsdp shards over several devices; give --devices")
    from minigpt.planning.plan import planned_arguments

    args.training = planned_arguments(words)
    return args


def run(args: argparse.Namespace) -> None:
    from minigpt.planning.plan import forecast_run

    plan = forecast_run(args.training, args)
    print(json.dumps(plan.as_dict(), indent=2) if args.json else plan.as_table())


def _check_spelling(words: Sequence[str], own_options: list[str]) -> None:
    """Raises UserError for an option that is none of the training's and close to one of the plan's."""
    from minigpt.config.arguments import Arguments

    for word in words:
        name = word.split("=")[0]
        if name.startswith("--") and name.strip("-").replace("-", "_") not in Arguments.__dataclass_fields__:
            candidate = name.replace("-", "_").replace("__", "--", 1)
            if nearest := difflib.get_close_matches(candidate, own_options, n=1, cutoff=0.7):
                raise UserError(f"unknown option {name}; did you mean {nearest[0]}?")
