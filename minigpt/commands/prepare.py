"""Turn text into token shards, which training and evaluation read. An interrupted preparation resumes.

Several machines that share the disk of --output_dir, and all have the text, prepare it together: on each of N give the
same command with --num_machines N --machine_rank K.
"""

import argparse
from collections.abc import Sequence

USAGE = (
    "minigpt prepare (--train_file FILE... | --dataset_name NAME | --corpus CORPUS) --output_dir DIR\n"
    "                       [--tokenizer TOKENIZER] [--option value ...]"
)

TRAINING_OPTIONS = ("data", "data_weights", "cache_dir")  # data options that only training uses


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt prepare`; those of the data are in `data`."""
    from minigpt.config.arguments import DataArguments
    from minigpt.config.parser import OptionParser
    from minigpt.data.machines import Machines
    from minigpt.utils.errors import UserError

    parser = OptionParser(DataArguments, prog="minigpt prepare", usage=USAGE, description=__doc__)
    parser.add_argument("--output_dir", required=True, help="Folder for the shards; it appears when it is complete")
    parser.add_argument("--num_machines", type=int, default=1, metavar="N", help="machines that share the work")
    parser.add_argument(
        "--machine_rank", type=int, default=0, metavar="K", help="which of them this is, from 0; 0 writes the shards"
    )
    for action in parser._actions:
        if action.dest in TRAINING_OPTIONS:
            action.help = argparse.SUPPRESS
    options = parser.parse_strictly(argv)
    machines = Machines(options.pop("num_machines"), options.pop("machine_rank"))
    if not 0 <= machines.rank < machines.count:
        raise UserError(f"machine_rank={machines.rank} must be at least 0 and below num_machines={machines.count}")
    return argparse.Namespace(output_dir=options.pop("output_dir"), machines=machines, data=DataArguments(**options))


def run(args: argparse.Namespace) -> None:
    """Write the shards. Raises UserError if the text or tokenizer cannot be read, or the disk is too small."""
    from minigpt.data.prepare import prepare

    prepare(args.data, args.output_dir, args.machines)
