"""The loss of a model: of each target of a batch, and summed over a whole split and all processes.

Shapes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, send_to_device
from torch import Tensor, nn

from minigpt.data.samples import Batch
from minigpt.modeling.loading import evaluating
from minigpt.modeling.loss import IGNORE_INDEX
from minigpt.utils.progress import Progress

LOGITS_AT_ONCE = 1 << 22  # in float32, which bounds the memory next to the logits of the model


def target_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss in nats of each target, float32 [B, T], with 0 for IGNORE_INDEX; logits [B, T, V], targets [B, T]."""
    flat_logits, flat_targets = logits.flatten(0, 1), targets.to(logits.device).flatten()
    losses = torch.zeros(flat_targets.shape, device=logits.device)
    counted = (flat_targets != IGNORE_INDEX).nonzero().squeeze(1)
    for positions in counted.split(max(1, LOGITS_AT_ONCE // logits.shape[-1])):
        losses[positions] = nn.functional.cross_entropy(
            flat_logits[positions].float(), flat_targets[positions], reduction="none"
        )
    return losses.view(targets.shape)


def padded(batch: Batch, rows: int) -> Batch:
    """The batch with at least `rows` rows; those that it lacks repeat its last one without a target."""
    missing = rows - len(batch["input_ids"])
    if missing <= 0:
        return batch
    batch = {
        name: torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) for name, tensor in batch.items()
    }
    batch["shift_labels"][-missing:] = IGNORE_INDEX
    return batch


@torch.no_grad()  # not inference_mode: FSDP2 could not continue training afterwards
def summed_loss(
    model: nn.Module, batches: Iterable[dict[str, Any]], accelerator: Accelerator, counted: int
) -> tuple[float, int]:
    """Loss in nats summed over all targets of the first `counted` batches of each process, and their number.

    The targets of a batch are summed in float32 on the device, the batches in float64 on the host. An evaluation that
    takes longer than 2 s shows a progress bar in a terminal.
    """
    targets, losses, rows = 0, [torch.zeros((), device=accelerator.device)], 0
    is_compiled = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    # the main process has no batch that does not count
    progress = Progress("validation", counted, "batches", plain=False, enabled=accelerator.is_main_process)
    with evaluating(model), progress:
        for number, batch in enumerate(batches):
            if number >= counted:
                batch["shift_labels"] = torch.full_like(batch["shift_labels"], IGNORE_INDEX)
            if is_compiled:  # the last batch may be shorter, and another shape would be compiled anew
                rows = max(rows, len(batch["input_ids"]))
                batch = padded(batch, rows)
            targets += int((batch["shift_labels"] != IGNORE_INDEX).sum())
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            losses.append(model(**batch, num_items_in_batch=1, use_cache=False, skip_logits=True).loss.float())
            progress.update()
    total = torch.stack(losses).cpu().double().sum()
    if accelerator.num_processes > 1:
        sums = torch.stack([total, torch.tensor(targets).double()]).to(accelerator.device)
        sums = accelerator.reduce(sums, "sum").cpu()
        return float(sums[0]), int(sums[1])
    return float(total), targets
