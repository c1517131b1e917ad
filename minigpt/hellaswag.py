"""Can a model tell how a story goes on? HellaSwag, with the answers of lm-evaluation-harness, item by item.

Each item has a context and four endings; the model's answer is the ending that it finds likeliest. The context is
read once, and its keys and values are shared by the four endings.

Shapes: B items of a batch, P tokens of the longest context but its last, R rows of a batch of endings, E tokens of
the longest of them, V vocabulary.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.arguments import RunArguments
from minigpt.hellaswag_items import ENDINGS, HUB_NAME, Item, encode_item, load_rows
from minigpt.state import TrainingState, is_due

IGNORED = -100  # the target that has no loss


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
    targets = torch.full_like(inputs, IGNORED)
    for row, (first, ending) in enumerate(zip(firsts, endings, strict=True)):
        inputs[row, : len(ending)] = torch.tensor([first, *ending[:-1]])
        targets[row, : len(ending)] = torch.tensor(ending)
    positions = mask.sum(1, keepdim=True) + torch.arange(width)
    logits = model(
        input_ids=inputs.to(model.device),
        attention_mask=torch.cat([mask, torch.ones_like(inputs)], 1).to(model.device),
        position_ids=torch.where(targets == IGNORED, 0, positions).to(model.device),  # of padding: any that exists
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
    targets = torch.full_like(inputs, IGNORED)
    for row, (ids, count) in enumerate(zip(rows, counts, strict=True)):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, max(0, len(ids) - 1 - count) : len(ids) - 1] = torch.tensor(ids[max(1, len(ids) - count) :])
    with torch.no_grad():
        scores = _loglikelihoods(model(input_ids=inputs.to(model.device), use_cache=False).logits, targets)
    return [scores[first : first + ENDINGS] for first in range(0, len(scores), ENDINGS)]


def _loglikelihoods(logits: Any, targets: Any) -> list[float]:
    """Summed log-likelihoods [R] of targets [R, T] under logits [R, T, V], in float32."""
    import torch

    counted = targets.to(logits.device) != IGNORED
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


class HellaSwagEvaluation:
    """HellaSwag during training, every `hellaswag_steps` steps. Raises ValueError for a file that is not HellaSwag."""

    def __init__(self, args: RunArguments, tokenizer: Any, batch_size: int, max_steps: int) -> None:
        self.every, self.tokenizer, self.batch_size, self.max_steps = (
            args.hellaswag_steps, tokenizer, batch_size, max_steps,
        )  # fmt: skip
        self.rows = load_rows(args.hellaswag_file, args.hellaswag_limit)

    def due(self, state: TrainingState) -> bool:
        return is_due(state.step, self.every or 0, self.max_steps)

    def run(self, model: Any, accelerator: Any) -> dict[str, float]:
        """The three accuracies, `hellaswag/…`."""
        bare = accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)
        return summarize(evaluate(bare, self.tokenizer, self.rows, self.batch_size, accelerator))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `minigpt hellaswag`."""
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--data_file", help=f"JSONL file of items (default: the validation split of {HUB_NAME})")
    parser.add_argument("--limit", type=int, help="only the first items")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences a batch of one process")
    parser.add_argument("--items", type=Path, help="write one JSON line an item here")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="keep the accuracies here as `evaluate.save` writes them; RUN/evaluations/hellaswag.json is on the card",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--use_cpu", action="store_true", help="evaluate on the CPU even where there is a GPU")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that a foreign model brings")


def main(args: argparse.Namespace) -> None:
    """`minigpt hellaswag`; under `accelerate launch -m minigpt hellaswag …` all processes share the items."""
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    rows = load_rows(args.data_file, args.limit)
    import time

    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    import modeling_minigpt  # noqa: F401 - registers MiniGPT with the Auto classes, so no trust is needed
    from minigpt.packed_linear import pack_linears
    from minigpt.tokenization import load_tokenizer

    accelerator = Accelerator(cpu=args.use_cpu or not torch.accelerator.is_available())
    tokenizer = load_tokenizer(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), trust_remote_code=args.trust_remote_code
    ).to(accelerator.device)
    model = pack_linears(model)
    started = time.perf_counter()
    answers = evaluate(model, tokenizer, rows, args.batch_size, accelerator)
    seconds = time.perf_counter() - started
    if not accelerator.is_main_process:
        return
    if args.items:
        names = ("item", "acc", "acc_norm", "acc_norm_tokens", "loglikelihoods")
        lines = [json.dumps({name: getattr(answer, name) for name in names}) for answer in answers]
        args.items.write_text("\n".join(lines) + "\n", encoding="utf-8")
    accuracies = summarize(answers)
    if args.output:
        from evaluate import save

        save(args.output, model=args.model, items=len(answers), **accuracies)
    for name, value in accuracies.items():
        error = (value * (1 - value) / max(1, len(answers) - 1)) ** 0.5
        print(f"{name:<26} {value:.4f} ± {error:.4f}")
    print(f"{len(answers)} items in {seconds:.1f} s, {len(answers) / seconds:.1f} items/s")
