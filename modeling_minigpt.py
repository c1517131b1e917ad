"""MiniGPT: GPT-2's architecture as a transformers model, in one short file.

From top to bottom: attention, MLP, layer, the base model, the language model, three task heads, and the table that
maps GPT-2 checkpoints to MiniGPT's parameters. This file is copied into the folder of every saved model, so it imports
only configuration_minigpt.py from the project.

Shapes: B batch, T tokens of this call, S tokens attended to (T plus the cached ones), C hidden size, H heads,
D = C / H head size, V vocabulary size.
"""
# ruff: noqa: RUF012 - transformers reads these class attributes; they are never modified

import inspect
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
    if __package__:  # inside a package the relative import must work, so its error is the right one to show
        raise
    from configuration_minigpt import MiniGPTConfig

# transformers 5.24 renamed this argument of `create_causal_mask`
MASK_CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ · scaling + mask) V, in plain operations. The other kernels do not return the attention weights.

    query is [B, H, T, D], key and value are [B, H, S, D]; attention_mask [B, 1, T, S] is added to the scores.
    kwargs holds scaling and dropout. Returns the mixed values [B, T, H, D] and the attention weights [B, H, T, S].
    """
    scores = query @ key.transpose(-1, -2) * kwargs["scaling"]  # [B, H, T, S]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=kwargs.get("dropout", 0.0), training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MiniGPTAttention(nn.Module):
    """Causal multi-head self-attention. `config._attn_implementation` selects the kernel."""

    is_causal = True  # kernels that get no mask read this

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
        self.o_proj.feeds_residual = True  # for _init_weights
        self.attn_dropout = nn.Dropout(config.attn_pdrop)  # a module, because tools switch dropout off in modules
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] to [B, T, C], plus the attention weights [B, H, T, S] (None unless the kernel is eager)."""
        device_type = hidden_states.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            # once, not in each of the three projections, which would also keep three copies for the backward pass
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
        per_head = (*hidden_states.shape[:-1], -1, self.head_dim)  # [B, T, H, D]
        # each [B, H, T, D]
        query, key, value = (states.view(per_head).transpose(1, 2) for states in self.project_qkv(hidden_states))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, H, S, D]

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        kwargs |= {"scaling": self.scaling, "dropout": self.attn_dropout.p if self.training else 0.0}
        mixed, weights = attend(self, query, key, value, attention_mask, **kwargs)
        mixed = mixed.reshape(*hidden_states.shape[:-1], -1)  # [B, T, H, D] -> [B, T, C]
        return self.resid_dropout(self.o_proj(mixed)), weights

    def project_qkv(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, each [B, T, C]."""
        return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)


class MiniGPTMLP(nn.Module):
    """Feed-forward network: [B, T, C] to the intermediate size and back to [B, T, C]."""

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        # both names are the tanh approximation of GELU: "gelu_new" takes seven operations, torch's kernel takes one
        self.act_fn = ACT2FN["gelu_pytorch_tanh" if config.hidden_act == "gelu_new" else config.hidden_act]
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.down_proj.feeds_residual = True
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.resid_dropout(self.down_proj(self.act_fn(self.up_proj(hidden_states))))


class MiniGPTLayer(GradientCheckpointingLayer):
    """One pre-norm block: adds the outputs of attention and of the MLP to the residual stream [B, T, C]."""

    def __init__(self, config: MiniGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attn = MiniGPTAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MiniGPTMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attention_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MiniGPTPreTrainedModel(PreTrainedModel):
    """Base class of all MiniGPT models: initialization, saving, and the features declared to transformers."""

    config: MiniGPTConfig
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
    # GPT-2 checkpoints from before 2023 contain the causal masks
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as GPT-2: normal weights, zero biases, residual projections scaled by 1 / sqrt(2 * layers).

        The residual projections are marked with `feeds_residual`, because transformers calls this method only for
        modules that own parameters: a test for MiniGPTAttention or MiniGPTMLP would never be reached.
        """
        super()._init_weights(module)
        if getattr(module, "feeds_residual", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save the model and the code that loads it anywhere with `trust_remote_code=True`.

        Takes the arguments of `PreTrainedModel.save_pretrained`. A model that was loaded from a GPT-2 checkpoint is
        saved in MiniGPT's layout too: tensor-parallel loading and inference servers cannot read the transposed one.
        With an adapter only the adapter is saved, which needs no code.
        """
        kwargs.setdefault("save_original_format", False)
        self.config.auto_map = dict(AUTO_MAP)
        if is_main_process and not self._hf_peft_config_loaded:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            for name in CODE_FILES:
                source, destination = Path(__file__).with_name(name), Path(save_directory, name)
                if not (destination.exists() and destination.samefile(source)):
                    shutil.copyfile(source, destination)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)


class MiniGPTModel(MiniGPTPreTrainedModel):
    """Token and position embeddings, the layers and a final LayerNorm: token ids to hidden states [B, T, C]."""

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
        """Hidden states [B, T, C] of input_ids [B, T] or inputs_embeds [B, T, C].

        attention_mask is [B, S] with 1 for real tokens and 0 for padding, or a 4-d mask that is used unchanged.
        position_ids [B, T] default to the number of preceding tokens. Without a mask and a cache, positions that
        restart within a row separate packed documents, which do not attend to each other.
        Raises ValueError for positions outside the table and for token ids outside the vocabulary. On an accelerator
        only `generate` checks the ids, because a check in each forward pass would make the host wait for the device.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = look_up(self.embed_tokens, input_ids, "token id", "vocab_size")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        # the caller's position_ids, not the default ones: without any, sdpa needs no mask and uses its causal kernel
        cache = {MASK_CACHE_ARGUMENT: past_key_values}
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, position_ids=position_ids, **cache)
        positions = self.default_positions(inputs_embeds, past_key_values) if position_ids is None else position_ids
        position_embeds = look_up(self.embed_positions, positions, "position", "max_position_embeddings")
        hidden_states = self.dropout(inputs_embeds + position_embeds.to(inputs_embeds.device))
        kwargs |= {"attention_mask": mask, "past_key_values": past_key_values, "position_ids": position_ids}
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def default_positions(self, inputs_embeds: Tensor, past_key_values: Cache | None) -> Tensor:
        """The positions [1, T] after the cached tokens. Raises ValueError if they do not fit in the table."""
        past_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
        new_tokens, limit = inputs_embeds.shape[1], self.config.max_position_embeddings
        # a static cache has its length on the device, and reading it makes the host wait; `generate` has its own check
        if isinstance(past_tokens, int) and not torch.compiler.is_compiling() and past_tokens + new_tokens > limit:
            raise ValueError(f"{past_tokens} cached + {new_tokens} new tokens exceed max_position_embeddings={limit}")
        return (torch.arange(new_tokens, device=inputs_embeds.device) + past_tokens).unsqueeze(0)


def look_up(table: nn.Embedding, ids: Tensor, id_name: str, limit_name: str) -> Tensor:
    """The rows of `table` for `ids`. Raises ValueError that names an id outside the table (on a CPU only)."""
    try:
        return table(ids)
    except IndexError as error:
        raise out_of_range(id_name, ids, limit_name, table.num_embeddings) from error


def out_of_range(id_name: str, ids: Tensor, limit_name: str, limit: int) -> ValueError:
    """The error for `ids` that are not all in 0 .. limit - 1; its message names one that is not."""
    lowest, highest = int(ids.min()), int(ids.max())
    wrong_id = lowest if lowest < 0 else highest
    return ValueError(f"{id_name} {wrong_id} is outside 0 .. {limit - 1} ({limit_name}={limit})")


class MiniGPTForCausalLM(MiniGPTPreTrainedModel, GenerationMixin):
    """Language model: MiniGPTModel and a linear head over the vocabulary, tied to the token embedding by default."""

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
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], and the loss if there are labels.

        labels [B, T] are unshifted, usually equal to input_ids: position t predicts label t + 1.
        shift_labels [B, T] are shifted already: position t predicts label t, including the last position.
        A label of -100 is ignored. The loss is in nats: the mean over all other labels, or their sum divided by
        num_items_in_batch if that is given. logits_to_keep limits the logits to the last positions (an int; 0 keeps
        all) or to the given positions (a tensor). skip_logits returns the loss without the logits, which mixed
        precision would otherwise copy to float32.
        """
        # not in the signature: the Trainer evaluates no batch that lacks one of the labels that the signature names
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.transformer(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        kept_positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept_positions, :])
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
        """`GenerationMixin.generate`, with the prompt's ids checked first: on a GPU a wrong id aborts the process."""
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        vocab_size = self.config.vocab_size
        if prompt is not None and prompt.numel() and bool(((prompt < 0) | (prompt >= vocab_size)).any()):
            raise out_of_range("token id", prompt, "vocab_size", vocab_size)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs of one decoding step. Raises ValueError if a position does not fit in the table."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        limit, positions = self.config.max_position_embeddings, model_inputs.get("position_ids")
        # padding on the left takes no position, so a longer sequence may fit; reading positions makes the host wait
        if input_ids.shape[1] > limit and positions is not None and int(positions.max()) >= limit:
            raise out_of_range("position", positions, "max_position_embeddings", limit)
        return model_inputs


