"""Convert a MiniGPT to the weights and configuration of transformers' GPT-2."""

from typing import Any


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
