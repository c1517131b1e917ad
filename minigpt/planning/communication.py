"""Estimate the time that the devices of a run wait for each other.

Collectives take the time of a ring. Each of n ranks sends n - 1 pieces of size/n to its neighbor in an all-gather or
a reduce-scatter, and twice as many in an all-reduce:

    all-gather, reduce-scatter   (n - 1) / n · size / bandwidth + latency of n - 1 hops
    all-reduce                   twice that

The slowest link of the ring decides its bandwidth: between nodes, all rings together share the network of a node. For
an all-reduce over several nodes NCCL also has a tree, with fewer hops; the faster one counts.
Sources: Patarasuk and Yuan 2009 (https://doi.org/10.1016/j.jpdc.2008.09.002) for the ring; NCCL's src/graph/tuning.cc
for the latencies and the tree.
"""

import math
from dataclasses import dataclass, replace

from minigpt.planning.memory import (
    FLOAT32,
    TrainingSetup,
    adapter_layer_parameters,
    layer_matrix_parameters,
    layer_parameters,
    non_layer_parameters,
    trained_parameters,
)
from minigpt.utils.hardware import Link

# Assumptions
LINK_EFFICIENCY = 0.8  # share of a link's bandwidth that NCCL reaches with large messages
OVERLAP = 0.8  # share of the time of computing during which the devices can communicate
NETWORK_HOP_S = 14e-6  # latency from node to node in NCCL's model
BUCKET_BYTES = 25 * 2**20  # DDP's default bucket_cap_mb


@dataclass(frozen=True)
class Cluster:
    """Devices in nodes of `devices_per_node`, with one network connection of `network_bytes_per_s` per node."""

    devices: int
    devices_per_node: int
    link: Link
    network_bytes_per_s: float

    @property
    def nodes(self) -> int:
        return math.ceil(self.devices / self.devices_per_node)

    @property
    def bytes_per_s(self) -> float:
        """What a ring through all devices reaches."""
        slowest = self.link.bytes_per_s if self.nodes == 1 else min(self.link.bytes_per_s, self.network_bytes_per_s)
        return LINK_EFFICIENCY * slowest

    def of_one_replica(self, replicas: int) -> "Cluster":
        """The devices among which one of `replicas` copies of the model is divided."""
        return replace(self, devices=self.devices // replicas)

    def between_replicas(self, replicas: int) -> "Cluster":
        """One rank of each node; those of a node reduce their shards at once, and share its network."""
        return replace(self, devices=replicas, devices_per_node=1)

    def gather_s(self, size: float) -> float:
        """Time of an all-gather or a reduce-scatter of `size` bytes in total, as a ring."""
        between_nodes = 0 if self.nodes == 1 else min(self.nodes, self.devices - 1)  # hops of one piece
        hops_s = between_nodes * NETWORK_HOP_S + (self.devices - 1 - between_nodes) * self.link.hop_s
        return (self.devices - 1) / self.devices * size / self.bytes_per_s + hops_s

    def all_reduce_s(self, size: float) -> float:
        """Time of an all-reduce of `size` bytes: of a ring, or of a tree over the nodes and a chain in each."""
        ring_s = 2 * self.gather_s(size)
        if self.nodes == 1:
            return ring_s
        depth = math.ceil(math.log2(self.nodes))
        hops_s = 2 * (depth * NETWORK_HOP_S + (self.devices_per_node - 1) * self.link.hop_s)
        return min(ring_s, 2 * size / self.bytes_per_s + hops_s)


def exposed_s(setup: TrainingSetup, cluster: Cluster, micro_batch_s: float, gradient_bytes: int = FLOAT32) -> float:
    """The time of a step in which its devices only communicate.

    micro_batch_s: forward and backward pass of one micro-batch; a third is the forward pass.
    gradient_bytes: bytes per number that DDP sends (2 with `ddp_comm_hook`).
    """
    if setup.devices == 1:
        return 0.0
    forward_s, backward_s = micro_batch_s / 3, micro_batch_s * 2 / 3
    if setup.sharded:
        passes_s = setup.accumulation * _fsdp2_s(setup, cluster, forward_s, backward_s)
    else:
        passes_s = _ddp_s(setup, cluster, backward_s, gradient_bytes)
    return passes_s + _muon_s(setup, cluster)


def _muon_s(setup: TrainingSetup, cluster: Cluster) -> float:
    """Muon shares its iterations among the devices: it gathers the updates, with FSDP2 in two exchanges of shards."""
    if setup.optimizer != "muon":
        return 0.0
    matrices = setup.config.num_hidden_layers * layer_matrix_parameters(setup.config) * FLOAT32
    if not setup.sharded:
        return cluster.gather_s(matrices)
    return 2 * cluster.of_one_replica(setup.replicas).gather_s(matrices / setup.shards)


def _ddp_s(setup: TrainingSetup, cluster: Cluster, backward_s: float, gradient_bytes: int) -> float:
    """DDP averages full buckets during the last backward pass.

    The last bucket holds the token table, whose gradient is complete at the very end. An adapter's has its last layer.
    """
    table = setup.config.vocab_size * setup.config.hidden_size * gradient_bytes
    if setup.adapter is not None:
        table = adapter_layer_parameters(setup) * gradient_bytes
    rest = trained_parameters(setup) * gradient_bytes - table
    buckets = math.ceil(rest * FLOAT32 / gradient_bytes / BUCKET_BYTES)
    during_backward_s = buckets * cluster.all_reduce_s(rest / buckets)
    return max(0.0, during_backward_s - OVERLAP * backward_s) + cluster.all_reduce_s(table)


def _fsdp2_s(setup: TrainingSetup, cluster: Cluster, forward_s: float, backward_s: float) -> float:
    """FSDP2 gathers each layer in both passes of every micro-batch and reduces its gradients in float32.

    HSDP does both within a node, and then averages the reduced shards over the nodes.
    The next layer is gathered while one computes. Nothing hides the first layer of a pass, the last reduction of
    the backward pass, and what is outside the layers, which is gathered before and reduced after all layers.
    """
    node, nodes = cluster.of_one_replica(setup.replicas), cluster.between_replicas(setup.replicas)

    def reduced_s(size: float) -> float:
        return node.gather_s(size) + (nodes.all_reduce_s(size) if setup.replicas > 1 else 0.0)

    layers = setup.config.num_hidden_layers
    adapter_layer = adapter_layer_parameters(setup)
    layer, outside = layer_parameters(setup.config) + adapter_layer, non_layer_parameters(setup.config)
    gradients, outside_gradients = (layer, outside) if setup.adapter is None else (adapter_layer, 0)
    gather_s, reduce_s = node.gather_s(layer * setup.compute_bytes), reduced_s(gradients * FLOAT32)
    hidden_s = [
        (layers - 1) * gather_s - OVERLAP * forward_s,
        (layers - 1) * (gather_s + reduce_s) - OVERLAP * backward_s,
    ]
    outside_s = node.gather_s(outside * setup.compute_bytes)
    outside_s += reduced_s(outside_gradients * FLOAT32) if outside_gradients else 0.0
    return outside_s + 2 * gather_s + reduce_s + sum(max(0.0, late_s) for late_s in hidden_s)
