"""Describe the machine and write a benchmark's report."""

import json
from pathlib import Path
from typing import Any


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    import os
    import platform

    import torch
    import transformers

    name = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def describe_machine(about: dict[str, Any]) -> str:
    """What `machine` found, as a sentence."""
    return (
        f"{about['device']}, {about['threads']} threads, {about['cpu_capability']}; torch {about['torch']}, "
        f"transformers {about['transformers']}, Python {about['python']}."
    )


def show(report: dict[str, Any], text: str, output: str | None) -> None:
    """Print `text`; with `output` keep it in output.md, and all of `report` in output.json."""
    print("\n" + text)
    if output:
        Path(f"{output}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        Path(f"{output}.md").write_text(text + "\n", encoding="utf-8")
