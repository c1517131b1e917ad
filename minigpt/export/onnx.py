"""Export a MiniGPT to ONNX, which ONNX Runtime and transformers.js run.

Shapes: B batch, T tokens of this call, P tokens in the cache, H heads, D head size, V vocabulary.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from minigpt.export.source import Source, empty_folder, load_source, portable_chat_template
from minigpt.modeling.gpt2 import gpt2_config
from minigpt.utils.errors import UserError
from minigpt.utils.files import PARTIAL, delete, new_parents, publish_folder
from modeling_minigpt import MiniGPTForCausalLM

if TYPE_CHECKING:
    from onnx import ModelProto

# The names that transformers.js looks for; its `dtype` for int8 is "q8", the default in a browser without WebGPU
FILE_NAMES = {"fp32": "model", "fp16": "model_fp16", "int8": "model_quantized", "q4": "model_q4"}
OPSET = 20  # the first with Gelu
MAX_FILE_BYTES = 2**31 - 2**20  # of a protobuf message, with room for the graph
BLOCK_SIZE = 32  # weights that share a scale in 4 bits


def export_onnx(source: str | Path, destination: str | Path, dtypes: Sequence[str] = ("fp32",)) -> list[str]:
    """Write the MiniGPT in `source` (a folder or Hub name) as a folder for ONNX Runtime and transformers.js.

    The folder holds one file in onnx/ for each of `dtypes` (keys of FILE_NAMES), the config of a GPT-2, the tokenizer
    and the generation config. Inputs of a graph are input_ids [B, T], attention_mask [B, P + T], position_ids [B, T]
    and past_key_values.N.key and .value [B, H, P, D] for each layer; outputs are logits [B, T, V] and present.N.key
    and .value [B, H, P + T, D], which are the next call's past_key_values. All of them are float32 or int64. In "int8"
    and "q4" the weights have 8 and 4 bits, and "fp16" computes in float16.
    Returns notes for the user. Raises UserError if a package is missing, `destination` is not empty, or ONNX cannot
    carry the model.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f'this needs the {error.name} package: pip install "minigpt-lm[onnx]"') from error
    folder = empty_folder(Path(destination).expanduser())
    loaded = load_source(source, "ONNX")
    weight_bytes = sum(parameter.nbytes for parameter in loaded.model.parameters())
    if weight_bytes > MAX_FILE_BYTES:
        raise UserError(
            f"{source} has {weight_bytes / 2**30:.1f} GiB of weights in float32, but an ONNX file holds 2 GiB; "
            "export it to GGUF"
        )
    partial = folder.with_name(folder.name + PARTIAL)
    with new_parents(folder):
        if os.path.lexists(partial):
            delete(partial)
        try:
            _write(partial, loaded, dtypes)
            publish_folder(partial, folder)
        except BaseException:
            if os.path.lexists(partial):
                delete(partial)
            raise
    return loaded.notes


def _write(folder: Path, source: Source, dtypes: Sequence[str]) -> None:
    """Write all files of an export."""
    (folder / "onnx").mkdir(parents=True)
    config = gpt2_config(source.model.config)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder)
    assert source.model.generation_config is not None
    source.model.generation_config.save_pretrained(folder)
    if source.tokenizer.chat_template:
        source.tokenizer.chat_template = portable_chat_template(source.tokenizer)
    source.tokenizer.save_pretrained(folder, save_jinja_files=False)  # transformers.js reads tokenizer_config.json
    with _quiet():
        graph = onnx_graph(source.model)
        for dtype in dtypes:
            _save(graph, dtype, folder / "onnx" / f"{FILE_NAMES[dtype]}.onnx")


class _FlatCache(nn.Module):
    """The model with its cache as a list of tensors: keys and values of layer 0, of layer 1 and so on."""

    def __init__(self, model: MiniGPTForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        logits = self.model(input_ids, attention_mask, position_ids, cache, use_cache=True).logits
        layers = cast(list[DynamicLayer], cache.layers)
        return logits, [cast(Tensor, tensor) for layer in layers for tensor in (layer.keys, layer.values)]


def onnx_graph(model: MiniGPTForCausalLM) -> "ModelProto":
    """The ONNX graph of a model in float32, with its weights."""
    config = model.config
    tensors = 2 * config.num_hidden_layers
    head_size = config.hidden_size // config.num_attention_heads
    batch, new, past = 2, 3, 4  # an example; all three stay variable
    names = [f".{number // 2}.{'value' if number % 2 else 'key'}" for number in range(tensors)]
    example = (
        torch.zeros(batch, new, dtype=torch.long),
        torch.ones(batch, past + new, dtype=torch.long),
        torch.zeros(batch, new, dtype=torch.long),
        [torch.zeros(batch, config.num_attention_heads, past, head_size) for _ in names],
    )
    with torch.no_grad():
        program = torch.onnx.export(
            _FlatCache(model).eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values{name}" for name in names)],
            output_names=["logits", *(f"present{name}" for name in names)],
            dynamic_shapes={
                "input_ids": {0: "batch_size", 1: "sequence_length"},
                "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
                "position_ids": {0: "batch_size", 1: "sequence_length"},
                "past": [{0: "batch_size", 2: "past_sequence_length"}] * tensors,
            },
        )
    assert program is not None
    return program.model_proto


def _save(graph: "ModelProto", dtype: str, path: Path) -> None:
    """Write the float32 graph to a file in `dtype`."""
    import onnx

    if dtype == "fp32":
        onnx.save(graph, path)
    elif dtype == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(_copy(graph), keep_io_types=True), path)
    elif dtype == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            _with_folded_transposes(graph), path, per_channel=True, weight_type=QuantType.QInt8, reduce_range=True
        )  # 7 bits: with 8, processors without VNNI would overflow
    else:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(_with_folded_transposes(graph), bits=4, block_size=BLOCK_SIZE)
        quantizer.process()
        onnx.save(quantizer.model.model, path)


def _copy(graph: "ModelProto") -> "ModelProto":
    copy = type(graph)()
    copy.CopyFrom(graph)
    return copy


def _with_folded_transposes(graph: "ModelProto") -> "ModelProto":
    """A copy in which each transposed weight is a weight of its own.

    The tied head multiplies by the transpose of the embedding; the quantizers only replace matrices that are stored.
    """
    from onnx import numpy_helper

    graph = _copy(graph)
    weights = {weight.name: weight for weight in graph.graph.initializer}
    for node in list(graph.graph.node):
        if node.op_type == "Transpose" and node.input[0] in weights:
            values = numpy_helper.to_array(weights[node.input[0]]).transpose(list(node.attribute[0].ints))
            graph.graph.initializer.append(numpy_helper.from_array(values.copy(), node.output[0]))
            graph.graph.node.remove(node)
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress and no warnings of the exporter, of onnxscript and of the quantizers."""
    loggers: list[Any] = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "onnxruntime")]
    loggers.append(logging.getLogger())  # the quantizers write to the root
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
