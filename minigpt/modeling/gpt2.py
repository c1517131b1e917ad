"""Conversion of a MiniGPT to the configuration and the weights of transformers' GPT-2."""

import torch
from torch import Tensor
from transformers import GPT2Config

from configuration_minigpt import MiniGPTConfig
from modeling_minigpt import MiniGPTForCausalLM


def gpt2_config(config: MiniGPTConfig) -> GPT2Config:
    """The GPT2Config of the same model. `qkv_bias` has no counterpart: GPT-2 always has these biases."""
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_position_embeddings,
        n_ctx=config.max_position_embeddings,  # llama.cpp's converter reads this old name
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


def gpt2_state_dict(model: MiniGPTForCausalLM) -> dict[str, Tensor]:
    """The weights of `model` for `GPT2LMHeadModel.load_state_dict`; every number is copied bit for bit.

    GPT-2's Conv1D weights are [in, out], so the weights of linear layers are transposed. c_attn is the query, key and
    value projections side by side; without `qkv_bias` its bias is zero.
    This does not use GPT2_WEIGHT_TABLE of modeling_minigpt.py, so that tests can check one against the other.
    """
    minigpt = model.state_dict()
    gpt2 = {
        "transformer.wte.weight": minigpt["transformer.embed_tokens.weight"],
        "transformer.wpe.weight": minigpt["transformer.embed_positions.weight"],
        "transformer.ln_f.weight": minigpt["transformer.norm.weight"],
        "transformer.ln_f.bias": minigpt["transformer.norm.bias"],
        "lm_head.weight": minigpt["lm_head.weight"],
    }
    for number in range(model.config.num_hidden_layers):
        layer, block = f"transformer.layers.{number}", f"transformer.h.{number}"
        projections = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
        zero_bias = minigpt[f"{layer}.self_attn.q_proj.weight"].new_zeros(model.config.hidden_size)
        gpt2 |= {
            f"{block}.ln_1.weight": minigpt[f"{layer}.input_layernorm.weight"],
            f"{block}.ln_1.bias": minigpt[f"{layer}.input_layernorm.bias"],
            f"{block}.attn.c_attn.weight": torch.cat([minigpt[f"{name}.weight"].T for name in projections], dim=1),
            f"{block}.attn.c_attn.bias": torch.cat([minigpt.get(f"{name}.bias", zero_bias) for name in projections]),
            f"{block}.attn.c_proj.weight": minigpt[f"{layer}.self_attn.o_proj.weight"].T,
            f"{block}.attn.c_proj.bias": minigpt[f"{layer}.self_attn.o_proj.bias"],
            f"{block}.ln_2.weight": minigpt[f"{layer}.post_attention_layernorm.weight"],
            f"{block}.ln_2.bias": minigpt[f"{layer}.post_attention_layernorm.bias"],
            f"{block}.mlp.c_fc.weight": minigpt[f"{layer}.mlp.up_proj.weight"].T,
            f"{block}.mlp.c_fc.bias": minigpt[f"{layer}.mlp.up_proj.bias"],
            f"{block}.mlp.c_proj.weight": minigpt[f"{layer}.mlp.down_proj.weight"].T,
            f"{block}.mlp.c_proj.bias": minigpt[f"{layer}.mlp.down_proj.bias"],
        }
    return gpt2
