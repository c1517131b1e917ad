"""The figures of known GPUs, and the peak memory and speed of a device."""

import math
import re
import shutil
import time
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Link:
    """What connects the GPUs of a node. `bytes_per_s` is that of one GPU in one direction."""

    bytes_per_s: float
    hop_s: float  # latency of one step of a ring
    network_bytes_per_s: float  # of a node, to other nodes, in the machines that usually have this link


GB = 1e9
GBIT = 1e9 / 8
# Bandwidth: NVIDIA's data sheets and AMD's for MI300X name the sum of both directions; PCIe has 16 lanes of 8, 16 or
# 32 GT/s with 128b/130b coding. Hops: the latency of a ring in NCCL's model (src/graph/tuning.cc, protocol Simple).
# Networks: DGX V100 4 x 100, DGX A100 8 x 200, DGX H100 and MI300X platforms 8 x 400 Gbit/s; PCIe machines 100 Gbit/s.
LINKS = {
    "NVLink 5": Link(900 * GB, 3.4e-6, 8 * 400 * GBIT),
    "NVLink 4": Link(450 * GB, 3.4e-6, 8 * 400 * GBIT),
    "NVLink 3": Link(300 * GB, 3.4e-6, 8 * 200 * GBIT),
    "NVLink 2": Link(150 * GB, 3.4e-6, 4 * 100 * GBIT),
    "Infinity Fabric": Link(7 * 64 * GB, 3.4e-6, 8 * 400 * GBIT),
    "PCIe 5": Link(63.0 * GB, 5.7e-6, 100 * GBIT),
    "PCIe 4": Link(31.5 * GB, 5.7e-6, 100 * GBIT),
    "PCIe 3": Link(15.75 * GB, 5.7e-6, 100 * GBIT),
}


@dataclass(frozen=True)
class Gpu:
    """Figures of the data sheet: dense bfloat16 peak in FLOP/s, memory in GB, bandwidth of the memory in bytes/s.

    With `inline_ecc` a sixteenth of the memory holds the error correction, and is not available.
    """

    peak_flops: float
    memory_gb: float
    bytes_per_s: float
    link: str
    inline_ecc: bool = False

    @property
    def memory_bytes(self) -> float:
        """What a process can use, the CUDA context included. A data sheet's GB of chips are GiB."""
        return self.memory_gb * 2**30 * (15 / 16 if self.inline_ecc else 1)


