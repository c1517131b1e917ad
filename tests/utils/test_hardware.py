"""Laws of the hardware figures: a device gets the figures of its own product, and memory is in GiB."""

import sys
from pathlib import Path

import pytest
import torch

from minigpt.utils.hardware import GPUS, LINKS, find_gpu, peak_flops, peak_memory_gib, why_no_gpu


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA B200", "B200"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla V100-PCIE-32GB", "V100 PCIe 32GB"),
        ("Tesla T4", "T4"),
        ("AMD Instinct MI300X", "MI300X"),
        ("h100", "H100"),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA L400", None),
        ("NVIDIA A1000", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Quadro RTX 6000", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("", None),
    ],
)
def test_a_device_has_the_figures_of_its_own_product(device_name: str, name: str | None) -> None:
    assert find_gpu(device_name) == name


@pytest.mark.parametrize("name", GPUS)
def test_each_name_of_the_table_finds_its_own_row(name: str) -> None:
    assert find_gpu(name) == find_gpu(f"NVIDIA {name.lower()}") == name
    assert GPUS[name].link in LINKS


@pytest.mark.parametrize(
    ("name", "flops_per_clock", "multiprocessors", "gigahertz"),
    # dense bfloat16 FLOP of one multiprocessor in a cycle, by its architecture; boost clock
    [
        ("H100", 4096, 132, 1.83),
        ("H100 PCIe", 4096, 114, 1.62),
        ("A100", 2048, 108, 1.41),
        ("A30", 2048, 56, 1.44),
        ("A10", 1024, 72, 1.695),
        ("A40", 1024, 84, 1.74),
        ("A6000", 1024, 84, 1.8),
        ("L4", 1024, 58, 2.04),
        ("L40", 512, 142, 2.49),
        ("L40S", 1024, 142, 2.49),
        ("RTX 6000 Ada", 1024, 142, 2.505),
        ("RTX 3090", 512, 82, 1.695),
        ("RTX 4090", 512, 128, 2.52),
        ("RTX 5090", 512, 170, 2.407),
        ("V100", 1024, 80, 1.53),
        ("T4", 1024, 40, 1.59),
        ("MI300X", 2048, 304, 2.1),
    ],
)
def test_dense_peak_is_operations_per_cycle_times_units_times_clock(
    name: str, flops_per_clock: int, multiprocessors: int, gigahertz: float
) -> None:
    assert GPUS[name].peak_flops == pytest.approx(flops_per_clock * multiprocessors * gigahertz * 1e9, rel=0.005)


def test_a_gpu_with_error_correction_inside_its_memory_has_less_of_it() -> None:
    assert GPUS["A10G"].memory_bytes < GPUS["RTX 4090"].memory_bytes == 24 * 2**30


def test_peak_of_a_device_is_that_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40")
    assert peak_flops(torch.device("cuda")) == 181e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T400")
    assert peak_flops(torch.device("cuda")) is None
    assert peak_flops(torch.device("cpu")) is None


def test_peak_memory_is_in_gib() -> None:
    tensor = torch.zeros(2**28)  # one GiB
    assert 1 < peak_memory_gib(torch.device("cpu")) < 20
    assert tensor.sum() == 0


@pytest.mark.skipif(torch.accelerator.is_available(), reason="PyTorch uses the GPU of this machine")
def test_a_driver_without_a_gpu_in_pytorch_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_no_gpu() is None
    driver = tmp_path / "nvidia-smi"
    driver.touch(mode=0o755)
    driver.rename(tmp_path / ("nvidia-smi.exe" if sys.platform == "win32" else "nvidia-smi"))
    assert torch.__version__ in str(why_no_gpu())
