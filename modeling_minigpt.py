"""MiniGPT: GPT-2's function, written to be read in one sitting and treated by transformers as one of its own.

Read downward: attention, MLP, layer, the stack of layers, the language model, three task heads, and the table that
reads GPT-2 checkpoints. This file travels with every saved model and needs configuration_minigpt.py alone.

Shapes: B batch, T tokens of this call, S tokens attended to (cached ones included), C hidden size, H heads,
D = C / H head size, V vocabulary.
"""
# ruff: noqa: RUF012 - transformers reads these class attributes, and nobody changes them

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Transpose, WeightConverter, WeightRenaming
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models import auto
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

try:
    from .configuration_minigpt import MiniGPTConfig
except ImportError:
    if __package__:  # inside a package the relative import must work; its error is the one to see
        raise
    from configuration_minigpt import MiniGPTConfig


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations, to read and to record its weights; every other kernel computes the same.

    query [B, H, T, D], key and value [B, H, S, D], attention_mask additive [B, 1, T, S] or None; kwargs has scaling
    and dropout. Returns the mix of values [B, T, H, D] and the attention weights [B, H, T, S].
    """
    scores = query @ key.transpose(-1, -2) * kwargs["scaling"]  # [B, H, T, S]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=kwargs.get("dropout", 0.0), training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MiniGPTAttention(nn.Module):
    """Causal multi-head self-attention; the kernel is the one `config._attn_implementation` names."""

    is_causal = True

    def __init__(self, config: MiniGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj.feeds_residual = True
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] to [B, T, C], and the attention weights [B, H, T, S] where the kernel has them (eager)."""
        per_head = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(per_head).transpose(1, 2)  # [B, H, T, D]
        key = self.k_proj(hidden_states).view(per_head).transpose(1, 2)
        value = self.v_proj(hidden_states).view(per_head).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, H, S, D]

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        kwargs |= {"scaling": self.scaling, "dropout": self.config.attn_pdrop if self.training else 0.0}
        mixed, weights = attend(self, query, key, value, attention_mask, **kwargs)
        mixed = mixed.reshape(*hidden_states.shape[:-1], -1)  # [B, T, H, D] -> [B, T, C]
        return self.resid_dropout(self.o_proj(mixed)), weights


class MiniGPTMLP(nn.Module):
    """Two linear maps, [B, T, C] to [B, T, C] through the wider intermediate size."""

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        # the same tanh approximation: "gelu_new" spells it out in seven operations, torch has it in one kernel
        self.act_fn = ACT2FN["gelu_pytorch_tanh" if config.hidden_act == "gelu_new" else config.hidden_act]
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.down_proj.feeds_residual = True
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.resid_dropout(self.down_proj(self.act_fn(self.up_proj(hidden_states))))


class MiniGPTLayer(GradientCheckpointingLayer):
    """One pre-norm block: what attention and then the MLP say is added to the residual stream [B, T, C]."""

    def __init__(self, config: MiniGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attn = MiniGPTAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MiniGPTMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MiniGPTPreTrainedModel(PreTrainedModel):
    """What every MiniGPT class shares: initialisation, saving, and what the model tells transformers it can do."""

    config_class = MiniGPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniGPTLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MiniGPTLayer, "attentions": MiniGPTAttention}
    # GPT-2 checkpoints from before 2023 carry their causal masks
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's start: normal weights, zero biases, and residual projections smaller by sqrt(2 * layers).

        The mark is on the Linear itself: transformers never calls this for a module that has no parameter of its own.
        """
        super()._init_weights(module)
        if getattr(module, "feeds_residual", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save weights in MiniGPT's own layout, with the code that loads them anywhere (`trust_remote_code=True`).

        Takes the arguments of `PreTrainedModel.save_pretrained`. A model that came from a GPT-2 checkpoint is saved as
        a MiniGPT too: tensor-parallel loaders and inference servers cannot read the transposed layout.
        """
        kwargs.setdefault("save_original_format", False)
        self.config.auto_map = dict(AUTO_MAP)
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            for name in CODE_FILES:
                source, destination = Path(__file__).with_name(name), Path(save_directory, name)
                if not (destination.exists() and destination.samefile(source)):
                    shutil.copyfile(source, destination)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)


