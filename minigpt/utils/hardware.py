"""Peak FLOP/s and peak memory of a device."""

import math

import torch

# Dense bfloat16 peak of one device in FLOP/s, from the manufacturer's data sheets; V100 and T4 have no bfloat16, so
# float16. The first key that is part of the device's name counts, so a longer name comes before its own prefix.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A6000": 155e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of `device` in FLOP/s; None if it is unknown."""
    if device.type != "cuda":
        return None
    device_name = torch.cuda.get_device_name(device)
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Largest amount of memory in use so far, in GiB.

    On CUDA the memory of PyTorch's allocator, on MPS the memory that the driver holds now (it keeps no maximum),
    elsewhere the resident memory of the process. NaN on Windows.
    """
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
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
