"""LoRA: train small matrices next to the frozen ones of a model, save them alone, and merge them into the model.

An adapted linear layer computes W x + scale · B A x, with A [r, in] and B [out, r]; only A and B are trained. B starts
at zero, so a new adapter changes nothing. The package `peft` makes these layers, and its format is that of a saved
adapter: adapter_model.safetensors, and adapter_config.json, which names the base model.
Source: Hu et al. 2021 (https://arxiv.org/abs/2106.09685).
"""

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import file_exists, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from minigpt.config.arguments import ModelArguments
from minigpt.utils.errors import UserError
from minigpt.utils.files import read_json
from minigpt.utils.run_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from modeling_minigpt import MiniGPTForCausalLM

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"  # PEFT's name for the only adapter of a model
SAVED_PREFIX = "base_model.model."  # of each name in a saved adapter: there, PEFT's wrapper is around the model

# What is read of adapter_config.json: what decides which function the adapter computes.
READ_FIELDS = {
    "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
# What has no effect on a trained adapter. Any other field must have no value, or its default.
UNUSED_FIELDS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip


def add_adapter(model: MiniGPTForCausalLM, args: ModelArguments) -> None:
    """Freeze `model` and give it a new adapter, in place: only the adapter's parameters need a gradient.

    Its random numbers come from torch's global generator. From now on `save_pretrained` saves the adapter alone, with
    the Hub name or the absolute path that `model` was loaded from.
    Raises UserError if peft is missing or the model lacks one of `lora_target_modules`.
    """
    _require_peft()
    from peft import LoraConfig

    modules = model.transformer.layers.named_modules()
    present = list(dict.fromkeys(name.rpartition(".")[2] for name, part in modules if isinstance(part, nn.Linear)))
    targets = present if args.lora_target_modules is None else args.lora_target_modules
    check_modules(targets, present)
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        use_rslora=args.use_rslora,
        task_type="CAUSAL_LM",
    )
    model.add_adapter(config)
    config.target_modules = [name for name in present if name in targets]  # a set would be saved in any order
    name = model.name_or_path  # empty for a model that was not loaded
    config.base_model_name_or_path = str(Path(name).resolve()) if name and Path(name).is_dir() else name