class MiniGPTModel(MiniGPTPreTrainedModel):
    """Token and position embeddings, the layers, and a last LayerNorm: token ids to hidden states [B, T, C]."""

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList([MiniGPTLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] or inputs_embeds [B, T, C]; attention_mask [B, S], 1 for real tokens, or 4-d as it is.

        position_ids [B, T] default to the count of tokens before. Without mask and cache, positions that restart
        within a row mark packed documents, which do not attend to each other.
        Raises ValueError for positions beyond the table and for token ids outside the vocabulary; ids that are
        on an accelerator are checked by `generate` alone, since looking at them would make it wait for the device.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = look_up(self.embed_tokens, input_ids, "token id", "vocab_size")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        # position_ids as the caller gave them: with none, no mask need be built and sdpa's causal kernel is used
        mask = create_causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values=past_key_values, position_ids=position_ids
        )
        positions = self.default_positions(inputs_embeds, past_key_values) if position_ids is None else position_ids
        position_embeds = look_up(self.embed_positions, positions, "position", "max_position_embeddings")
        hidden_states = self.dropout(inputs_embeds + position_embeds.to(inputs_embeds.device))
        kwargs |= {"attention_mask": mask, "past_key_values": past_key_values, "position_ids": position_ids}
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def default_positions(self, inputs_embeds: Tensor, past_key_values: Cache | None) -> Tensor:
        """[1, T]: the positions that follow the cached tokens. Raises ValueError when they leave the table."""
        past_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
        new_tokens, limit = inputs_embeds.shape[1], self.config.max_position_embeddings
        # a static cache counts on the device, where a look would wait for it; `generate` checks by itself
        if isinstance(past_tokens, int) and not torch.compiler.is_compiling() and past_tokens + new_tokens > limit:
            raise ValueError(f"{past_tokens} cached + {new_tokens} new tokens exceed max_position_embeddings={limit}")
        return (torch.arange(new_tokens, device=inputs_embeds.device) + past_tokens).unsqueeze(0)


def look_up(table: nn.Embedding, ids: Tensor, what: str, limit_name: str) -> Tensor:
    """Rows of `table` for `ids`; on a CPU, an id outside it is a ValueError that says which (at no cost else)."""
    try:
        return table(ids)
    except IndexError as error:
        raise out_of_range(what, ids, limit_name, table.num_embeddings) from error


def out_of_range(what: str, ids: Tensor, limit_name: str, limit: int) -> ValueError:
    """The error for ids outside 0 .. limit - 1, with the worst of them in it."""
    lowest, highest = int(ids.min()), int(ids.max())
    return ValueError(f"{what} {lowest if lowest < 0 else highest} is outside 0 .. {limit - 1} ({limit_name}={limit})")


class MiniGPTForCausalLM(MiniGPTPreTrainedModel, GenerationMixin):
    """The language model: MiniGPTModel and a linear head to the vocabulary, tied to the token embedding by default."""

    _tied_weights_keys = {"lm_head.weight": "transformer.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__(config)
        self.transformer = MiniGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] (the last `logits_to_keep`, or those positions), and the loss when there are targets.

        labels [B, T] are unshifted, usually the input_ids: position t is scored on label t + 1.
        shift_labels [B, T] are targets already shifted: position t is scored on target t, the last one too.
        -100 is ignored in both. The loss is in nats: the mean over targets, or with `num_items_in_batch` their sum
        divided by that number. With skip_logits the output holds the loss alone, so that nothing of size T * V is
        handed on (mixed precision would copy it).
        """
        outputs = self.transformer(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
        loss = None
        if shift_labels is not None:
            kwargs |= {"shift_labels": shift_labels.contiguous(), "vocab_size": self.config.vocab_size}
            loss = self.loss_function(logits=logits, labels=labels, **kwargs)
        elif skip_logits:
            raise ValueError("skip_logits=True leaves nothing to return without labels or shift_labels")
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if skip_logits else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate` after a look at the prompt: on a GPU a wrong id would end the process."""
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        vocab_size = self.config.vocab_size
        if prompt is not None and prompt.numel() and bool(((prompt < 0) | (prompt >= vocab_size)).any()):
            raise out_of_range("token id", prompt, "vocab_size", vocab_size)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The library's inputs for one decoding step. Raises ValueError where it would leave the position table."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        limit, positions = self.config.max_position_embeddings, model_inputs.get("position_ids")
        # left padding takes no position: only a sequence longer than the table is worth a look at the device
        if input_ids.shape[1] > limit and positions is not None and int(positions.max()) >= limit:
            raise out_of_range("position", positions, "max_position_embeddings", limit)
        return model_inputs


