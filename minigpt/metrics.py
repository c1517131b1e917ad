"""What do the numbers mean? Names, units and formulas of everything that a run measures."""

import math
from typing import Any

import torch

# Dense bfloat16 peak of one device, FLOP/s, from the makers' data sheets. The first name that fits counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A6000": 155e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of `device`, FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def train_flops_per_token(parameters: int, config: Any, block_size: int) -> float:
    """FLOPs of forward and backward for one token, attention over the whole block counted.

    Looking a position up is no arithmetic, so its table does not count; the token embedding does, as the output head.
    Source: Chowdhery et al. 2022 (arXiv:2204.02311), appendix B.
    """
    multiplied = parameters - config.max_position_embeddings * config.hidden_size
    if not config.tie_word_embeddings:
        multiplied -= config.vocab_size * config.hidden_size
    return 6 * multiplied + 12 * config.num_hidden_layers * config.hidden_size * block_size


def validation_metrics(loss_nats: float, targets: int, text_bytes: int | None) -> dict[str, float]:
    """`val/…` from the summed loss (nats) over all `targets` tokens of a split of `text_bytes` UTF-8 bytes."""
    mean = loss_nats / targets
    metrics = {"val/loss": mean, "val/perplexity": math.exp(min(mean, 700.0))}
    if text_bytes:
        metrics["val/bits_per_byte"] = loss_nats / math.log(2) / text_bytes
    return metrics


def as_float(number: Any) -> float:
    """A number on the host; FSDP2 hands out sharded ones, and what was not measured is 0."""
    whole = number.full_tensor() if hasattr(number, "full_tensor") else number
    return float(whole or 0.0)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: by the allocator on a GPU, by the process elsewhere. GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
