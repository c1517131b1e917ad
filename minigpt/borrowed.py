"""How is a model that may be in training borrowed, and given back as if nothing had happened?"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def seeded(seed: int, device: Any) -> Iterator[None]:
    """Random numbers that follow from `seed`, on the CPU and on `device`; afterwards the global state is as before."""
    import torch

    generators = [torch.random] if device.type == "cpu" else [torch.random, torch.get_device_module(device)]
    states = [generator.get_rng_state() for generator in generators]
    torch.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_rng_state(state)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout); afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
