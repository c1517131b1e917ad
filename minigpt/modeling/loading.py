"""Load a finished model from a folder or the Hub. Every command that uses one calls `load_model`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from configuration_minigpt import GPT2_SWITCHES
from minigpt.modeling.lora import base_model, find_adapter, merge_adapter
from minigpt.modeling.packed_linear import pack_linears
from minigpt.utils.errors import UserError, first_line
from minigpt.utils.hub_names import refuse_missing_folder
from minigpt.utils.run_files import ADAPTER_CONFIG, find_checkpoints
from modeling_minigpt import MiniGPTForCausalLM  # this import also registers MiniGPT with the Auto classes

# What transformers raises for a name, configuration or weights that cannot be loaded
LOADING_ERRORS = (OSError, ValueError, RuntimeError, ImportError, StrictDataclassError, SafetensorError)


def load_model(
    name_or_folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    pack: bool = False,
    allow_nonfinite: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A causal language model from a folder or Hub name, in evaluation mode.

    MiniGPT and GPT-2 weights become a MiniGPT; other architectures keep the class of transformers, or their own with
    `trust_remote_code`. A LoRA adapter gives its base model, with the adapter merged into the weights. A run folder
    without a final model gives its newest checkpoint (see `find_model`).

    - dtype: that of the weights; "auto" is the dtype in which they were saved.
    - device: None is the accelerator of this machine, or the CPU if there is none.
    - pack: pack the linear layers for faster inference on a CPU; such a model can be neither trained nor saved.
    - allow_nonfinite: accept weights with a NaN or an infinity.
    - options: other arguments of `from_pretrained`, such as `attn_implementation` or fields of the configuration.

    Raises UserError if the model cannot be found or loaded, has weights that are not finite, or if the device cannot
    be used.
    """
    source = find_model(name_or_folder)
    target = _usable_device(device)
    adapter = find_adapter(source)
    base = source if adapter is None else base_model(source, adapter)
    try:
        with _quiet_transformers():
            # a base is loaded in its own dtype, so that an adapter is added to weights that were not rounded
            own_dtype = dtype if adapter is None else "auto"
            model, loading = _load(base, trust_remote_code, dtype=own_dtype, **options)
    except Exception as error:  # transformers reads many files without a check of what they hold
        raise UserError(f"model={name_or_folder} cannot be loaded: {first_line(error)}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"model={name_or_folder} is incomplete: {len(missing)} weights are missing, for example {missing[0]}"
        )
    if isinstance(model, MiniGPTForCausalLM) and loading["unexpected_keys"]:
        unexpected = sorted(loading["unexpected_keys"])
        raise UserError(
            f"model={name_or_folder} has {len(unexpected)} weights that its config.json has no place for, for example "
            f"{unexpected[0]}"
        )
    if adapter is not None:
        merged_dtype = model.dtype if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
        try:
            model = merge_adapter(model, source, adapter, merged_dtype)
        except (*LOADING_ERRORS, TypeError) as error:  # TypeError: a field of another type in its configuration
            if isinstance(error, UserError):
                raise
            raise UserError(f"model={name_or_folder} cannot be loaded: {first_line(error)}") from error
    if not allow_nonfinite:
        _refuse_nonfinite(model, name_or_folder)
    try:
        model.to(target)  # type: ignore[arg-type]  # declared without its self
    except torch.OutOfMemoryError as error:
        raise UserError(f"model={name_or_folder} does not fit into the memory of device={target}") from error
    if pack:
        pack_linears(model)
    return model.eval()


def find_model(name_or_folder: str | Path) -> str:
    """The folder or Hub name to load: for a run folder without a final model, its newest checkpoint.

    Raises UserError if there is no such folder or model on the Hub, or if the folder has neither a model nor a
    checkpoint.
    """
    name = str(name_or_folder)
    folder = Path(name).expanduser()
    if not folder.exists():
        refuse_missing_folder("model", name)
        if find_adapter(name) is not None:
            return name
        try:
            PreTrainedConfig.get_config_dict(name)
        except LOADING_ERRORS as error:
            raise UserError(f"model={name}: no such folder, and not found on the Hub: {first_line(error)}") from error
        return name
    if not folder.is_dir():
        raise UserError(f"model={name} is a file; give the folder that it is in")
    if _holds_model(folder):
        return str(folder)
    checkpoints = [path for path in find_checkpoints(folder) if _holds_model(path)]
    if not checkpoints:
        raise UserError(f"model={folder} has neither config.json nor a checkpoint-<step> folder with one")
    print(f"(note: {folder} has no final model; using {checkpoints[-1]})", file=sys.stderr)
    return str(checkpoints[-1])


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()


def _load(source: str, trust_remote_code: bool, **options: Any) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    """The model and transformers' report on its weights."""
    config = PreTrainedConfig.get_config_dict(source)[0]
    # a GPT-2 with options that MiniGPT does not implement stays a GPT-2
    is_plain = all(config.get(option, implemented) == implemented for option, implemented in GPT2_SWITCHES.items())
    if config.get("model_type") == "minigpt" or (config.get("model_type") == "gpt2" and is_plain):
        model_class: Any = MiniGPTForCausalLM
    else:
        model_class = AutoModelForCausalLM
        options["trust_remote_code"] = trust_remote_code
    options["use_safetensors"] = True  # a pickle from elsewhere is not read
    loaded = model_class.from_pretrained(source, output_loading_info=True, **options)
    return cast(tuple[PreTrainedModel, dict[str, set[str]]], loaded)  # declared as the model alone


def _refuse_nonfinite(model: PreTrainedModel, name_or_folder: str | Path) -> None:
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.numel() and not all(torch.isfinite(end) for end in weight.aminmax()):
            raise UserError(f"model={name_or_folder} is not usable: {name} holds a NaN or an infinity")


def _usable_device(device: str | torch.device | None) -> torch.device:
    """The device to load to. Raises UserError if it does not exist, before any weights are read."""
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build of torch without this kind of device
        raise UserError(f"device={device} cannot be used: {first_line(error)}") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the block; afterwards each module has its previous mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