class MiniGPTForSequenceClassification(GenericForSequenceClassification, MiniGPTPreTrainedModel):
    """One label for the whole text, from its last token that is not padding."""

    base_model_prefix = "transformer"

    def __init__(self, config: MiniGPTConfig) -> None:
        # not the mixin's __init__: its AutoModel.from_config asks for trust_remote_code when this is remote code
        MiniGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = MiniGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class MiniGPTForTokenClassification(GenericForTokenClassification, MiniGPTPreTrainedModel):
    """One label for each token."""

    base_model_prefix = "transformer"

    def __init__(self, config: MiniGPTConfig) -> None:
        MiniGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = MiniGPTModel(config)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class MiniGPTForQuestionAnswering(GenericForQuestionAnswering, MiniGPTPreTrainedModel):
    """Two scores for each token: whether the answer starts there, and whether it ends there."""

    base_model_prefix = "transformer"

    def __init__(self, config: MiniGPTConfig) -> None:
        MiniGPTPreTrainedModel.__init__(self, config)
        self.transformer = MiniGPTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


# GPT-2's names on the left, MiniGPT's on the right. GPT-2's Conv1D weights are [in, out], those of nn.Linear are
# [out, in], and c_attn holds q, k and v in one matrix. `from_pretrained` applies every entry whose left side matches a
# name in the checkpoint; MiniGPT's names match none.
QKV = [f"self_attn.{name}_proj" for name in "qkv"]
GPT2_WEIGHT_TABLE = [
    WeightRenaming("wte.weight", "embed_tokens.weight"),
    WeightRenaming("wpe.weight", "embed_positions.weight"),
    WeightRenaming(r"(?<![A-Za-z])h\.(\d+)\.", r"layers.\1."),
    WeightRenaming("ln_1", "input_layernorm"),
    WeightRenaming("ln_2", "post_attention_layernorm"),
    WeightRenaming("ln_f", r"(?<![A-Za-z])norm"),  # in reverse, "norm" must not match "layernorm"
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
if not __package__:  # the project's module; a copy loaded from a model folder must not change the registry
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(MiniGPTConfig, model_class, exist_ok=True)

__all__ = ["MiniGPTPreTrainedModel"] + [model_class.__name__ for model_class in AUTO_CLASSES.values()]
