"""Laws of the hardware figures: each GPU has its own peak, and memory is in GiB."""

import pytest
import torch

from minigpt.utils.hardware import PEAK_FLOPS, peak_flops, peak_memory_gib


@pytest.mark.parametrize(
    ("device_name", "peak"),
    [(f"NVIDIA {name}", peak) for name, peak in PEAK_FLOPS.items()]
    + [
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_each_gpu_has_its_own_peak_even_if_its_name_contains_another(
    monkeypatch: pytest.MonkeyPatch, device_name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: device_name)
    assert peak_flops(torch.device("cuda")) == peak


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_peak_memory_is_in_gib() -> None:
    tensor = torch.zeros(2**28)  # one GiB
    assert 1 < peak_memory_gib(torch.device("cpu")) < 20
    assert tensor.sum() == 0
