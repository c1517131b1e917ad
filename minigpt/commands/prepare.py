"""Turn text into token shards, which training and evaluation read. An interrupted preparation resumes."""

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

    parser = OptionParser(DataArguments, prog="minigpt prepare", usage=USAGE, description=__doc__)
    parser.add_argument("--output_dir", required=True, help="Folder for the shards; it appears when it is complete")
    for action in parser._actions:
        if action.dest in TRAINING_OPTIONS:
            action.help = argparse.SUPPRESS
    options = parser.parse_strictly(argv)
    return argparse.Namespace(output_dir=options.pop("output_dir"), data=DataArguments(**options))


def run(args: argparse.Namespace) -> None:
    """Write the shards. Raises UserError if the text or tokenizer cannot be read, or the disk is too small."""
    from minigpt.data.prepare import prepare

    prepare(args.data, args.output_dir)
