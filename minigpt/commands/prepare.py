"""Turn text into token shards: minigpt prepare --train_file F ... --tokenizer T --output_dir D"""

import argparse
from collections.abc import Sequence


def parse(argv: Sequence[str]) -> argparse.Namespace:
    from minigpt.config.arguments import DataArguments
    from minigpt.config.parser import OptionParser

    parser = OptionParser(DataArguments, prog="minigpt prepare", description=__doc__)
    parser.add_argument("--output_dir", required=True, help="folder of the shards; it appears when all are written")
    options = parser.parse_strictly(argv)
    return argparse.Namespace(output_dir=options.pop("output_dir"), data=DataArguments(**options))


def run(args: argparse.Namespace) -> None:
    from minigpt.data.prepare import prepare

    prepare(args.data, args.output_dir)
