"""Start Accelerate with the settings of the launch profile and the options, and feed its processes."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
    parse_flag_from_env,
    send_to_device,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from minigpt.config.arguments import Arguments
from minigpt.data.samples import Batch
from minigpt.modeling.document_mask import document_mask
from minigpt.training.out_of_memory import record_allocations
from minigpt.training.run_log import requested_trackers
from minigpt.utils.errors import UserError
from minigpt.utils.hardware import why_no_gpu
from minigpt.utils.malloc import keep_freed_memory

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_for_gpu(args: Arguments) -> None:
    """Raises UserError if the launch profile is one for GPUs, and PyTorch sees none."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # set by accelerate's launcher
    on_cpu = args.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    if precision != "no" and not on_cpu and not torch.accelerator.is_available():
        reason = why_no_gpu() or "PyTorch sees none"
        raise UserError(
            f"the launch profile is for GPUs (mixed_precision: {precision}), but {reason}; "
            "train with the profile cpu or cpu_ddp, or give --use_cpu"
        )


def start_accelerator(args: Arguments) -> Accelerator:
    """The Accelerator with the processes, device, precision and compilation of the launch profile.

    Raises UserError for an option that this device does not support.
    """
    if args.full_determinism:
        use_deterministic_kernels()
    sharding = _sharding(args)
    accelerator = Accelerator(
        cpu=args.use_cpu or not torch.accelerator.is_available(),  # without it, CPU processes would not form a group
        mixed_precision=args.mixed_precision,
        log_with=list(requested_trackers(args.report_to)) or None,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(args.run_dir / "tensorboard")
        ),
        fsdp_plugin=sharding,
        dynamo_plugin=_compilation(args, is_sharded=sharding is not None),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout)),
            AutocastKwargs(cache_enabled=False),  # a pass uses each weight once: cached copies only take memory
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True, comm_hook=DDPCommunicationHookType(args.ddp_comm_hook)
            ),
        ],
    )
    if accelerator.device.type == "cpu":
        if args.ddp_comm_hook == "bf16":
            raise UserError("ddp_comm_hook=bf16 needs a GPU; use fp16 or no")
        keep_freed_memory()
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    if args.memory_snapshot:
        record_allocations(accelerator.device)
    return accelerator


def _sharding(args: Arguments) -> FullyShardedDataParallelPlugin | None:
    """FSDP2 as the launch profile configures it, or None if it does not.

    In mixed precision, parameters are gathered in half precision, gradients are summed over the ranks in float32, and
    the loss stays in float32. Accelerate's own setting is half precision for all three.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    _check_mesh()
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    policy = MixedPrecisionPolicy(param_dtype=COMPUTE_DTYPES.get(precision), reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def _check_mesh() -> None:
    """Raises UserError if the launch profile shares the work in a way that fits neither trainer nor processes."""
    names = ("DP_REPLICATE_SIZE", "DP_SHARD_SIZE", "TP_SIZE", "CP_SIZE", "SP_SIZE")
    replicas, shards, *others = (int(os.environ.get(f"PARALLELISM_CONFIG_{name}", 1)) for name in names)
    for name, size in zip(names[2:], others, strict=True):
        if size != 1:
            raise UserError(
                f"parallelism_config_{name.lower()}={size} must be 1: each process trains on samples of its own; "
                "split the model with dp_shard_size"
            )
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if replicas * shards not in (1, processes):
        raise UserError(
            f"parallelism_config_dp_replicate_size={replicas} times parallelism_config_dp_shard_size={shards} must be "
            f"num_processes={processes}"
        )


def _compilation(args: Arguments, is_sharded: bool) -> TorchDynamoPlugin:
    """torch.compile as the options or the launch profile ask for it.

    A sharded model gathers its weights layer by layer, which the compiler cannot trace: each layer is compiled alone.
    """
    backend = DynamoBackend(args.torch_compile_backend.upper()) if args.torch_compile else None
    plugin = TorchDynamoPlugin(backend=backend)  # type: ignore[arg-type]  # None: the launch profile's
    plugin.use_regional_compilation = plugin.use_regional_compilation or is_sharded
    return plugin


def exchange_gradients(accelerator: Accelerator, model: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Context of a backward pass. DDP averages the gradients over the ranks in the last micro-batch of a step only.

    FSDP2 does so in every micro-batch: otherwise each rank would hold the whole gradient until the last one.
    """
    if is_last or accelerator.distributed_type == DistributedType.FSDP:
        return nullcontext()
    context: AbstractContextManager[None] = accelerator.no_sync(model)
    return context


def clear_gradients(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Forget the gradients of a step.

    Those of DDP are part of its buckets. Set to None, each would be allocated again next to its bucket.
    """
    has_buckets = accelerator.distributed_type in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    optimizer.zero_grad(set_to_none=not has_buckets)


def on_device(batches: Iterator[Batch], device: torch.device, config: PreTrainedConfig) -> Iterator[Batch]:
    """The batches on the device, packed documents with their attention mask.

    Each is fetched before the one before it is used, so that the device never waits for it after a look at a result.
    """
    ready: Batch | None = None
    for batch in batches:
        following = send_to_device(batch, device, non_blocking=True)
        if "position_ids" in following:
            following["attention_mask"] = document_mask(following["position_ids"], config)
        if ready is not None:
            yield ready
        ready = following


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 may have sharded, complete on every rank. Every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def uncompiled(model: nn.Module, accelerator: Accelerator) -> Iterator[Any]:
    """The model without its wrappers and without compilation, for calls whose shapes change all the time."""
    with torch.compiler.set_stance("force_eager"):
        yield accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def use_deterministic_kernels() -> None:
    """Make operations on a GPU repeat bit for bit. Must run before the first of them."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required by cuBLAS, read when its first handle is made
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it is never read
    torch.backends.cudnn.benchmark = False
