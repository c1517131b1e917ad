"""HellaSwag accuracy, item by item equal to lm-evaluation-harness."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from minigpt.evaluation.hellaswag_items import ENDINGS, Item, encode_item
from minigpt.modeling.loss import IGNORE_INDEX


@dataclass(frozen=True)
class Answer:
    """Whether an item was answered rightly: by the summed log-likelihood, and by it per byte and per token."""

    item: int
    acc: int
    acc_norm: int  # per byte: lm-evaluation-harness' acc_bytes, and its acc_norm wherever an ending is ASCII
    acc_norm_tokens: int  # per token: build-nanogpt's
    loglikelihoods: list[float]  # nats

    @classmethod
    def of(cls, item: Item, loglikelihoods: list[float]) -> "Answer":
        total = np.array(loglikelihoods)
        per_byte = total / np.array(item.ending_bytes)
        per_token = total / np.array([len(ending) for ending in item.endings])
        acc, acc_norm, acc_norm_tokens = (
            int(np.argmax(scores) == item.label) for scores in (total, per_byte, per_token)
        )
        return cls(item.number, acc, acc_norm, acc_norm_tokens, loglikelihoods)


def answer_items(model: Any, items: list[Item], batch_size: int) -> Iterator[Answer]:
    """Answer items, `batch_size` sequences at a time; the answers come in the order of the contexts' lengths."""
    limit = model.config.max_position_embeddings
    fitting = [item for item in items if len(item.context) > 1 and _longest_row(item) <= limit]
    fitting.sort(key=lambda item: len(item.context))
    for first in range(0, len(fitting), batch_size):
        batch = fitting[first : first + batch_size]
        yield from map(Answer.of, batch, _share_contexts(model, batch, batch_size))
    others = [item for item in items if not (len(item.context) > 1 and _longest_row(item) <= limit)]
    step = max(1, batch_size // ENDINGS)
    for first in range(0, len(others), step):
        batch = others[first : first + step]
        yield from map(Answer.of, batch, _cut_contexts(model, batch, limit))


def _longest_row(item: Item) -> int:
    """Inputs of the item's longest row; the last token of an ending is only a target."""
    return len(item.context) + max(map(len, item.endings)) - 1


def _share_contexts(model: Any, items: list[Item], batch_size: int) -> list[list[float]]:
    """Log-likelihoods [B][4]: all contexts at once, padded on the left, then the endings, the shortest first.

    A context is read up to its last token, which is the first input of its endings.
    """
    import torch

    width = max(len(item.context) for item in items) - 1
    contexts = torch.zeros(len(items), width, dtype=torch.long)  # [B, P]
    mask = torch.zeros_like(contexts)
    for row, item in enumerate(items):
        contexts[row, width - len(item.context) + 1 :] = torch.tensor(item.context[:-1])
        mask[row, width - len(item.context) + 1 :] = 1
    loglikelihoods = [[0.0] * ENDINGS for _ in items]
    endings = [(row, place) for row in range(len(items)) for place in range(ENDINGS)]
    endings.sort(key=lambda pair: len(items[pair[0]].endings[pair[1]]))
    with torch.no_grad():
        read = model(
            input_ids=contexts.to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(model.device),
            use_cache=True,
            logits_to_keep=1,  # nobody reads the logits of a context
        ).past_key_values
        for first in range(0, len(endings), batch_size):
            group = endings[first : first + batch_size]
            rows = torch.tensor([row for row, _ in group])
            cache = copy.deepcopy(read)
            cache.batch_select_indices(rows.to(model.device))
            firsts = [items[row].context[-1] for row, _ in group]
            texts = [items[row].endings[place] for row, place in group]
            scores = _after_contexts(model, cache, mask[rows], firsts, texts)
            for (row, place), value in zip(group, scores, strict=True):
                loglikelihoods[row][place] = value
    return loglikelihoods


def _after_contexts(model: Any, cache: Any, mask: Any, firsts: list[int], endings: list[list[int]]) -> list[float]:
    """Log-likelihoods [R] of endings whose contexts are in `cache` up to the tokens `firsts`; mask [R, P]."""
    import torch

    width = len(max(endings, key=len))
    inputs = torch.zeros(len(endings), width, dtype=torch.long)  # [R, E]
    targets = torch.full_like(inputs, IGNORE_INDEX)
    for row, (first, ending) in enumerate(zip(firsts, endings, strict=True)):
        inputs[row, : len(ending)] = torch.tensor([first, *ending[:-1]])
        targets[row, : len(ending)] = torch.tensor(ending)
    positions = mask.sum(1, keepdim=True) + torch.arange(width)
    logits = model(
        input_ids=inputs.to(model.device),
        attention_mask=torch.cat([mask, torch.ones_like(inputs)], 1).to(model.device),
        position_ids=torch.where(targets == IGNORE_INDEX, 0, positions).to(
            model.device
        ),  # of padding: any that exists
        past_key_values=cache,
        use_cache=True,
    ).logits
    return _loglikelihoods(logits, targets)


def _cut_contexts(model: Any, items: list[Item], limit: int) -> list[list[float]]:
    """Log-likelihoods [B][4] of items too long for the model: each ending keeps what fits of its context's end."""
    import torch

    rows = [(item.context + ending)[-(limit + 1) :] for item in items for ending in item.endings]
    counts = [len(ending) for item in items for ending in item.endings]
    width = max(map(len, rows)) - 1
    inputs = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORE_INDEX)
    for row, (ids, count) in enumerate(zip(rows, counts, strict=True)):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, max(0, len(ids) - 1 - count) : len(ids) - 1] = torch.tensor(ids[max(1, len(ids) - count) :])
    with torch.no_grad():
        scores = _loglikelihoods(model(input_ids=inputs.to(model.device), use_cache=False).logits, targets)
    return [scores[first : first + ENDINGS] for first in range(0, len(scores), ENDINGS)]


def _loglikelihoods(logits: Any, targets: Any) -> list[float]:
    """Summed log-likelihoods [R] of targets [R, T] under logits [R, T, V], in float32."""
    import torch

    counted = targets.to(logits.device) != IGNORE_INDEX
    nats = torch.zeros(targets.shape, device=logits.device)
    nats[counted] = torch.nn.functional.cross_entropy(
        logits[counted].float(), targets.to(logits.device)[counted], reduction="none"
    )
    return (-nats.sum(1)).tolist()


def evaluate(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], batch_size: int, accelerator: Any
) -> list[Answer]:
    """The answers to all rows in their order, each process having answered its share.

    Where the weights are sharded (FSDP2) every process answers all: each forward needs all of them to take part.
    """
    from accelerate.utils import gather_object

    shared = accelerator.num_processes > 1 and not accelerator.is_fsdp2
    mine = range(accelerator.process_index, len(rows), accelerator.num_processes) if shared else range(len(rows))
    items = [encode_item(number, rows[number], tokenizer) for number in mine]
    training = model.training
    model.eval()
    with accelerator.autocast():
        answers = list(answer_items(model, items, batch_size))
    model.train(training)
    if shared:
        answers = gather_object(answers)
    return sorted(answers, key=lambda answer: answer.item)


def summarize(answers: list[Answer]) -> dict[str, float]:
    """Accuracies under the names that the trainer and the trackers use."""
    return {
        f"hellaswag/{name}": float(np.mean([getattr(answer, name) for answer in answers]))
        for name in ("acc", "acc_norm", "acc_norm_tokens")
    }
