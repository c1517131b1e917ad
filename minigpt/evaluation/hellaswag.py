"""HellaSwag accuracy; every answer is the same as that of lm-evaluation-harness.

Shapes: B items, R rows (one per ending), P tokens of the longest context before its last one, E tokens of the longest
ending, T tokens, V vocabulary.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from minigpt.evaluation.hellaswag_items import ENDINGS, Item, encode_item
from minigpt.evaluation.loss import target_losses
from minigpt.generation.sampling import context_length
from minigpt.modeling.loading import evaluating
from minigpt.modeling.loss import IGNORE_INDEX
from minigpt.utils.progress import Progress


@dataclass(frozen=True)
class Answer:
    """Whether an item was answered correctly: by log-likelihood, by log-likelihood per byte and per token."""

    item: int
    acc: int
    acc_norm: int  # per byte: lm-evaluation-harness' acc_bytes, and its acc_norm if the endings are ASCII
    acc_norm_tokens: int  # per token: build-nanogpt's
    loglikelihoods: list[float]  # nats

    @classmethod
    def from_loglikelihoods(cls, item: Item, loglikelihoods: list[float]) -> "Answer":
        total = np.array(loglikelihoods)
        per_byte = total / np.array(item.ending_bytes)
        per_token = total / np.array([len(ending) for ending in item.endings])
        acc, acc_norm, acc_norm_tokens = (
            int(np.argmax(scores) == item.label) for scores in (total, per_byte, per_token)
        )
        return cls(item.number, acc, acc_norm, acc_norm_tokens, loglikelihoods)


def answer_items(model: PreTrainedModel, items: list[Item], batch_size: int) -> Iterator[Answer]:
    """Answer items, `batch_size` sequences at a time; the answers are ordered by the length of their contexts."""
    limit = context_length(model)
    fitting = [item for item in items if _fits(item, limit)]
    fitting.sort(key=lambda item: len(item.context))
    for first in range(0, len(fitting), batch_size):
        batch = fitting[first : first + batch_size]
        yield from map(Answer.from_loglikelihoods, batch, _score_with_shared_contexts(model, batch, batch_size))
    others = [item for item in items if not _fits(item, limit)]
    items_at_once = max(1, batch_size // ENDINGS)
    for first in range(0, len(others), items_at_once):
        batch = others[first : first + items_at_once]
        yield from map(Answer.from_loglikelihoods, batch, _score_with_truncated_contexts(model, batch, limit))


def _fits(item: Item, limit: int | None) -> bool:
    """Whether the context can be cached: it has a token before its last one, and fits with each ending."""
    # the last token of an ending is only a target
    longest_row = len(item.context) + max(map(len, item.endings)) - 1
    return len(item.context) > 1 and (limit is None or longest_row <= limit)


def _score_with_shared_contexts(model: PreTrainedModel, items: list[Item], batch_size: int) -> list[list[float]]:
    """Log-likelihoods [B][4]: all contexts at once, padded on the left, then the endings, the shortest first.

    The cache has each context without its last token, which is the first input of its endings.
    """
    width = max(len(item.context) for item in items) - 1
    contexts = torch.zeros(len(items), width, dtype=torch.long)  # [B, P]
    mask = torch.zeros_like(contexts)
    for row, item in enumerate(items):
        contexts[row, width - len(item.context) + 1 :] = torch.tensor(item.context[:-1])
        mask[row, width - len(item.context) + 1 :] = 1
    loglikelihoods = [[0.0] * ENDINGS for _ in items]
    endings = [(row, number) for row in range(len(items)) for number in range(ENDINGS)]
    endings.sort(key=lambda pair: len(items[pair[0]].endings[pair[1]]))
    with torch.no_grad():
        context_cache = model(
            input_ids=contexts.to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(model.device),
            use_cache=True,
            logits_to_keep=1,  # the logits of a context are not used
        ).past_key_values
        for first in range(0, len(endings), batch_size):
            group = endings[first : first + batch_size]
            rows = torch.tensor([row for row, _ in group])
            cache = copy.deepcopy(context_cache)
            cache.batch_select_indices(rows.to(model.device))
            first_inputs = [items[row].context[-1] for row, _ in group]
            texts = [items[row].endings[number] for row, number in group]
            scores = _score_endings(model, cache, mask[rows], first_inputs, texts)
            for (row, number), score in zip(group, scores, strict=True):
                loglikelihoods[row][number] = score
    return loglikelihoods


def _score_endings(
    model: PreTrainedModel, cache: Cache, mask: Tensor, first_inputs: list[int], endings: list[list[int]]
) -> list[float]:
    """Log-likelihoods [R] of endings after the contexts in `cache`, which lack their last tokens; mask [R, P]."""
    width = len(max(endings, key=len))
    inputs = torch.zeros(len(endings), width, dtype=torch.long)  # [R, E]
    targets = torch.full_like(inputs, IGNORE_INDEX)
    for row, (first_input, ending) in enumerate(zip(first_inputs, endings, strict=True)):
        inputs[row, : len(ending)] = torch.tensor([first_input, *ending[:-1]])
        targets[row, : len(ending)] = torch.tensor(ending)
    positions = mask.sum(1, keepdim=True) + torch.arange(width)
    positions = torch.where(targets == IGNORE_INDEX, 0, positions)  # padding gets any position that exists
    logits = model(
        input_ids=inputs.to(model.device),
        attention_mask=torch.cat([mask, torch.ones_like(inputs)], 1).to(model.device),
        position_ids=positions.to(model.device),
        past_key_values=cache,
        use_cache=True,
    ).logits
    return _loglikelihoods(logits, targets)


def _score_with_truncated_contexts(model: PreTrainedModel, items: list[Item], limit: int | None) -> list[list[float]]:
    """Log-likelihoods [B][4] of items too long for the model: each ending keeps the end of its context that fits."""
    rows = [(item.context + ending)[-(limit + 1 if limit else 0) :] for item in items for ending in item.endings]
    ending_lengths = [len(ending) for item in items for ending in item.endings]
    width = max(map(len, rows)) - 1
    inputs = torch.zeros(len(rows), width, dtype=torch.long)  # [R, T]
    targets = torch.full_like(inputs, IGNORE_INDEX)
    for row, (ids, length) in enumerate(zip(rows, ending_lengths, strict=True)):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, max(0, len(ids) - 1 - length) : len(ids) - 1] = torch.tensor(ids[max(1, len(ids) - length) :])
    with torch.no_grad():
        scores = _loglikelihoods(model(input_ids=inputs.to(model.device), use_cache=False).logits, targets)
    return [scores[first : first + ENDINGS] for first in range(0, len(scores), ENDINGS)]


def _loglikelihoods(logits: Tensor, targets: Tensor) -> list[float]:
    """Summed log-likelihoods [R] of targets [R, T] under logits [R, T, V], in float32."""
    return (-target_losses(logits, targets).sum(1)).tolist()


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    batch_size: int,
    accelerator: Accelerator,
) -> list[Answer]:
    """The answers to all rows, in order. Each process answers its share, and all get all answers.

    With sharded weights (FSDP2) every process answers all rows, because each forward pass needs all processes.
    """
    is_shared = accelerator.num_processes > 1 and not accelerator.is_fsdp2
    step = accelerator.num_processes if is_shared else 1
    own_numbers = range(accelerator.process_index if is_shared else 0, len(rows), step)
    items = [encode_item(number, rows[number], tokenizer) for number in own_numbers]
    answers = []
    progress = Progress("HellaSwag", len(items), "items", enabled=accelerator.is_main_process)
    with evaluating(model), accelerator.autocast(), progress:
        for answer in answer_items(model, items, batch_size):
            answers.append(answer)
            progress.update()
    if is_shared:
        answers = gather_object(answers)
    return sorted(answers, key=lambda answer: answer.item)


def summarize(answers: list[Answer]) -> dict[str, float]:
    """The accuracies under the names that the trainer and the trackers use."""
    return {
        f"hellaswag/{name}": float(np.mean([getattr(answer, name) for answer in answers]))
        for name in ("acc", "acc_norm", "acc_norm_tokens")
    }
