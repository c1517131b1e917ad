"""Recognize the format of a row by its fields, and turn it into a document: a text, or an example for fine-tuning.

prompt, completion                  TRL's, both strings or both lists of messages
messages                            a conversation in the form of the Hugging Face libraries
conversations                       ShareGPT's: a conversation as a list of {"from": ..., "value": ...}
instruction, output [, input]       Alpaca's: one question and its answer
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from minigpt.data.chat import Example, Message
from minigpt.utils.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class RowFormat:
    """One of the formats above. `fields` are those that every row has, `optional` those that it may have."""

    name: str
    fields: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[
        [Row, str], tuple[Any, Any]
    ]  # the prompt and the completion of a row; the string names it in errors

    def parse(self, row: Row, where: str) -> Example:
        """The example in a row; `where` names the row in errors. Raises UserError if the row is not an example."""
        missing = [field for field in self.fields if row.get(field) is None]
        if missing:
            raise UserError(
                f"{where}: no {' and no '.join(map(repr, missing))}, which other rows have (its fields: "
                f"{', '.join(row) or 'none'})"
            )
        kind = row["kind"] if isinstance(row.get("kind"), str) else ""
        prompt, completion = self.read(row, where)
        if isinstance(prompt, str) and isinstance(completion, str):
            return Example(prompt, completion, where, kind)
        if isinstance(prompt, str) or isinstance(completion, str):
            raise UserError(f"{where}: prompt and completion must both be strings, or both lists of messages")
        prompt, completion = _messages(prompt, where), _messages(completion, where)
        _check_conversation([*prompt, *completion], where)
        if not completion:
            raise UserError(f"{where}: the completion has no messages")
        return Example(prompt, completion, where, kind)


def _read_completion(row: Row, where: str) -> tuple[Any, Any]:
    return row["prompt"], row["completion"]


def _read_messages(row: Row, where: str) -> tuple[Any, Any]:
    if isinstance(row["messages"], str):
        raise UserError(f"{where}: 'messages' is a string, not a list of {{role, content}}")
    return [], row["messages"]


def _read_sharegpt(row: Row, where: str) -> tuple[Any, Any]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: 'conversations' is not a list of {{from, value}}")
    messages = [
        {
            "role": SHAREGPT_ROLES.get(turn["from"], turn["from"]) if "from" in turn else turn.get("role"),
            "content": turn["value"] if "value" in turn else turn.get("content"),
        }
        for turn in turns
    ]
    return [], [*_system_message(row), *messages]


def _read_alpaca(row: Row, where: str) -> tuple[Any, Any]:
    parts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f"{where}: 'instruction' and 'input' must be strings")
    question = {"role": "user", "content": "\n\n".join(part for part in parts if part)}
    return [], [*_system_message(row), question, {"role": "assistant", "content": row["output"]}]


def _system_message(row: Row) -> list[Message]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


MESSAGES = RowFormat("conversations (messages)", ("messages",), (), _read_messages)
ROW_FORMATS = (
    RowFormat("prompts and completions", ("prompt", "completion"), (), _read_completion),
    MESSAGES,
    RowFormat("conversations in ShareGPT's format", ("conversations",), ("system",), _read_sharegpt),
    RowFormat(
        "questions and answers in Alpaca's format", ("instruction", "output"), ("input", "system"), _read_alpaca
    ),
)


@dataclass(frozen=True)
class Columns:
    """Where the documents of rows are: the text in the field `text`, or an example in the fields of a RowFormat.

    A row that has both is a text, unless `prefer_examples` is set.
    """

    text: str
    prefer_examples: bool = False

    def format_of(self, fields: Collection[str]) -> RowFormat | None:
        """The format of rows with these fields; None if they hold text, or nothing known."""
        if self.text in fields and not self.prefer_examples:
            return None
        return next((form for form in ROW_FORMATS if set(form.fields) <= set(fields)), None)

    def names(self, fields: Collection[str]) -> list[str]:
        """The fields that are read, of rows with these fields."""
        form = self.format_of(fields)
        return [self.text] if form is None else [name for name in form.fields + form.optional if name in fields]


def _messages(value: Any, where: str) -> list[Message]:
    """`value` as messages with nothing but role and content. Raises UserError if it is not a list of them."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{where}: a list of messages {{role, content}} is needed, not {type(value).__name__}")
    messages: list[Message] = []
    for number, item in enumerate(value, start=1):
        role, content = item.get("role"), item.get("content")
        if role not in ROLES:
            raise UserError(f"{where}: message {number} has the role {role!r}; the roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            kind = "no content" if content is None else f"content of type {type(content).__name__}, not text"
            raise UserError(f"{where}: message {number} ({role}) has {kind}")
        if not content.strip():
            raise UserError(f"{where}: message {number} ({role}) is empty; remove the row or complete it")
        messages.append({"role": role, "content": content})
    return messages


def _check_conversation(messages: list[Message], where: str) -> None:
    """Raises UserError if a conversation has a system message that is not its first, or no answer at its end."""
    if not messages:
        raise UserError(f"{where}: a conversation without messages")
    later_system = [number for number, message in enumerate(messages, start=1) if message["role"] == "system"][-1:]
    if later_system and later_system != [1]:
        raise UserError(f"{where}: message {later_system[0]} is a system message; only the first message can be one")
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"{where}: the last message is by the {messages[-1]['role']}, so nothing can be learned from it; a "
            "conversation ends with the assistant"
        )
