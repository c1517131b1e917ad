"""Run the programs in tests as a user would, and read what a training wrote."""

import subprocess
import sys
from pathlib import Path

from minigpt.utils.run_files import METRICS_FILE, read_metrics
from support import fork_server

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "accelerate_configs" / "cpu_ddp.yaml"
LAUNCHER = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(PROFILE)]


def command(*words: str | Path, processes: int = 1) -> list[str]:
    """The command line that trains as a user would: alone, or by `accelerate launch` with gloo processes."""
    script = [str(ROOT / "train_accelerate.py"), *map(str, words)]
    return [sys.executable, *script] if processes == 1 else launch(*script, processes=processes)


def launch(*words: str | Path, processes: int) -> list[str]:
    """The command line of `accelerate launch` that runs a script, or `-m` and a module, in gloo processes."""
    return [*LAUNCHER, "--num_processes", str(processes), *map(str, words)]


def finish(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    A Python program is forked from a process with the imports done, its ranks without the launcher (which has tests of
    its own); with `options` of `subprocess.run` it is started as usual.
    """
    processes, program = 1, words
    if words[: len(LAUNCHER)] == LAUNCHER:
        processes, program = int(words[len(LAUNCHER) + 1]), [sys.executable, *words[len(LAUNCHER) + 2 :]]
    if options or not fork_server.can_fork(program):
        return subprocess.run(words, capture_output=True, text=True, timeout=240, **options)  # type: ignore[call-overload]
    ranks = fork_server.start_ranks(program, processes)
    code = fork_server.finish_ranks(ranks, timeout=240)
    output, errors = "".join(rank.stdout() for rank in ranks), "".join(rank.stderr() for rank in ranks)
    return subprocess.CompletedProcess(words, code, output, errors)


def metrics(run_dir: Path, name: str) -> dict[int, float]:
    """Step → value of one metric of a run."""
    lines = read_metrics(run_dir / METRICS_FILE)
    return {int(line["step"]): line[name] for line in lines if name in line}