class MiniGPTForSequenceClassification(GenericForSequenceClassification, MiniGPTPreTrainedModel):
    """A label for the whole text, read off its last token that is no padding."""

    base_model_prefix = "transformer"

    def __init__(self, config: MiniGPTConfig) -> None:
        # not the mixin's own, which builds its base by auto.AutoModel: that asks for trust when run as remote code
        MiniGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = MiniGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class MiniGPTForTokenClassification(GenericForTokenClassification, MiniGPTPreTrainedModel):
    """A label for each token."""

    base_model_prefix = "transformer"

    def __init__(self, config: MiniGPTConfig) -> None:
        MiniGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = MiniGPTModel(config)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class MiniGPTForQuestionAnswering(GenericForQuestionAnswering, MiniGPTPreTrainedModel):
    """Where in the text the answer starts and ends: two scores for each token."""

    base_model_prefix = "transformer"

    def __init__(self, config: MiniGPTConfig) -> None:
        MiniGPTPreTrainedModel.__init__(self, config)
        self.transformer = MiniGPTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


# GPT-2's names on the left, ours on the right. Its Conv1D weights are [in, out] where Linear's are [out, in], and
# its c_attn is q, k and v in one. `from_pretrained` applies whatever matches; our own names never do.
QKV = [f"self_attn.{name}_proj" for name in "qkv"]
GPT2_WEIGHT_TABLE = [
    WeightRenaming("wte.weight", "embed_tokens.weight"),
    WeightRenaming("wpe.weight", "embed_positions.weight"),
    WeightRenaming(r"(?<![A-Za-z])h\.(\d+)\.", r"layers.\1."),
    WeightRenaming("ln_1", "input_layernorm"),
    WeightRenaming("ln_2", "post_attention_layernorm"),
    WeightRenaming("ln_f", r"(?<![A-Za-z])norm"),  # read backwards, "norm" must not match in "layernorm"
    WeightRenaming("attn.c_proj.bias", "self_attn.o_proj.bias"),
    WeightRenaming("mlp.c_fc.bias", "mlp.up_proj.bias"),
    WeightRenaming("mlp.c_proj.bias", "mlp.down_proj.bias"),
    WeightConverter("attn.c_attn.bias", [f"{name}.bias" for name in QKV], operations=[Chunk(0)]),
    WeightConverter("attn.c_attn.weight", [f"{name}.weight" for name in QKV], operations=[Transpose(0, 1), Chunk(0)]),
    WeightConverter("attn.c_proj.weight", "self_attn.o_proj.weight", operations=[Transpose(0, 1)]),
    WeightConverter("mlp.c_fc.weight", "mlp.up_proj.weight", operations=[Transpose(0, 1)]),
    WeightConverter("mlp.c_proj.weight", "mlp.down_proj.weight", operations=[Transpose(0, 1)]),
]
register_checkpoint_conversion_mapping("minigpt", GPT2_WEIGHT_TABLE, overwrite=True)

AUTO_CLASSES = {
    auto.AutoModel: MiniGPTModel,
    auto.AutoModelForCausalLM: MiniGPTForCausalLM,
    auto.AutoModelForSequenceClassification: MiniGPTForSequenceClassification,
    auto.AutoModelForTokenClassification: MiniGPTForTokenClassification,
    auto.AutoModelForQuestionAnswering: MiniGPTForQuestionAnswering,
}
CODE_FILES = ("configuration_minigpt.py", "modeling_minigpt.py")
AUTO_MAP = {"AutoConfig": "configuration_minigpt.MiniGPTConfig"} | {
    auto_class.__name__: f"modeling_minigpt.{model_class.__name__}" for auto_class, model_class in AUTO_CLASSES.items()
}
if not __package__:  # the project's own module; code loaded from a model folder leaves the registry alone
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(MiniGPTConfig, model_class, exist_ok=True)

__all__ = ["MiniGPTPreTrainedModel"] + [model_class.__name__ for model_class in AUTO_CLASSES.values()]
