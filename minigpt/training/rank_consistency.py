"""Check before the first step that all ranks run the same code, options and data."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object

from minigpt.config.arguments import Arguments
from minigpt.utils.errors import UserError
from minigpt.utils.files import file_sha256

# where things lie on a host, and how many helpers work there, is its own affair; their content is compared instead
SOURCES = {"data", "train_file", "validation_file", "dataset_name", "model_name_or_path", "tokenizer", "cache_dir"}

PLACES_AND_HELPERS = {"output_dir", "resume_from_checkpoint", "preprocessing_num_workers", "dataloader_num_workers"}

OWN_OPTIONS = SOURCES | PLACES_AND_HELPERS | {"overwrite_cache"}

WAY_OUT = {
    "options": "start every host with the same options and the same launch profile",
    "versions": "install the same versions on every host",
    "code": "give every host the same code",
    "data": "give every host the same text and tokenizer",
    "checkpoint": "put output_dir on a disk that all hosts share",
    "config": "give every host the same model_name_or_path",
}

MODULES_BESIDE = ("configuration_minigpt.py", "modeling_minigpt.py", "train_accelerate.py")

Facts = dict[str, dict[str, Any]]


def check_rank_consistency(
    args: Arguments, config: Any, data_fingerprint: str, step: int, accelerator: Accelerator
) -> None:
    """Compare the processes; `step` is the one that each goes on after. Every process must call this.

    Raises the same ValueError on every process, when any differs from process 0 in what decides the result.
    """
    if accelerator.num_processes == 1:
        return
    options = {name: value for name, value in vars(args).items() if name not in OWN_OPTIONS}
    own: Facts = {
        "options": {**options, "mixed_precision": accelerator.mixed_precision},
        "versions": {module.__name__: str(module.__version__) for module in (torch, transformers, accelerate)},
        "code": {"code": code_fingerprint()},
        "data": {"data_fingerprint": data_fingerprint[:12]},
        "checkpoint": {"resumed_step": step},
        "config": {name: getattr(config, name) for name in type(config).__annotations__},
    }
    difference = first_difference(gather_object([own]))
    if difference is not None:
        with suppress(RuntimeError):  # who leaves first must not cut off another that is still comparing
            accelerator.wait_for_everyone()
        raise UserError(difference)


def first_difference(everyone: list[Facts]) -> str | None:
    """A sentence about the first process that differs from process 0, and in what; None if all are alike."""
    for subject, way_out in WAY_OUT.items():
        expected = everyone[0][subject]
        for process, facts in enumerate(everyone):
            found = facts[subject]
            parts = [
                f"{name}={found.get(name)} where process 0 has {expected.get(name)}"
                for name in sorted(expected.keys() | found.keys())
                if found.get(name) != expected.get(name)
            ]
            if parts:
                return f"process {process} has {', and '.join(parts)}; {way_out}"
    return None


def code_fingerprint() -> str:
    """Twelve hexadecimal digits that change with any module of this program."""
    package = Path(__file__).parents[1]
    beside = [package.parent / name for name in MODULES_BESIDE]
    files = [path for path in (*sorted(package.rglob("*.py")), *beside) if path.is_file()]
    digests = [f"{path.relative_to(package.parent).as_posix()}:{file_sha256(path)}" for path in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:12]
