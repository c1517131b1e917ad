"""Configuration of MiniGPT: GPT-2's architecture under the standard names of transformers.

Fields have the names most models use (`hidden_size`, `num_hidden_layers` ...). GPT-2's names (`n_embd`, `n_layer` ...)
are accepted as aliases, so the `config.json` of a GPT-2 is a valid MiniGPT configuration. This file is copied into the
folder of every saved model, so it imports nothing of the project.
"""
# ruff: noqa: RUF012 - transformers reads these class attributes; they are never modified

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

# GPT-2 options that change what the model computes, with the only value that MiniGPT implements.
GPT2_SWITCHES = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
# GPT-2 keys that have no effect in MiniGPT: options of GPT2DoubleHeadsModel, and keys found only in old files.
GPT2_IGNORED = (
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "n_ctx",
    "_num_labels",
)
MAX_WEIGHTS = 10**13  # a typing error: the largest GPT has a tenth of them


@strict
class MiniGPTConfig(PreTrainedConfig):
    """Shape and options of a MiniGPT model. The defaults are GPT-2 124M.

    - vocab_size: number of token ids; the embedding and the output head have this many rows.
    - max_position_embeddings: longest sequence, in tokens. Positions are learned, so longer sequences are impossible.
    - hidden_size, num_hidden_layers, num_attention_heads: width, depth, heads per layer (must divide the width).
    - intermediate_size: width inside the MLP; None means 4 * hidden_size.
    - hidden_act: any activation of transformers; "gelu_new" is GPT-2's tanh approximation of GELU.
    - layer_norm_epsilon: added to the variance in every LayerNorm.
    - initializer_range: standard deviation of initial weights (residual projections: divided by sqrt(2 * layers)).
    - embd_pdrop, attn_pdrop, resid_pdrop: dropout after the embeddings, on attention weights, on residual branches.
    - qkv_bias: whether the query, key and value projections have biases (as in GPT-2).
    - tie_word_embeddings: whether the output head shares the matrix of the token embedding.
    - bos_token_id, eos_token_id, pad_token_id: special ids; None where the tokenizer has none.
    - use_cache: whether forward returns keys and values for the next call by default.

    Raises ValueError that lists every impossible value, or names a GPT-2 option that MiniGPT does not implement.
    """

    model_type = "minigpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_act",
    }
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "embed_positions": (["position_ids"], ["position_embeds"]),
        "dropout": (["hidden_states"], ["hidden_states"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    max_position_embeddings: int = 1024
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    embd_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    resid_pdrop: float | int = 0.1
    qkv_bias: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # the model_type of a GPT-2 config.json would otherwise become an attribute that shadows ours
        kwargs.pop("model_type", None)
        for option, implemented in GPT2_SWITCHES.items():
            value = kwargs.pop(option, implemented)
            if value != implemented:
                raise ValueError(f"{option}={value} is a GPT-2 option that MiniGPT does not implement")
        for key in GPT2_IGNORED:
            kwargs.pop(key, None)
        super().__post_init__(**kwargs)  # sets the fields whose GPT-2 alias is in kwargs
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        self.validate_architecture()  # `@strict` calls it too, but wraps the ValueError in an error of its own

    def validate_architecture(self) -> None:
        """Check all fields; `@strict` calls this on creation and on saving. Raises ValueError with every problem."""
        problems = []
        for name in (
            "vocab_size",
            "max_position_embeddings",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        ):
            value = getattr(self, name)
            if value < 1:
                problems.append(f"{name}={value} must be at least 1")
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads != 0:
            problems.append(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}"
            )
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                problems.append(f"{name}={value} must be at least 0 and below 1")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if not value > 0:
                problems.append(f"{name}={value} must be above 0")
        if not problems and self.matrix_weights > MAX_WEIGHTS:
            sizes = ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers")
            given = ", ".join(f"{name}={getattr(self, name)}" for name in sizes)
            problems.append(f"{given} give {self.matrix_weights:.1e} weights; {MAX_WEIGHTS:.0e} are the most")
        if self.hidden_act not in ACT2FN:
            problems.append(f"hidden_act={self.hidden_act!r} is not one of {', '.join(sorted(ACT2FN))}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def matrix_weights(self) -> int:
        """The number of weights without biases and norms, which are few."""
        layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * (self.intermediate_size or 4 * self.hidden_size)
        embeddings = self.vocab_size * (1 if self.tie_word_embeddings else 2) + self.max_position_embeddings
        return self.num_hidden_layers * layer + embeddings * self.hidden_size

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config file. A GPT-2 config is read as a MiniGPT config, without the base class's warning."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == "gpt2":
            # a GPT-2 file without special ids means the defaults of transformers' GPT2Config
            config_dict = {"bos_token_id": 50256, "eos_token_id": 50256} | config_dict | {"model_type": cls.model_type}
        return config_dict, kwargs


if not __package__:  # the project's module; a copy loaded from a model folder must not change the registry
    AutoConfig.register("minigpt", MiniGPTConfig, exist_ok=True)

__all__ = ["MiniGPTConfig"]
