"""Decode with a cache of fixed size, which lets the decoding step be compiled."""

from collections.abc import Callable
from typing import Any

from transformers import CompileConfig, PreTrainedModel

from minigpt.generation.sampling import context_length

Backend = str | Callable[..., Any]  # of torch.compile


def use_static_cache(model: PreTrainedModel, compile_backend: Backend | None = None) -> None:
    """Make `model.generate` keep keys and values in a cache of fixed size. The text stays the same.

    With `compile_backend`, it also compiles the decoding step. The cache then holds the whole
    context, so that prompts of every length share one compilation.
    """
    config = model.generation_config
    config.cache_implementation = "static"
    config.disable_compile = compile_backend is None  # transformers would compile on a GPU without being asked
    if compile_backend is not None:
        config.compile_config = compile_config(model.device.type, compile_backend)
        config.max_cache_len = context_length(model)


def compile_config(device_type: str, backend: Backend = "inductor", fullgraph: bool = False) -> CompileConfig:
    """How `generate` compiles the decoding step: on a GPU with CUDA graphs, which start all kernels at once."""
    has_graphs = device_type == "cuda" and backend == "inductor"
    config = CompileConfig(fullgraph=fullgraph, backend=backend, mode="reduce-overhead" if has_graphs else "default")
    config._compile_all_devices = True  # type: ignore[assignment]  # transformers compiles on accelerators only otherwise
    return config
