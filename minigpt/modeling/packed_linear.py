"""Linear layers packed for oneDNN: faster inference on a CPU.

Decoding multiplies each weight matrix with a row or a few, which is as fast as the weights arrive; in the layout in
which they are trained, the usual kernels reach a fraction of that. A packed model computes the same, for inference
alone: it can be neither trained nor saved.
"""

import weakref
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

# A packed weight is opaque to torch.compile, so a compiled graph knows it by its number.
_PACKED: dict[int, tuple[Tensor, Tensor | None]] = {}

_numbers = count()


class PackedLinear(nn.Module):
    """`nn.Linear` over a packed weight: [..., in] to [..., out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        self.number = next(_numbers)
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        _PACKED[self.number] = packed, linear.bias
        weakref.finalize(self, _PACKED.pop, self.number)

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _packed_linear(inputs, self.number, self.out_features)
        weight, bias = _PACKED[self.number]
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


@torch.library.custom_op("minigpt::packed_linear", mutates_args=())
def _packed_linear(inputs: Tensor, number: int, out_features: int) -> Tensor:
    weight, bias = _PACKED[number]
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


@_packed_linear.register_fake
def _(inputs: Tensor, number: int, out_features: int) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], out_features)


def pack_linears(model: Any) -> Any:
    """Replace every `nn.Linear` of a MiniGPT on the CPU by a packed one, in place. Returns the model.

    Left as it is: a model elsewhere, of a foreign class (which may look at its weights), or of a dtype for which this
    CPU has no instructions.
    """
    if model.device.type != "cpu" or model.config.model_type != "minigpt" or not _has_kernels(model.dtype):
        return model
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
    return model


def _has_kernels(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    supported = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and bool(supported[dtype]())
