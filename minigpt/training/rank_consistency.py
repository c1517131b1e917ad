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
from transformers import PreTrainedConfig

from minigpt.config.arguments import Arguments
from minigpt.utils.errors import UserError
from minigpt.utils.files import file_sha256

# Options that may differ between hosts. Paths may: the content of the files is compared instead.
SOURCE_OPTIONS = {
    "data", "train_file", "validation_file", "dataset_name", "model_name_or_path", "tokenizer", "cache_dir",
}  # fmt: skip
FOLDER_AND_WORKER_OPTIONS = {
    "output_dir", "resume_from_checkpoint", "preprocessing_num_workers", "dataloader_num_workers",
}  # fmt: skip
HOST_OPTIONS = SOURCE_OPTIONS | FOLDER_AND_WORKER_OPTIONS | {"overwrite_cache"}

WAY_OUT = {
    "options": "start every host with the same options and the same launch profile",
    "versions": "install the same versions on every host",
    "code": "give every host the same code",
    "data": "give every host the same text and tokenizer",
    "checkpoint": "put output_dir on a disk that all hosts share",
    "config": "give every host the same model_name_or_path",
}

PACKAGE = Path(__file__).parents[1]
ROOT_MODULES = ("configuration_minigpt.py", "modeling_minigpt.py", "train_accelerate.py")

Facts = dict[str, dict[str, Any]]


def check_rank_consistency(
    args: Arguments, config: PreTrainedConfig, data_fingerprint: str, step: int, accelerator: Accelerator
) -> None:
    """Compare everything that decides the result; `step` is the one to resume from. Every rank must call this.

    Raises the same UserError on every rank if any of them differs from rank 0.
    """
    if accelerator.num_processes == 1:
        return
    options = {name: value for name, value in vars(args).items() if name not in HOST_OPTIONS}
    facts: Facts = {
        "options": {**options, "mixed_precision": accelerator.mixed_precision},
        "versions": {module.__name__: str(module.__version__) for module in (torch, transformers, accelerate)},
        "code": {"code": code_fingerprint(PACKAGE)},
        "data": {"data_fingerprint": data_fingerprint[:12]},
        "checkpoint": {"resumed_step": step},
        "config": {name: getattr(config, name) for name in type(config).__annotations__},
    }
    difference = first_difference(gather_object([facts]))
    if difference is not None:
        with suppress(RuntimeError):  # a rank that exits early would cut off another one that is still comparing
            accelerator.wait_for_everyone()
            torch.distributed.destroy_process_group()  # left to the exit, its threads may abort the process
        raise UserError(difference)


def first_difference(facts_by_rank: list[Facts]) -> str | None:
    """A sentence that names the first rank that differs from rank 0, and in what; None if all are equal."""
    for subject, way_out in WAY_OUT.items():
        expected = facts_by_rank[0][subject]
        for rank, facts in enumerate(facts_by_rank):
            actual = facts[subject]
            differences = [
                f"{name}={actual.get(name)} where rank 0 has {expected.get(name)}"
                for name in sorted(expected.keys() | actual.keys())
                if actual.get(name) != expected.get(name)
            ]
            if differences:
                return f"rank {rank} has {', and '.join(differences)}; {way_out}"
    return None


def code_fingerprint(package: Path) -> str:
    """Twelve hexadecimal digits that change with the content or place of any module of `package`.

    The modules next to the package that training uses are included.
    """
    root = package.parent
    modules = [*sorted(package.rglob("*.py")), *(root / name for name in ROOT_MODULES)]
    digests = [f"{path.relative_to(root).as_posix()}:{file_sha256(path)}" for path in modules if path.is_file()]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:12]
