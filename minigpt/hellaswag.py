"""Can a model tell how a story goes on? HellaSwag, with the answers of lm-evaluation-harness, item by item.

Each item has a context and four endings; the model's answer is the ending that it finds likeliest. The context is
read once, and its keys and values are shared by the four endings. Source: Zellers et al. 2019 (arXiv:1905.07830).

Shapes: B items of a batch, P tokens of the longest context but its last, R rows of a batch of endings, E tokens of
the longest of them, V vocabulary.
"""

import argparse
import copy
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HUB_NAME = "Rowan/hellaswag"
ENDINGS = 4
IGNORED = -100  # the target that has no loss


@dataclass(frozen=True)
class Item:
    """One question: token ids of the context [c] and of each ending [e], and what scoring needs to know of them."""

    number: int
    context: list[int]
    endings: list[list[int]]
    ending_bytes: list[int]  # UTF-8 bytes of each ending's text
    label: int


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


def load_rows(data_file: str | Path | None, limit: int | None) -> list[dict[str, Any]]:
    """The first `limit` rows of a JSONL file, or of the validation split of the Hub's data set.

    Raises ValueError that names the file and line of a row that is no HellaSwag item.
    """
    if data_file is None:
        from datasets import load_dataset

        rows: Iterable[dict[str, Any]] = load_dataset(HUB_NAME, split="validation")
        return [row for row, _ in zip(rows, range(limit or 10**9), strict=False)]
    loaded: list[dict[str, Any]] = []
    for number, line in enumerate(Path(data_file).read_text(encoding="utf-8").splitlines(), start=1):
        if limit is not None and len(loaded) == limit:
            break
        try:
            row = json.loads(line)
            valid = len(row["endings"]) == ENDINGS and 0 <= int(row["label"]) < ENDINGS
            if not valid or not {"activity_label", "ctx_a", "ctx_b"} <= row.keys():
                raise ValueError("fields")
        except (ValueError, KeyError, TypeError) as error:
            fields = "activity_label, ctx_a, ctx_b, four endings and a label of 0 to 3"
            raise ValueError(f"{data_file} line {number}: not a HellaSwag item, which has {fields}") from error
        loaded.append(row)
    if not loaded:
        raise ValueError(f"{data_file}: no HellaSwag items in it")
    return loaded


def cleaned(text: str) -> str:
    """Without the artefacts of WikiHow that the data set carries, as lm-evaluation-harness removes them."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def encode_item(number: int, row: dict[str, Any], tokenizer: Any) -> Item:
    """Tokenize a row. An ending's tokens are those that follow when context and ending are encoded as one text."""
    context = cleaned(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    texts = [cleaned(ending) for ending in row["endings"]]
    # a space at the end of the context belongs to the first word of the ending
    body, space = context.rstrip(), context[len(context.rstrip()) :]
    context_ids = tokenizer.encode(body, add_special_tokens=False)
    wholes = [tokenizer.encode(f"{body}{space} {text}", add_special_tokens=False) for text in texts]
    endings = [whole[len(context_ids) :] for whole in wholes]
    return Item(number, context_ids, endings, [len(text.encode()) for text in texts], int(row["label"]))


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
    with torch.inference_mode():
        # the base model: nobody reads the logits of a context
        read = model.base_model(
            input_ids=contexts.to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(model.device),
            use_cache=True,
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
    with torch.inference_mode():
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
    """The answers to all rows in their order, each process having answered its share."""
    from accelerate.utils import gather_object

    model.eval()
    mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
    items = [encode_item(number, rows[number], tokenizer) for number in mine]
    answers = list(answer_items(model, items, batch_size))
    if accelerator.num_processes > 1:
        answers = gather_object(answers)
    return sorted(answers, key=lambda answer: answer.item)


def summarize(answers: list[Answer]) -> dict[str, float]:
    """Accuracies under the names that the trainer and the trackers use."""
    return {
        f"hellaswag/{name}": float(np.mean([getattr(answer, name) for answer in answers]))
        for name in ("acc", "acc_norm", "acc_norm_tokens")
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `minigpt hellaswag`."""
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--data_file", help=f"JSONL file of items (default: the validation split of {HUB_NAME})")
    parser.add_argument("--limit", type=int, help="only the first items")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences a batch of one process")
    parser.add_argument("--items", type=Path, help="write one JSON line an item here")
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
    from minigpt.tokenization import load_tokenizer

    accelerator = Accelerator(cpu=args.use_cpu or not torch.accelerator.is_available())
    tokenizer = load_tokenizer(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), trust_remote_code=args.trust_remote_code
    ).to(accelerator.device)
    started = time.perf_counter()
    answers = evaluate(model, tokenizer, rows, args.batch_size, accelerator)
    seconds = time.perf_counter() - started
    if not accelerator.is_main_process:
        return
    if args.items:
        names = ("item", "acc", "acc_norm", "acc_norm_tokens", "loglikelihoods")
        lines = [json.dumps({name: getattr(answer, name) for name in names}) for answer in answers]
        args.items.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, value in summarize(answers).items():
        error = (value * (1 - value) / max(1, len(answers) - 1)) ** 0.5
        print(f"{name:<26} {value:.4f} ± {error:.4f}")
    print(f"{len(answers)} items in {seconds:.1f} s, {len(answers) / seconds:.1f} items/s")
