"""Choose the device of a benchmark, describe the machine, write the report."""

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt.utils.command_line import check_output_file
from minigpt.utils.errors import UserError, first_line
from minigpt.utils.files import write_atomically

REPORT_SUFFIXES = (".json", ".md")


def add_report_option(parser: argparse.ArgumentParser) -> None:
    """`--output`."""
    parser.add_argument("--output", metavar="FILE", help="also write FILE.json and FILE.md")


def named_texts(values: Sequence[str], others: Sequence[str] = ()) -> dict[str, str]:
    """The texts of `--text NAME=FILE`, by name. Raises UserError if one is neither a file nor one of `others`."""
    texts = {}
    for value in values:
        name, equals, source = value.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"text={value}: expected NAME=FILE")
        if source not in others and not Path(source).is_file():
            raise UserError(f"text={value}: {source} is no file")
        texts[name] = source
    return texts


def add_nanogpt_option(parser: argparse.ArgumentParser) -> None:
    """`--nanogpt`."""
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT; its model.py is imported unchanged")


def check_nanogpt(nanogpt: str | None, advice: str) -> None:
    """Raises UserError with `advice` if `nanogpt` is not a folder with nanoGPT's model."""
    if not Path(nanogpt or "", "model.py").is_file():
        raise UserError(f"nanogpt={nanogpt}: no model.py there; {advice}")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """`--device` and `--threads`."""
    devices = ["cpu", "cuda", "mps"]
    parser.add_argument("--device", choices=devices, help="default: an NVIDIA GPU if there is one, else the CPU")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")


def check_options(args: argparse.Namespace, *positive: str) -> None:
    """Raises UserError if a `positive` option is set and not above 0, or `--output` cannot be written."""
    for name in positive:
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not number > 0:
                raise UserError(f"{name}={number} must be above 0")
    check_output_file(args, "output", suffixes=REPORT_SUFFIXES)


def choose_device(name: str | None) -> str:
    """The device `name`, or without a name a GPU if there is one. Raises UserError if it cannot be used."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} cannot be used: {first_line(error)}") from error
    return name


def _describe_environment(device: str) -> dict[str, Any]:
    """The hardware and library versions that the figures depend on."""
    import torch
    import transformers

    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_report(
    figures: Mapping[str, Any], table: str, *, device: str, output: str | None, conditions: str = ""
) -> None:
    """Print the hardware and versions, the `conditions` of the benchmark and its table.

    With `output`, also write this to output.md, and `figures` with the hardware and versions to output.json.
    """
    machine = _describe_environment(device)
    sentences = (
        f"{machine['device']}, {machine['threads']} threads, {machine['cpu_capability']}; torch {machine['torch']}, "
        f"transformers {machine['transformers']}, Python {machine['python']}. {conditions}"
    )
    text = f"{sentences.rstrip()}\n\n{table}"
    print(f"\n{text}")
    if output:
        report = {"machine": machine, **figures}
        for suffix, content in zip(REPORT_SUFFIXES, (json.dumps(report, indent=2), text), strict=True):
            write_atomically(Path(output + suffix), content + "\n")
