"""Export a MiniGPT as a stock GPT-2 folder, which needs no remote code."""

from pathlib import Path

from transformers import GPT2LMHeadModel

from minigpt.data.tokenizer import has_tokenizer, load_tokenizer
from minigpt.export.source import empty_folder
from minigpt.modeling.gpt2 import gpt2_config, gpt2_state_dict
from minigpt.modeling.loading import find_model, load_model
from minigpt.utils.errors import UserError
from modeling_minigpt import MiniGPTForCausalLM


def export_gpt2(source: str | Path, destination: str | Path) -> list[str]:
    """Write the MiniGPT in `source` (a folder or Hub name) as a stock GPT-2 folder, with `model_type` gpt2.

    A run folder without a final model gives its newest checkpoint.
    Every weight is copied bit for bit and keeps its dtype, so the logits are those of the source. The tokenizer, if
    there is one, and the generation config are written as well. Returns notes for the user on options that GPT-2 does
    not have.
    Raises UserError if `source` is not a MiniGPT or `destination` is not empty.
    """
    folder = empty_folder(destination)
    model_source = find_model(source)
    model = load_model(model_source, dtype="auto", device="cpu")
    if not isinstance(model, MiniGPTForCausalLM):
        raise UserError(f"{source} is a {type(model).__name__}; only a MiniGPT can be exported as a GPT-2")
    tokenizer = None
    if not Path(model_source).is_dir() or has_tokenizer(Path(model_source)):
        tokenizer = load_tokenizer(model_source, require_eos=False, require_fast=False)
    exported = GPT2LMHeadModel(gpt2_config(model.config))
    exported.to(model.dtype)  # type: ignore[arg-type]  # declared without its self
    exported.load_state_dict(gpt2_state_dict(model), strict=True)
    exported.generation_config = model.generation_config
    folder.mkdir(parents=True, exist_ok=True)
    exported.save_pretrained(folder)
    notes = []
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    else:
        notes.append(f"{model_source} has no tokenizer, so the exported folder has none either")
    if not model.config.qkv_bias:
        notes.append("qkv_bias=False: GPT-2 always has these biases; they are zero, which gives the same function")
    if not model.config.tie_word_embeddings:
        notes.append("tie_word_embeddings=False: lm_head.weight is a separate matrix in the exported folder")
    return notes
