"""How good is the model? The loss of every target of a split, summed over all processes."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from minigpt.data import IGNORED, EvaluationBatches, Samples, loader
from minigpt.metrics import validation_metrics
from minigpt.state import TrainingState, is_due


class Evaluation:
    """Full validation loss, every `eval_steps` steps."""

    def __init__(self, samples: Samples, batch_size: int, eval_steps: int, max_steps: int) -> None:
        self.samples, self.batch_size, self.eval_steps, self.max_steps = samples, batch_size, eval_steps, max_steps

    def due(self, state: TrainingState) -> bool:
        return is_due(state.step, self.eval_steps, self.max_steps)

    def run(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """`val/loss`, `val/perplexity` and, where the size of the text is known, `val/bits_per_byte`."""
        rank, processes = accelerator.process_index, accelerator.num_processes
        batches = EvaluationBatches(self.samples.every(), self.batch_size, rank, processes)
        loss_nats, targets = summed_loss(model, loader(self.samples, batches), accelerator, batches.counted)
        return validation_metrics(loss_nats, targets, self.samples.text_bytes)


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
            batch["shift_labels"] = torch.full_like(batch["shift_labels"], IGNORED)
        targets += int((batch["shift_labels"] != IGNORED).sum())
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        losses.append(model(**batch, num_items_in_batch=1, use_cache=False, skip_logits=True).loss.float())
    model.train(training)
    total = torch.stack(losses).cpu().double().sum()
    if accelerator.num_processes > 1:
        pair = torch.stack([total, torch.tensor(targets).double()]).to(accelerator.device)
        pair = accelerator.reduce(pair, "sum").cpu()
        return float(pair[0]), int(pair[1])
    return float(total), targets
