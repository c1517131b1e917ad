"""Import this to use FSDP2 on the CPU.

Accelerate uses FSDP2 only if it takes the processes for those of a GPU, so it is told that they are. Everything else
is accelerate's own: it shards the model and the optimizer over the gloo processes.
"""

import os
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def hsdp(replicas: int, shards: int) -> dict[str, str]:
    """The environment of a launch profile that shards over some processes, and replicates that."""
    sizes = {"DP_REPLICATE_SIZE": replicas, "DP_SHARD_SIZE": shards}
    return FSDP2 | {f"PARALLELISM_CONFIG_{name}": str(size) for name, size in sizes.items()}


def start_as_gpu_processes(self: PartialState, *args: Any, **options: Any) -> None:
    start(self, *args, **options)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


start, PartialState.__init__ = PartialState.__init__, start_as_gpu_processes
