"""Measure the reliability of training and print the tables of docs/reliability.md.

    make soak, or: python tests/system/reliability [kills] [elastic] [splits] [saving]

Every run is a real process, started as a user would start it. The killed ones are forked from a process that has
imported the libraries, which saves four seconds per start.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `support` and `system`, which pytest finds by itself

from system.reliability.comparisons import elastic, saving, splits
from system.reliability.kills import kills
from system.reliability.setting import TINY, write_text

EXPERIMENTS = {"kills": kills, "elastic": elastic, "splits": splits, "saving": saving}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    experiments = f"any of {', '.join(EXPERIMENTS)} (default: all but saving)"
    parser.add_argument("experiments", nargs="*", default=["kills", "elastic", "splits"], help=experiments)
    parser.add_argument("--kills", type=int, default=200, help="kills in total (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, help="append a JSON line per kill to this file; the table then shows all of its lines"
    )
    args = parser.parse_args()
    if unknown := set(args.experiments) - EXPERIMENTS.keys():
        parser.error(f"unknown experiment {min(unknown)}; give {experiments}")
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        text = Path(folder, "text.jsonl")
        write_text(text)
        common = [*TINY, "--train_file", str(text), "--cache_dir", str(Path(folder, "cache"))]
        for name in args.experiments:
            start = time.perf_counter()
            EXPERIMENTS[name](Path(folder), common, args)
            print(f"({name}: {time.perf_counter() - start:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
