"""Run the trainer in tests as a user would, and read what it wrote."""

import subprocess
import sys
from pathlib import Path

from minigpt.utils.run_files import METRICS_FILE, read_metrics

ROOT = Path(__file__).parents[2]


def command(*words: str | Path, processes: int = 1) -> list[str]:
    """The command line that trains as a user would: alone, or by `accelerate launch` with gloo processes."""
    script = [str(ROOT / "train_accelerate.py"), *map(str, words)]
    return [sys.executable, *script] if processes == 1 else launch(*script, processes=processes)


def launch(*words: str | Path, processes: int) -> list[str]:
    """The command line of `accelerate launch` that runs a script, or `-m` and a module, in gloo processes."""
    profile = ROOT / "accelerate_configs" / "cpu_ddp.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(profile)]
    return [*launcher, "--num_processes", str(processes), *map(str, words)]


def finish(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(words, capture_output=True, text=True, timeout=240, **options)  # type: ignore[call-overload]


def metrics(run_dir: Path, name: str) -> dict[int, float]:
    """Step → value of one metric of a run."""
    lines = read_metrics(run_dir / METRICS_FILE)
    return {int(line["step"]): line[name] for line in lines if name in line}
