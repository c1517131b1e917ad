"""How does a MiniGPT go where only stock GPT-2 is known? `minigpt export-gpt2` writes a GPT2LMHeadModel folder."""

import argparse
from pathlib import Path
from typing import Any


def export_gpt2(source: str | Path, destination: str | Path) -> list[str]:
    """Write the MiniGPT in `source` (folder or Hub name) as a stock GPT-2 folder: model_type gpt2, no remote code.

    Every number is copied bit for bit, so the logits are those of the source. The tokenizer and the generation config
    come along. Returns what the user should know: notes on options that GPT-2 spells in another way.
    Raises ValueError when `source` is no MiniGPT or `destination` is not empty.
    """
    from transformers import AutoTokenizer, GPT2LMHeadModel

    from modeling_minigpt import MiniGPTForCausalLM

    folder = Path(destination)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new folder")
    if Path(source).exists() and not Path(source, "config.json").is_file():
        raise ValueError(f"{source} is no model folder: it has no config.json")
    try:
        model = MiniGPTForCausalLM.from_pretrained(source, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise ValueError(f"{source} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
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


def gpt2_config(config: Any) -> Any:
    """The GPT2Config that says what a MiniGPTConfig says."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_position_embeddings,
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_inner=config.intermediate_size,
        activation_function=config.hidden_act,
        layer_norm_epsilon=config.layer_norm_epsilon,
        initializer_range=config.initializer_range,
        embd_pdrop=config.embd_pdrop,
        attn_pdrop=config.attn_pdrop,
        resid_pdrop=config.resid_pdrop,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        use_cache=config.use_cache,
    )


def gpt2_state_dict(model: Any) -> dict[str, Any]:
    """The weights under GPT-2's names and in its layout: Conv1D holds [in, out], c_attn is q, k and v side by side.

    Written out by hand and apart from the table that loads GPT-2, so that a test of the two against each other is one.
    """
    import torch

    ours = model.state_dict()
    theirs = {
        "transformer.wte.weight": ours["transformer.embed_tokens.weight"],
        "transformer.wpe.weight": ours["transformer.embed_positions.weight"],
        "transformer.ln_f.weight": ours["transformer.norm.weight"],
        "transformer.ln_f.bias": ours["transformer.norm.bias"],
        "lm_head.weight": ours["lm_head.weight"],
    }
    for number in range(model.config.num_hidden_layers):
        layer, block = f"transformer.layers.{number}", f"transformer.h.{number}"
        projections = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
        no_bias = ours[f"{layer}.self_attn.q_proj.weight"].new_zeros(model.config.hidden_size)
        theirs |= {
            f"{block}.ln_1.weight": ours[f"{layer}.input_layernorm.weight"],
            f"{block}.ln_1.bias": ours[f"{layer}.input_layernorm.bias"],
            f"{block}.attn.c_attn.weight": torch.cat([ours[f"{name}.weight"].T for name in projections], dim=1),
            f"{block}.attn.c_attn.bias": torch.cat([ours.get(f"{name}.bias", no_bias) for name in projections]),
            f"{block}.attn.c_proj.weight": ours[f"{layer}.self_attn.o_proj.weight"].T,
            f"{block}.attn.c_proj.bias": ours[f"{layer}.self_attn.o_proj.bias"],
            f"{block}.ln_2.weight": ours[f"{layer}.post_attention_layernorm.weight"],
            f"{block}.ln_2.bias": ours[f"{layer}.post_attention_layernorm.bias"],
            f"{block}.mlp.c_fc.weight": ours[f"{layer}.mlp.up_proj.weight"].T,
            f"{block}.mlp.c_fc.bias": ours[f"{layer}.mlp.up_proj.bias"],
            f"{block}.mlp.c_proj.weight": ours[f"{layer}.mlp.down_proj.weight"].T,
            f"{block}.mlp.c_proj.bias": ours[f"{layer}.mlp.down_proj.bias"],
        }
    return theirs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `minigpt export-gpt2`."""
    parser.add_argument("source", metavar="SRC", help="a MiniGPT folder (a run, a checkpoint) or Hub name")
    parser.add_argument("destination", metavar="DST", help="the folder to write; new or empty")


def main(args: argparse.Namespace) -> None:
    """`minigpt export-gpt2`. Raises ValueError with one clear line on bad input."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for note in export_gpt2(args.source, args.destination):
        print(f"note: {note}")
    print(f"{args.destination}: a stock GPT-2; load it with GPT2LMHeadModel.from_pretrained")
