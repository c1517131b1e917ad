"""HellaSwag's items: loaded, cleaned and tokenized as in lm-evaluation-harness.

Source: Zellers et al. 2019 (arXiv:1905.07830).
"""

import json
import re
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from minigpt.utils.errors import UserError, first_line
from minigpt.utils.files import read_text

HUB_NAME = "Rowan/hellaswag"
ENDINGS = 4


@dataclass(frozen=True)
class Item:
    """One question: token ids of the context and of each ending, and the lengths and the label that scoring needs."""

    number: int
    context: list[int]
    endings: list[list[int]]
    ending_bytes: list[int]  # UTF-8 bytes of each ending's text
    label: int


def load_rows(data_file: str | Path | None, limit: int | None) -> list[dict[str, Any]]:
    """The first `limit` rows of a JSONL file, or of the validation split of the data set on the Hub.

    Raises UserError if there are none, or with the file and line of a row that is not a HellaSwag item.
    """
    if data_file is None:
        from datasets import load_dataset

        try:
            return list(islice(load_dataset(HUB_NAME, split="validation"), limit))
        except OSError as error:  # the network errors of huggingface_hub are OSErrors
            raise UserError(
                f"HellaSwag cannot be loaded from the Hub; give its items as a JSONL file ({first_line(error)})"
            ) from error
    path = Path(data_file)
    if not path.is_file():
        raise UserError(f"{path}: no such file; it should have the items of HellaSwag as JSONL")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(islice(StringIO(read_text(path)), limit), start=1):
        rows.append(_parse_row(line, f"{path} line {number}"))
    if not rows:
        raise UserError(f"{path}: no HellaSwag items in it")
    return rows


def _parse_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not a HellaSwag item, which is an object in JSON ({first_line(error)})") from error
    if problem := _problem(row):
        fields = "activity_label, ctx_a, ctx_b, four endings and a label from 0 to 3"
        raise UserError(f"{place}: not a HellaSwag item, which has {fields}: {problem}")
    return cast(dict[str, Any], row)


def _problem(row: Any) -> str | None:
    """What is wrong with the first wrong field of a row; None if it is a HellaSwag item."""
    if not isinstance(row, dict):
        return "it is no object"
    for name in ("activity_label", "ctx_a", "ctx_b"):
        if not isinstance(row.get(name), str):
            return f"{name} is {json.dumps(row[name])}, not a text" if name in row else f"{name} is missing"
    endings = row.get("endings")
    if not isinstance(endings, list) or len(endings) != ENDINGS:
        return "endings is no list of four texts"
    for number, ending in enumerate(endings, start=1):
        if not isinstance(ending, str) or not ending.strip():
            return f"ending {number} is {json.dumps(ending)}, not a text"
    if str(row.get("label")) not in ("0", "1", "2", "3"):
        return f"label is {json.dumps(row.get('label'))}"
    return None


def cleaned(text: str) -> str:
    """The text without the artifacts of WikiHow in the data set, as lm-evaluation-harness removes them."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def check_encodable(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, source: str | Path | None) -> None:
    """Raises UserError that names the first row of `source` whose text the tokenizer cannot encode."""
    for number, row in enumerate(rows):
        place = f"{source} line {number + 1}" if source is not None else f"{HUB_NAME} item {number}"
        try:
            item = encode_item(number, row, tokenizer)
        except Exception as error:  # the tokenizers library raises a bare Exception if there is no unknown token
            raise UserError(
                f"{place}: the tokenizer cannot encode it, such as a character that it does not know "
                f"({first_line(error)}); remove the item, or use another tokenizer"
            ) from error
        if not item.context or not all(item.endings):
            raise UserError(f"{place}: its context or one of its endings has no tokens; remove the item")


def encode_item(number: int, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Item:
    """Tokenize a row. The tokens of an ending are those after the context when both are encoded as one text."""
    context = cleaned(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    texts = [cleaned(ending) for ending in row["endings"]]
    # a space at the end of the context belongs to the first word of the ending
    body, space = context.rstrip(), context[len(context.rstrip()) :]
    context_ids = tokenizer.encode(body, add_special_tokens=False)
    full_ids = [tokenizer.encode(f"{body}{space} {text}", add_special_tokens=False) for text in texts]
    endings = [ids[len(context_ids) :] for ids in full_ids]
    return Item(number, context_ids, endings, [len(text.encode()) for text in texts], int(row["label"]))
