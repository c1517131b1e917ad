"""Give every verb every kind of bad input, and print a table of what it did.

    make fuzz, or: python tests/system/fuzz [--only REGEX] [--list] [--verdicts FILE]

Bad input must give one line that names the culprit, exit code 2, and no change on disk. The exit code is 1 if any case
did anything else. Each program is forked from a process that has imported the libraries.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `support` and `system`, which pytest finds by itself
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from system.fuzz.cases import Case, all_cases
from system.fuzz.judge import RIGHT, Verdict, run_case
from system.fuzz.materials import make_materials, mount_read_only

from minigpt.utils.formatting import markdown_table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="only the cases with a matching name")
    parser.add_argument("--list", action="store_true", help="list the cases, and run none")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th case")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="cases at a time (default: %(default)s)")
    parser.add_argument("--verdicts", type=Path, metavar="FILE", help="append the output of every fault to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        root = Path(name)
        os.environ.update(HF_HOME=str(root / "hub"), HF_DATASETS_CACHE=str(root / "datasets"))
        print("making the good inputs", file=sys.stderr, flush=True)
        make_materials(root / "materials")
        is_mounted = mount_read_only(root / "read-only")
        if not is_mounted:
            print("no read-only file system can be mounted: its cases are left out", file=sys.stderr)
        try:
            cases = all_cases(root / "materials", root / "read-only" if is_mounted else None)
            cases = [case for case in cases if re.search(args.only, case.name)][:: args.every]
            if args.list:
                print("\n".join(f"{case.name!r}: {case.accepted or 'refused'}" for case in cases))
                return 0
            verdicts = run_all(cases, root, args.workers, args.verdicts)
        finally:
            if is_mounted:
                subprocess.run(["umount", str(root / "read-only")], check=True)
    print_table(verdicts)
    faults = [verdict for verdict in verdicts if verdict.is_fault]
    for verdict in faults:
        print(f"{verdict.verdict}: {verdict.case.name!r}")
    return 1 if faults else 0


def run_all(cases: list[Case], root: Path, workers: int, report: Path | None) -> list[Verdict]:
    """Run the cases, with a line of progress every ten seconds. Each fault is appended to `report` at once."""
    numbers, done, start = count(), count(1), time.monotonic()
    (root / "cases").mkdir()
    lock, shown = threading.Lock(), [start]

    def run(case: Case) -> Verdict:
        folder = root / "cases" / str(next(numbers))
        verdict = run_case(case, root / "materials", folder, root / "cache")
        with lock:
            if verdict.is_fault and report is not None:
                with report.open("a", errors="backslashreplace") as file:
                    file.write(f"### {verdict.verdict}: {case.name!r}\n{case.words}\n{verdict.output}\n")
            finished, now = next(done), time.monotonic()
            if now - shown[0] > 10:
                shown[0] = now
                print(f"{finished} of {len(cases)} cases in {now - start:.0f} s", file=sys.stderr, flush=True)
        return verdict

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, cases))


def print_table(verdicts: list[Verdict]) -> None:
    """Cases by verb and verdict."""
    names = [*RIGHT, *sorted({verdict.verdict for verdict in verdicts} - set(RIGHT))]
    counts = Counter((verdict.case.verb, verdict.verdict) for verdict in verdicts)
    verbs = sorted({verb for verb, _ in counts})
    rows = [[verb, *(str(counts[verb, name]) for name in names)] for verb in verbs]
    totals = Counter(verdict.verdict for verdict in verdicts)
    rows.append(["all", *(str(totals[name]) for name in names)])
    print(markdown_table(["verb", *names], rows, numeric=True))


if __name__ == "__main__":
    sys.exit(main())