# Each with the document that has the figures. "2:1 sparse" figures are halved. V100 and T4 have no bfloat16: float16.
GPUS = {
    # NVIDIA HGX B200 data sheet: 36 PFLOP/s 2:1 sparse and 1.44 TB in eight GPUs
    "B200": Gpu(2250e12, 180, 8000 * GB, "NVLink 5"),
    # NVIDIA H200 data sheet, columns SXM and NVL
    "H200": Gpu(989e12, 141, 4800 * GB, "NVLink 4"),
    "H200 NVL": Gpu(835e12, 141, 4800 * GB, "PCIe 5"),
    # NVIDIA GH200 data sheet, version with 96 GB of HBM3
    "GH200": Gpu(989e12, 96, 4000 * GB, "NVLink 4"),
    # NVIDIA H100 data sheet, columns SXM and NVL; H100 PCIe product brief
    "H100": Gpu(989e12, 80, 3350 * GB, "NVLink 4"),
    "H100 NVL": Gpu(835e12, 94, 3900 * GB, "PCIe 5"),
    "H100 PCIe": Gpu(756e12, 80, 2000 * GB, "PCIe 5"),
    # NVIDIA A100 data sheets (80 GB: June 2021; 40 GB: 2020)
    "A100": Gpu(312e12, 80, 2039 * GB, "NVLink 3"),
    "A100 40GB": Gpu(312e12, 40, 1555 * GB, "NVLink 3"),
    "A100 PCIe": Gpu(312e12, 80, 1935 * GB, "PCIe 4"),
    "A100 PCIe 40GB": Gpu(312e12, 40, 1555 * GB, "PCIe 4"),
    # NVIDIA A10, A30, A40, L4, L40 and L40S data sheets; A10G: NVIDIA's data sheet for AWS G5
    "A10": Gpu(125e12, 24, 600 * GB, "PCIe 4", inline_ecc=True),
    "A10G": Gpu(70e12, 24, 600 * GB, "PCIe 4", inline_ecc=True),
    "A30": Gpu(165e12, 24, 933 * GB, "PCIe 4"),
    "A40": Gpu(149.7e12, 48, 696 * GB, "PCIe 4", inline_ecc=True),
    "L4": Gpu(121e12, 24, 300 * GB, "PCIe 4", inline_ecc=True),
    "L40": Gpu(181e12, 48, 864 * GB, "PCIe 4", inline_ecc=True),
    "L40S": Gpu(362e12, 48, 864 * GB, "PCIe 4", inline_ecc=True),
    # NVIDIA RTX A6000 data sheet; GA102 whitepaper (RTX 3090), Ada whitepaper (RTX 4090, RTX 6000 Ada), RTX Blackwell
    # whitepaper (RTX 5090): bfloat16 with sums in float32
    "A6000": Gpu(154.8e12, 48, 768 * GB, "PCIe 4"),
    "RTX 6000 Ada": Gpu(364e12, 48, 960 * GB, "PCIe 4"),
    "RTX 3090": Gpu(71e12, 24, 936 * GB, "PCIe 4"),
    "RTX 4090": Gpu(165.2e12, 24, 1008 * GB, "PCIe 4"),
    "RTX 5090": Gpu(209.5e12, 32, 1792 * GB, "PCIe 5"),
    # NVIDIA V100 and T4 data sheets
    "V100": Gpu(125e12, 16, 900 * GB, "NVLink 2"),
    "V100 32GB": Gpu(125e12, 32, 900 * GB, "NVLink 2"),
    "V100 PCIe": Gpu(112e12, 16, 900 * GB, "PCIe 3"),
    "V100 PCIe 32GB": Gpu(112e12, 32, 900 * GB, "PCIe 3"),
    "T4": Gpu(65e12, 16, 320 * GB, "PCIe 3", inline_ecc=True),
    # AMD Instinct MI300X and MI325X data sheets
    "MI300X": Gpu(1307e12, 192, 5300 * GB, "Infinity Fabric"),
    "MI325X": Gpu(1307e12, 256, 6000 * GB, "Infinity Fabric"),
}
OTHER_PRODUCTS = {"ti", "super", "laptop", "mobile", "max", "d", "mig"}  # words that make a name another product's


@cache
def find_gpu(device_name: str) -> str | None:
    """The name in `GPUS` of a device that calls itself `device_name`; None if it is unknown.

    Names are compared word by word: "NVIDIA L40" is not an L4. Of several names the one with the most words is right:
    "NVIDIA A100-PCIE-40GB" is the "A100 PCIe 40GB".
    """
    words = _words(device_name)
    fitting = [name for name in GPUS if _words(name) <= words]
    if not fitting or words & OTHER_PRODUCTS:
        return None
    return max(fitting, key=lambda name: len(_words(name)))


def why_no_gpu() -> str | None:
    """Why PyTorch does not see the NVIDIA GPU of this machine; None if it sees one, or if there is no driver."""
    if torch.accelerator.is_available() or shutil.which("nvidia-smi") is None:
        return None
    name = f"PyTorch {torch.__version__}"
    if torch.version.cuda is None:
        return f"the NVIDIA GPU is not used: {name} is a build without CUDA; install one with it, see pytorch.org"
    return f"the NVIDIA GPU is not used: {name} needs a driver for CUDA {torch.version.cuda}; compare nvidia-smi"


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of `device` in FLOP/s; None if it is unknown."""
    if device.type != "cuda":
        return None
    name = find_gpu(torch.cuda.get_device_name(device))
    return None if name is None else GPUS[name].peak_flops


def matrix_product_flops(device: str, bf16: bool, threads: int | None = None, rounds: int = 20) -> float:
    """FLOP/s of the fastest of many matrix products, 8192 wide on a GPU, 1024 on a CPU. On a GPU, float32 is TF32.

    rounds: of four products each.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # as every trainer does
    size = 1024 if device == "cpu" else 8192
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best_s = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(4):
            product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        best_s = min(best_s, (time.perf_counter() - started) / 4)
    return 2 * size**3 / best_s


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


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
