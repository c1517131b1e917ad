"""The loss of a model, summed over a whole split and all processes."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from minigpt.modeling.loss import IGNORE_INDEX


@torch.no_grad()  # not inference_mode: FSDP2 could not train on afterwards
def summed_loss(model: nn.Module, batches: Any, accelerator: Accelerator, counted: int) -> tuple[float, int]:
    """Loss in nats summed over every real target of the first `counted` batches on all processes, and their number.

    Each batch is summed in float32 on the device, the batches in float64 on the host.
    """
    training = model.training
    model.eval()
    targets, losses = 0, [torch.zeros((), device=accelerator.device)]
    for number, batch in enumerate(batches):
        if number >= counted:
            batch["shift_labels"] = torch.full_like(batch["shift_labels"], IGNORE_INDEX)
        targets += int((batch["shift_labels"] != IGNORE_INDEX).sum())
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        losses.append(model(**batch, num_items_in_batch=1, use_cache=False, skip_logits=True).loss.float())
    model.train(training)
    total = torch.stack(losses).cpu().double().sum()
    if accelerator.num_processes > 1:
        pair = torch.stack([total, torch.tensor(targets).double()]).to(accelerator.device)
        pair = accelerator.reduce(pair, "sum").cpu()
        return float(pair[0]), int(pair[1])
    return float(total), targets
