"""Export a MiniGPT as a stock GPT-2 folder."""

from pathlib import Path

from minigpt.modeling.gpt2 import gpt2_config, gpt2_state_dict
from minigpt.utils.errors import UserError


def export_gpt2(source: str | Path, destination: str | Path) -> list[str]:
    """Write the MiniGPT in `source` (folder or Hub name) as a stock GPT-2 folder: model_type gpt2, no remote code.

    Every number is copied bit for bit, so the logits are those of the source. The tokenizer and the generation config
    come along. Returns what the user should know: notes on options that GPT-2 spells in another way.
    Raises UserError when `source` is no MiniGPT or `destination` is not empty.
    """
    from transformers import AutoTokenizer, GPT2LMHeadModel

    from modeling_minigpt import MiniGPTForCausalLM

    folder = Path(destination)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; give a new folder")
    if Path(source).exists() and not Path(source, "config.json").is_file():
        raise UserError(f"{source} is no model folder: it has no config.json")
    try:
        model = MiniGPTForCausalLM.from_pretrained(source, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise UserError(f"{source} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    config = gpt2_config(model.config)
    exported = GPT2LMHeadModel(config).to(model.dtype)
    exported.load_state_dict(gpt2_state_dict(model), strict=True)
    exported.generation_config = model.generation_config
    exported.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    notes = []
    if not model.config.qkv_bias:
        notes.append("qkv_bias=False: GPT-2 always has these biases; they are zero, which is the same function")
    if not model.config.tie_word_embeddings:
        notes.append("tie_word_embeddings=False: the output head is a matrix of its own in lm_head.weight")
    return notes