def check_modules(targets: Sequence[str], present: Sequence[str]) -> None:
    """Raises UserError for `lora_target_modules` that are not among the linear layers of the model."""
    if unknown := [name for name in targets if name not in present]:
        raise UserError(
            f"lora_target_modules={' '.join(unknown)}: no such linear layer; the model has {', '.join(present)}"
        )


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether `add_adapter` has given `model` an adapter."""
    return hasattr(model, "peft_config")


def save_adapter(model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Save the adapter of `model` with the values `weights`, and the generation config.

    As `save_pretrained`, which for an adapter also asks the Hub for the base model each time.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    named = get_peft_model_state_dict(model, weights, ADAPTER, save_embedding_layers=False)
    tensors = {SAVED_PREFIX + name: tensor.contiguous() for name, tensor in named.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    model.peft_config[ADAPTER].save_pretrained(str(folder))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def load_adapter_weights(model: nn.Module, folder: Path) -> None:
    """Load the saved adapter in `folder` into that of `model`.

    Raises UserError if the file cannot be read, or does not fit.
    """
    from peft import set_peft_model_state_dict

    path = folder / ADAPTER_WEIGHTS
    try:
        weights = {name.removeprefix(SAVED_PREFIX): tensor for name, tensor in load_file(path).items()}
        result: Any = set_peft_model_state_dict(model, weights, ADAPTER)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:  # RuntimeError: of another shape
        raise UserError(f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    missing = [name for name in result.missing_keys if ".lora_" in name]  # it lists those of the base model as well
    for problem, names in (("lacks", missing), ("does not fit: unknown are", result.unexpected_keys)):
        if names:
            raise UserError(f"{path} {problem} {len(names)} weights, for example {min(names)}")


def find_adapter(name_or_folder: str | Path) -> Path | None:
    """The folder of a saved adapter, or None for any other model. Of one on the Hub the config is downloaded."""
    folder = Path(name_or_folder).expanduser()
    if folder.exists():
        return folder if (folder / ADAPTER_CONFIG).is_file() else None
    return _adapter_on_hub(str(name_or_folder))


@cache
def _adapter_on_hub(name: str) -> Path | None:
    """The folder in the cache with the config of an adapter on the Hub, if `name` is one.

    The Hub is asked once, without the half minute of retries in which loading then fails if there is no network.
    """
    try:
        exists = file_exists(name, ADAPTER_CONFIG)
    except HFValidationError:  # it cannot be the name of a repository
        return None
    except (OSError, HTTPError):  # no network
        exists = isinstance(try_to_load_from_cache(name, ADAPTER_CONFIG), str)
    config = cached_file(name, ADAPTER_CONFIG) if exists else None
    return None if config is None else Path(config).parent


def base_model(name: str, folder: Path) -> str:
    """The folder or Hub name of the model that the adapter in `folder` was trained on. `name`: what the user gave.

    Raises UserError if it is no LoRA adapter, or its base is a folder that is gone, or another adapter.
    """
    config = read_json(folder / ADAPTER_CONFIG, "the configuration of an adapter", ["peft_type"])
    if config["peft_type"] != "LORA":
        raise UserError(f"model={name} is an adapter of type {config['peft_type']}; only LORA is supported")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"model={name}: {ADAPTER_CONFIG} names no base model; add base_model_name_or_path")
    is_path = Path(base).is_absolute() or base.startswith((".", "~")) or base.count("/") > 1
    if is_path and not Path(base).is_dir():
        raise UserError(
            f"model={name} is an adapter, and its base model {base} is gone; put it back, or write its new place into "
            f"base_model_name_or_path of {folder / ADAPTER_CONFIG}"
        )
    if find_adapter(base) is not None:
        raise UserError(f"model={name}: its base model {base} is an adapter itself; merge it with minigpt merge")
    return base


def config_source(name_or_folder: str) -> str:
    """The folder or Hub name that holds the config.json of a model: of an adapter, that of its base model."""
    folder = find_adapter(name_or_folder)
    return name_or_folder if folder is None else base_model(name_or_folder, folder)


def merge_adapter(model: PreTrainedModel, name: str, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Add the adapter in `folder` to the weights of its base `model`, in float32, and return the model in `dtype`.

    name: what the user gave; if it is a Hub name, the adapter's weights are downloaded.
    The generation config is the adapter's, if it has one.
    Raises UserError if peft is missing, or if the adapter does not fit the model or has parts besides LoRA's matrices.
    """
    _require_peft()
    from peft import LoraModel

    if not Path(name).expanduser().is_dir():
        for file in (ADAPTER_WEIGHTS, "generation_config.json"):
            cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"model={name} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; no other format is read")
    adapted = LoraModel(model.float(), _read_config(name, folder), ADAPTER)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(hasattr(table, "base_layer") for table in tables) and len({id(table.weight) for table in tables}) == 1:
        raise UserError(f"model={name} adapts one use of an embedding that is also the head; it cannot be merged")
    load_adapter_weights(model, folder)
    merged: Any = adapted.merge_and_unload()
    merged.requires_grad_(True)  # the adapter had frozen it
    if (folder / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(folder)
    merged.to(dtype)
    merged.config.dtype = dtype
    result: PreTrainedModel = merged
    return result


def _read_config(name: str, folder: Path) -> "LoraConfig":
    """The adapter's configuration, with nothing that PEFT would import or compute for it."""
    from peft import LoraConfig

    saved, defaults = read_json(folder / ADAPTER_CONFIG, "the configuration of an adapter"), LoraConfig().to_dict()
    for field, value in saved.items():
        if field not in READ_FIELDS | UNUSED_FIELDS and value and value != defaults.get(field):
            raise UserError(f"model={name}: {field}={value} in {ADAPTER_CONFIG} is not supported")
    fields: dict[str, Any] = {field: value for field, value in saved.items() if field in READ_FIELDS}
    return LoraConfig(**fields, init_lora_weights=False, inference_mode=True)


def _require_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise UserError('an adapter needs the peft package: pip install "minigpt-lm[peft]"')
