"""The hardware that a run is planned for: this machine's, or that of a data sheet."""

import re
from dataclasses import dataclass

import torch

from minigpt.planning.communication import Cluster
from minigpt.utils.errors import UserError
from minigpt.utils.formatting import format_flops
from minigpt.utils.hardware import GBIT, GPUS, LINKS, Gpu, find_gpu

GIB = 2**30
GPU_MARGIN = 0.1  # share of a GPU's memory that a proposal leaves free: no forecast for a GPU has been measured


@dataclass(frozen=True)
class Hardware:
    """The devices of a run. `gpu` and `cluster` are None for a CPU and for a GPU whose figures are unknown."""

    device: str
    gpu: Gpu | None = None
    cluster: Cluster | None = None
    link: str | None = None
    memory_bytes: float | None = None  # that a proposal may use; None: nothing is proposed

    def describe(self, devices: int) -> list[str]:
        """Lines that say what is assumed."""
        if self.gpu is None or self.cluster is None:
            return [f"{devices} x {self.device}"]
        device = (
            f"{devices} x {self.device}: dense bfloat16 peak {format_flops(self.gpu.peak_flops)}, "
            f"{self.gpu.memory_bytes / GIB:.1f} GiB at {self.gpu.bytes_per_s / 1e9:,.0f} GB/s"
        )
        if devices == 1:
            return [device]
        nodes = "one node"
        if self.cluster.nodes > 1:
            network = f"{self.cluster.network_bytes_per_s / GBIT:,.0f} Gbit/s from each"
            nodes = f"{self.cluster.nodes} nodes of {self.cluster.devices_per_node}, {network}"
        return [device, f"{self.link}, {self.cluster.link.bytes_per_s / 1e9:,.1f} GB/s in each direction; {nodes}"]


def find_hardware(
    device: str,
    present: str,
    devices: int,
    devices_per_node: int = 8,
    link: str | None = None,
    network: str | None = None,
    memory_gib: float | None = None,
) -> Hardware:
    """The figures of `device`: cpu, the `present` device of this machine, or the name of a GPU.

    Raises UserError for an unknown device, link or network.
    """
    if device == "cpu":
        return Hardware("cpu", memory_bytes=None if memory_gib is None else memory_gib * GIB)

    def usable_bytes(memory_bytes: float) -> float:
        return (1 - GPU_MARGIN) * min(memory_bytes, memory_bytes if memory_gib is None else memory_gib * GIB)

    is_present = device == present
    full_name = torch.cuda.get_device_name() if is_present else device
    name = find_gpu(full_name)
    if name is None:
        if not is_present:
            raise UserError(f"device={device} is not available and not one of {', '.join(GPUS)}")
        return Hardware(full_name, memory_bytes=usable_bytes(torch.cuda.get_device_properties(0).total_memory))
    gpu = GPUS[name]
    if link is not None and link not in LINKS:
        raise UserError(f"link={link} is not one of {', '.join(LINKS)}")
    link = link or gpu.link
    cluster = Cluster(
        devices,
        devices_per_node,
        LINKS[link],
        LINKS[link].network_bytes_per_s if network is None else _network_bytes_per_s(network),
    )
    return Hardware(name, gpu, cluster, link, usable_bytes(gpu.memory_bytes))


def _network_bytes_per_s(network: str) -> float:
    """Bytes per second of Gbit/s given as 100 or 8x400."""
    match = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)", network)
    rate = int(match[1] or 1) * float(match[2]) if match else 0
    if rate <= 0:
        raise UserError(f"network={network} must be the Gbit/s of a node, such as 100 or 8x400")
    return rate * GBIT


def which_gpu(memory_gib: float | None) -> str:
    """A message that asks for the GPU, and names those with about that memory."""
    names = [
        name for name, gpu in GPUS.items() if memory_gib is not None and abs(gpu.memory_gb / memory_gib - 1) < 0.1
    ]
    return f"this machine has no GPU; name the one to plan for with --device: {', '.join(names or GPUS)}, or cpu"
