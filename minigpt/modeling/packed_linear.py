"""Faster inference on a CPU: the weights of linear layers in oneDNN's packed layout.

`pack_linears` is the only entry point. While decoding, each weight matrix is multiplied by one row or a few, and the
time is that of reading the weights. PyTorch's kernels for the usual layout reach a fraction of the memory bandwidth;
oneDNN's packed layout is faster and computes the same function. Queries, keys and values come from one product.
"""

import weakref
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_minigpt import MiniGPTAttention

_Model = TypeVar("_Model", bound=PreTrainedModel)

# Packed weight and bias by number: torch.compile cannot trace an opaque packed tensor, so a graph holds the number.
_PACKED_WEIGHTS: dict[int, tuple[Tensor, Tensor | None]] = {}

_next_number = count()


def pack_linears(model: _Model) -> _Model:
    """Pack every `nn.Linear` of a MiniGPT in place and return the model. For inference only.

    A packed model can be neither trained nor saved. The model is returned unchanged if it is not on a CPU, is not a
    MiniGPT (other classes may read their weights directly), or has a dtype for which this CPU has no oneDNN kernels.
    """
    if model.device.type != "cpu" or model.config.model_type != "minigpt" or not _has_kernels(model.dtype):
        return model
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is MiniGPTAttention and all(type(linear) is nn.Linear for linear in _qkv(child)):
                setattr(parent, name, PackedAttention(child))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child.weight, child.bias))
    return model


def _qkv(attention: MiniGPTAttention) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return attention.q_proj, attention.k_proj, attention.v_proj


class PackedLinear(nn.Module):
    """`nn.Linear` with a packed weight: [..., in] to [..., out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features = len(weight)
        self.number = next(_next_number)
        packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        _PACKED_WEIGHTS[self.number] = packed_weight, bias
        weakref.finalize(self, _PACKED_WEIGHTS.pop, self.number)

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _packed_linear_op(inputs, self.number, self.out_features)
        return _packed_linear(inputs, self.number, self.out_features)  # without the overhead of a custom op


class PackedAttention(MiniGPTAttention):
    """Attention whose queries, keys and values come from one packed product."""

    def __init__(self, attention: MiniGPTAttention) -> None:
        with torch.device("meta"):  # the weights are replaced
            super().__init__(attention.config, attention.layer_idx)
        self.train(attention.training)
        self.o_proj = attention.o_proj
        linears = _qkv(attention)
        del self.q_proj, self.k_proj, self.v_proj
        with torch.no_grad():
            weight = torch.cat([linear.weight for linear in linears])
            bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
        self.qkv_proj = PackedLinear(weight, bias)

    def project_qkv(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv_proj(hidden_states).chunk(3, dim=-1)
        return query, key, value


def _packed_linear(inputs: Tensor, number: int, out_features: int) -> Tensor:
    weight, bias = _PACKED_WEIGHTS[number]
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


_packed_linear_op = torch.library.custom_op("minigpt::packed_linear", _packed_linear, mutates_args=())


@_packed_linear_op.register_fake
def _(inputs: Tensor, number: int, out_features: int) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], out_features)


def _has_kernels(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of `dtype` on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32
