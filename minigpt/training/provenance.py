"""Record where a run comes from: data.json and environment.json."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from minigpt.config.arguments import Arguments
from minigpt.data.shards import TokenShards
from minigpt.utils.files import write_atomically
from minigpt.utils.run_files import DATA_FILE, ENVIRONMENT_FILE

if TYPE_CHECKING:  # publishing imports this module too, and must start without torch
    from accelerate import Accelerator

LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers")

Facts = dict[str, Any]  # JSON


def record_provenance(
    args: Arguments, shards: TokenShards, packing: dict[str, int | str], accelerator: "Accelerator"
) -> None:
    """Write both files into the run's folder, again when the run is resumed.

    `packing` describes how samples were filled with documents; it is empty if the text was cut into blocks.
    """
    data = data_facts(shards) | ({"packing": packing} if packing else {})
    environment = environment_facts(args.model_name_or_path, accelerator)
    if args.use_peft:
        environment["versions"]["peft"] = _version("peft")
    for name, facts in ((DATA_FILE, data), (ENVIRONMENT_FILE, environment)):
        write_atomically(args.run_dir / name, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def data_facts(shards: TokenShards) -> Facts:
    """The manifest of the shards and their fingerprint. Shards without a manifest: the sizes of their files.

    A data set on this machine is recorded as `dataset_folder`, one on the Hub as `dataset_name`.
    """
    facts: Facts = {"fingerprint": shards.fingerprint, **shards.manifest}
    if not shards.manifest:
        splits = {"train": shards.train, "validation": shards.validation}
        facts["splits"] = {
            name: {
                "tokens": len(split),
                "shards": [{"file": shard.path.name, "bytes": shard.path.stat().st_size} for shard in split.shards],
            }
            for name, split in splits.items()
            if split
        }
    source = dict(facts.get("source", {}))
    if is_local(source.get("dataset_name")):
        source["dataset_folder"] = source.pop("dataset_name")
    return without_paths({**facts, "source": source})


def environment_facts(model_name_or_path: str | None, accelerator: "Accelerator") -> Facts:
    """Base model, device, number of processes, precision, and the versions of Python and the libraries."""
    import torch

    on_gpu = accelerator.device.type == "cuda"
    local = is_local(model_name_or_path)
    return {
        "base_model": None if local else model_name_or_path,
        "base_folder": PurePath(model_name_or_path).name if local and model_name_or_path else None,
        "device": torch.cuda.get_device_name(accelerator.device) if on_gpu else accelerator.device.type,
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
    }


def is_local(name: str | None) -> bool:
    """Whether the name of a model or data set is a file or folder on this machine, and not a repository on the Hub."""
    return name is not None and (name.startswith((".", "/", "~")) or "\\" in name or Path(name).exists())


def without_paths(value: Any) -> Any:
    """A JSON value in which every local path, at any depth, is reduced to its last part."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    if isinstance(value, str) and ("/" in value or "\\" in value) and is_local(value):
        return PurePath(value.replace("\\", "/")).name
    return value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
