"""The trainer, with a report about its gradients; under FSDP2 on the CPU too.

After every backward pass a line of JSON goes to the file $REPORT.<rank>.
"""

import json
import os
from pathlib import Path
from typing import Any

import sharding_on_cpu  # noqa: F401
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from train_accelerate import main


def observed_backward(self: Accelerator, loss: torch.Tensor, **options: Any) -> None:
    backward(self, loss, **options)
    gradients = held_gradients(self._models[0])
    line = {
        "loss": str(loss.dtype),
        "gradients": sorted({str(gradient.dtype) for gradient in gradients}),
        "bytes": sum({g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in gradients}.values()),
        "parameter_bytes": sum(parameter.numel() * 4 for parameter in self._models[0].parameters()),
        "storages": len({gradient.untyped_storage().data_ptr() for gradient in gradients}),
    }
    with Path(f"{os.environ['REPORT']}.{self.process_index}").open("a") as report:
        report.write(json.dumps(line) + "\n")


def held_gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """The gradients that this process holds, those too that FSDP2 has not sharded yet."""
    held = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    held = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in held]
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for parameter in group.fsdp_params if group is not None else []:
            whole = getattr(parameter, "_unsharded_param", None)  # exists after the first forward pass
            unsharded = (parameter.unsharded_accumulated_grad, whole.grad if whole is not None else None)
            held += [gradient for gradient in unsharded if gradient is not None]
    return held


backward, Accelerator.backward = Accelerator.backward, observed_backward
main()
