"""HellaSwag's items: loading, cleaning and tokenizing as lm-evaluation-harness does.

Source: Zellers et al. 2019 (arXiv:1905.07830).
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.utils.errors import UserError

HUB_NAME = "Rowan/hellaswag"

ENDINGS = 4


@dataclass(frozen=True)
class Item:
    """One question: token ids of the context [c] and of each ending [e], and what scoring needs to know of them."""

    number: int
    context: list[int]
    endings: list[list[int]]
    ending_bytes: list[int]  # UTF-8 bytes of each ending's text
    label: int


def load_rows(data_file: str | Path | None, limit: int | None) -> list[dict[str, Any]]:
    """The first `limit` rows of a JSONL file, or of the validation split of the Hub's data set.

    Raises UserError that names the file and line of a row that is no HellaSwag item.
    """
    if data_file is None:
        from datasets import load_dataset

        try:
            rows: Iterable[dict[str, Any]] = load_dataset(HUB_NAME, split="validation")
        except OSError as error:  # huggingface_hub's and requests' errors of the network are of this kind
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"HellaSwag cannot be had from the Hub; give its items as a JSONL file ({reason})"
            ) from error
        return [row for row, _ in zip(rows, range(limit or 10**9), strict=False)]
    if not Path(data_file).is_file():
        raise UserError(f"{data_file}: no such file; HellaSwag's items are expected there as JSONL")
    loaded: list[dict[str, Any]] = []
    for number, line in enumerate(Path(data_file).read_text(encoding="utf-8").splitlines(), start=1):
        if limit is not None and len(loaded) == limit:
            break
        try:
            row = json.loads(line)
            valid = len(row["endings"]) == ENDINGS and 0 <= int(row["label"]) < ENDINGS
            if not valid or not {"activity_label", "ctx_a", "ctx_b"} <= row.keys():
                raise UserError("fields")
        except (ValueError, KeyError, TypeError) as error:
            fields = "activity_label, ctx_a, ctx_b, four endings and a label of 0 to 3"
            raise UserError(f"{data_file} line {number}: not a HellaSwag item, which has {fields}") from error
        loaded.append(row)
    if not loaded:
        raise UserError(f"{data_file}: no HellaSwag items in it")
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
