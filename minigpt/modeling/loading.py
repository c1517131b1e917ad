"""Load a model from a folder or the Hub: the one way every command uses."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt.utils.errors import UserError


def load_model(name: str, device: str | None, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Model and tokenizer from a folder or Hub name; MiniGPT and GPT-2 become a MiniGPT, others stay what they are.

    Raises UserError when there is no such model, it has no tokenizer, or the device is not there.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
    from transformers.utils import logging

    from modeling_minigpt import MiniGPTForCausalLM

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(name).expanduser()
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"model={name}: no such folder")
    where = str(model_folder(folder)) if folder.exists() else name
    try:
        model_type = PreTrainedConfig.get_config_dict(where)[0].get("model_type")
        ours = model_type in ("minigpt", "gpt2")
        loader: Any = MiniGPTForCausalLM if ours else AutoModelForCausalLM
        trust = {} if ours else {"trust_remote_code": trust_remote_code}
        model = loader.from_pretrained(where, dtype=dtype, **trust)
        tokenizer = AutoTokenizer.from_pretrained(where, **trust)
    except OSError as error:
        raise UserError(f"model={name} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device} cannot be used: {str(error).splitlines()[0]}") from error


def model_folder(folder: Path) -> Path:
    """`folder` if it holds a model, else its latest checkpoint. Raises UserError when there is neither."""
    if (folder / "config.json").is_file():
        return folder
    checkpoints = [path for path in folder.glob("checkpoint-*") if (path / "config.json").is_file()]
    if not checkpoints:
        raise UserError(f"model={folder} holds neither config.json nor a checkpoint-<step> folder with one")
    latest = max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]) if path.name[-1].isdigit() else -1)
    print(f"(note: {folder} holds no finished model; using {latest})", file=sys.stderr)
    return latest


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout); afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
