"""Prompts with completions, and conversations, as tokens with a loss mask.

The columns have TRL's names: `prompt` and `completion`, both texts or both lists of messages, or `messages` alone. Of
the first two the completion is learned, of `messages` what the assistant says. Each part is encoded by itself, so a
prompt has the ids that it will have when somebody asks the model to complete it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS
from minigpt.utils.errors import UserError

Messages = list[dict[str, Any]]

Segments = list[tuple[str, bool]]  # texts, and whether they are to be learned


@dataclass(frozen=True)
class Example:
    """Text or messages to start from (none for a whole conversation), and what follows; `where` is for errors."""

    prompt: str | Messages
    completion: str | Messages
    where: str

    @property
    def is_conversation(self) -> bool:
        """Whether it holds messages, which a chat template has to write out."""
        return not isinstance(self.completion, str)

    def __str__(self) -> str:
        if isinstance(self.prompt, str) and isinstance(self.completion, str):
            return self.prompt + self.completion
        return "\n".join(str(message["content"]) for message in [*self.prompt, *self.completion])  # type: ignore[index]

    def __len__(self) -> int:
        return len(str(self))


@dataclass(frozen=True)
class Marking:
    """What a process needs to mark examples: the chat template with its words, and whether prompts are left out."""

    chat_template: str | None
    special_tokens: dict[str, str]
    completion_only: bool

    @staticmethod
    def of(tokenizer: Any, completion_only: bool) -> "Marking":
        """With the template of a `PreTrainedTokenizerFast`, if it has one."""
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        words = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return Marking(template, words, completion_only)

    def segments(self, example: Example) -> Segments:
        """The text of an example, part by part. Raises UserError where the template cannot tell its parts apart."""
        if example.is_conversation:
            parts = self._conversation(example)
        else:
            parts = [(str(example.prompt), False), (str(example.completion), True)]
        return [(text, learned or not self.completion_only) for text, learned in parts if text]

    def _conversation(self, example: Example) -> Segments:
        messages = [*example.prompt, *example.completion]
        if example.prompt:
            answers = [(len(example.prompt), len(messages))]
        else:
            answers = [(at, at + 1) for at, message in enumerate(messages) if message["role"] == "assistant"]
        parts: Segments = []
        done = ""
        for begin, end in answers:
            before = self._render(messages[:begin], example.where, add_generation_prompt=True) if begin else ""
            through = self._render(messages[:end], example.where)
            if not (before.startswith(done) and through.startswith(before)):
                raise UserError(
                    f"{example.where}: the chat template writes a turn differently when others follow it, so prompt "
                    "and completion cannot be told apart; give them as texts"
                )
            parts += [(before[len(done) :], False), (through[len(before) :], True)]
            done = through
        return [*parts, (self._render(messages, example.where)[len(done) :], False)]

    def _render(self, messages: Messages, where: str, **options: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.chat_template is None:
            raise UserError(f"{where}: a conversation, but the tokenizer has no chat_template; use one that has")
        try:
            rendered, _ = render_jinja_template(
                [messages], chat_template=self.chat_template, **options, **self.special_tokens
            )
        except Exception as error:  # whatever the template raises
            raise UserError(f"{where}: the chat template fails: {' '.join(str(error).split())[:300]}") from error
        return str(rendered[0])


def is_example(record: dict[str, Any]) -> bool:
    """Whether a row has the columns of an example."""
    return {"prompt", "completion"} <= record.keys() or "messages" in record


def example_of(record: dict[str, Any], where: str) -> Example:
    """The example in a row. Raises UserError if it holds none."""
    if not is_example(record):
        raise UserError(
            f"{where}: neither 'prompt' and 'completion' nor 'messages', which other rows have (its fields: "
            f"{', '.join(record) or 'none'})"
        )
    parts = {"prompt": [], "completion": record.get("messages"), **record}
    prompt, completion = parts["prompt"], parts["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Example(prompt, completion, where)
    for part in (prompt, completion):
        if not isinstance(part, list) or not all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in part
        ):
            raise UserError(f"{where}: prompt and completion must both be texts, or lists of {{role, content}}")
    if not completion:
        raise UserError(f"{where}: a conversation without messages")
    return Example(prompt, completion, where)


def marked_ids(
    examples: Sequence[Example],
    marking: Marking,
    encode: Callable[[list[str], bool], list[np.ndarray]],
    end_of_text: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """The ids of examples one after the other, their marks, and the bytes of their text.

    `encode` takes texts and whether special tokens in them count, which they do in what a template wrote. An example
    ends with `end_of_text`, which is learned where what stands before it is.
    """
    ids: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    text_bytes = 0
    for example in examples:
        segments = marking.segments(example)
        pieces = encode([text for text, _ in segments], example.is_conversation)
        learned = segments[-1][1] if segments else False
        if not segments or pieces[-1][-1:].tolist() != [end_of_text]:
            pieces, segments = [*pieces, np.array([end_of_text])], [*segments, ("", learned)]
        pairs = zip(pieces, segments, strict=True)
        of = [np.full(len(piece), IN_LOSS * is_learned, np.uint8) for piece, (_, is_learned) in pairs]
        of[-1][-1] |= ENDS_DOCUMENT
        ids += pieces
        marks += of
        text_bytes += sum(len(text.encode()) for text, _ in segments)
    return np.concatenate(ids), np.concatenate(marks), text_bytes
