"""Laws of communication: the formulas agree with simulated rings, and waiting grows with devices and slower links."""

from dataclasses import replace

import pytest

from configuration_minigpt import MiniGPTConfig
from minigpt.planning.communication import LINK_EFFICIENCY, NETWORK_HOP_S, OVERLAP, Cluster, exposed_s
from minigpt.planning.memory import TrainingSetup, parameters
from minigpt.utils.hardware import GBIT, LINKS

CONFIG = MiniGPTConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, vocab_size=50304)
SETUP = TrainingSetup(CONFIG, block_size=1024, micro_batch=4, accumulation=2, compute_bytes=2, device="cuda")


def cluster(devices: int, devices_per_node: int = 8, link: str = "NVLink 4", network_gbit: float = 400) -> Cluster:
    return Cluster(devices, devices_per_node, LINKS[link], network_gbit * GBIT)


def simulated_ring_s(ring: Cluster, size: float, steps: int) -> float:
    """Time of `steps` steps of a ring, message by message: rank r sends a piece to r + 1 once it has received it."""
    n = ring.devices
    sending_s, latency_s = [], []
    for rank in range(n):
        crosses = rank // ring.devices_per_node != (rank + 1) % n // ring.devices_per_node
        rate = ring.network_bytes_per_s if crosses else ring.link.bytes_per_s
        sending_s.append(size / n / (LINK_EFFICIENCY * min(rate, ring.link.bytes_per_s)))
        latency_s.append(NETWORK_HOP_S if crosses else ring.link.hop_s)
    has_piece, link_is_free = [0.0] * n, [0.0] * n  # times; at the start each rank has its own piece
    for _ in range(steps):
        link_is_free = [max(has_piece[rank], link_is_free[rank]) + sending_s[rank] for rank in range(n)]
        has_piece = [link_is_free[rank - 1] + latency_s[rank - 1] for rank in range(n)]
    return max(has_piece)


@pytest.mark.parametrize("size", [0.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_ring_of_one_node_takes_the_simulated_time(devices: int, size: float) -> None:
    ring = cluster(devices)
    assert ring.gather_s(size) == pytest.approx(simulated_ring_s(ring, size, devices - 1))
    assert ring.all_reduce_s(size) == pytest.approx(simulated_ring_s(ring, size, 2 * (devices - 1)))


@pytest.mark.parametrize("size", [0.0, 1e6, 1e9])
@pytest.mark.parametrize("devices_per_node", [1, 4, 8])
@pytest.mark.parametrize("network_gbit", [100, 400, 3200])
def test_ring_of_several_nodes_takes_at_least_the_simulated_time_and_little_more(
    devices_per_node: int, size: float, network_gbit: float
) -> None:
    ring = cluster(32, devices_per_node, network_gbit=network_gbit)
    simulated_s = simulated_ring_s(ring, size, 31)
    # more than simulated, because the fast links' latency passes while a slow link is busy
    assert simulated_s * (1 - 1e-9) <= ring.gather_s(size) <= 2 * simulated_s
    assert ring.all_reduce_s(size) <= 2 * ring.gather_s(size)


@pytest.mark.parametrize("sharded", [False, True])
def test_one_device_waits_for_nobody(sharded: bool) -> None:
    assert exposed_s(replace(SETUP, sharded=sharded), cluster(1), micro_batch_s=0.0) == 0.0


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("micro_batch_s", [0.0, 0.01, 1.0])
def test_waiting_grows_with_devices_and_falls_with_faster_links(sharded: bool, micro_batch_s: float) -> None:
    def waiting_s(devices: int, link: str = "NVLink 4", network_gbit: float = 400) -> float:
        setup = replace(SETUP, devices=devices, sharded=sharded)
        return exposed_s(setup, cluster(devices, link=link, network_gbit=network_gbit), micro_batch_s)

    by_devices = [waiting_s(devices) for devices in (1, 2, 4, 8, 16, 64, 512)]
    assert by_devices == sorted(by_devices)
    links = ("PCIe 3", "PCIe 4", "PCIe 5", "NVLink 2", "NVLink 3", "NVLink 4", "NVLink 5")
    by_link = [waiting_s(8, link) for link in links]
    assert by_link == sorted(by_link, reverse=True)
    assert by_link[0] > by_link[-1] > 0
    by_network = [waiting_s(64, network_gbit=network_gbit) for network_gbit in (10, 100, 400, 3200)]
    assert by_network == sorted(by_network, reverse=True)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("devices", [4, 64])
def test_computing_hides_at_most_its_share_of_the_communication(sharded: bool, devices: int) -> None:
    setup = replace(SETUP, devices=devices, sharded=sharded)
    all_s = exposed_s(setup, cluster(devices, network_gbit=100), micro_batch_s=0.0)
    for micro_batch_s in (0.001, 0.01, 0.1):
        waiting_s = exposed_s(setup, cluster(devices, network_gbit=100), micro_batch_s)
        assert (all_s - OVERLAP * setup.accumulation * micro_batch_s) * (1 - 1e-9) <= waiting_s <= all_s


@pytest.mark.parametrize("network_gbit", [10, 400, 3200])
def test_hsdp_waits_as_fsdp2_of_one_node_and_then_for_the_average_over_the_nodes(network_gbit: float) -> None:
    """Between nodes it sends the gradients only; FSDP2 also sends the weights, twice, which a slow network shows."""
    one_node = exposed_s(replace(SETUP, devices=8, sharded=True), cluster(8), micro_batch_s=0.0)
    whole = cluster(64, network_gbit=network_gbit)
    hsdp = exposed_s(replace(SETUP, devices=64, sharded=True, replicas=8), whole, micro_batch_s=0.0)
    fsdp2 = exposed_s(replace(SETUP, devices=64, sharded=True), whole, micro_batch_s=0.0)
    gradients = 4 * parameters(CONFIG)
    nodes = cluster(8, devices_per_node=1, network_gbit=network_gbit)
    alone_s = SETUP.accumulation * nodes.all_reduce_s(gradients)
    pieces = SETUP.accumulation * (CONFIG.num_hidden_layers + 1)  # of the gradients, each with the latency of its hops
    hops_s = pieces * nodes.all_reduce_s(0.0)
    assert one_node + alone_s * (1 - 1e-9) <= hsdp <= one_node + alone_s + 2.5 * hops_s
    assert hsdp < fsdp2 or network_gbit > 1000


def test_ddp_averages_once_per_step_and_fsdp2_communicates_in_every_micro_batch() -> None:
    def waiting_s(accumulation: int, sharded: bool) -> float:
        setup = replace(SETUP, devices=8, sharded=sharded, accumulation=accumulation)
        return exposed_s(setup, cluster(8), micro_batch_s=0.0)

    assert waiting_s(6, sharded=False) == waiting_s(1, sharded=False)
    assert waiting_s(6, sharded=True) == pytest.approx(6 * waiting_s(1, sharded=True))
    halves = replace(SETUP, devices=8)
    assert exposed_s(halves, cluster(8), 0.0, gradient_bytes=2) < exposed_s(halves, cluster(8), 0.0)
