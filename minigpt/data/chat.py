"""Encode prompts with completions, and conversations, into token ids with a loss mask.

The columns have TRL's names: `prompt` and `completion`, both strings or both lists of messages, or `messages` alone.
The loss is computed over the completion, or over the assistant's messages in `messages`. Prompt and completion are
encoded separately, so a prompt has the same ids here as when the trained model is asked to complete it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS
from minigpt.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, Any]]  # each with "role" and "content"
Segments = list[tuple[str, bool]]  # consecutive texts, each with whether its tokens are in the loss


@dataclass(frozen=True)
class Example:
    """A prompt and its completion, both as text or both as messages. The prompt of a whole conversation is empty.

    `where` names the file and line in error messages.
    """

    prompt: str | Messages
    completion: str | Messages
    where: str

    @property
    def is_conversational(self) -> bool:
        """Whether prompt and completion are messages, which need a chat template."""
        return not isinstance(self.completion, str)

    @property
    def messages(self) -> Messages:
        """All messages of a conversational example."""
        assert isinstance(self.prompt, list)
        assert isinstance(self.completion, list)
        return [*self.prompt, *self.completion]

    def __str__(self) -> str:
        if isinstance(self.prompt, str) and isinstance(self.completion, str):
            return self.prompt + self.completion
        return "\n".join(str(message["content"]) for message in self.messages)

    def __len__(self) -> int:
        return len(str(self))


@dataclass(frozen=True)
class LossMasking:
    """How examples are written as text, and which parts are in the loss. Plain data, for any process that encodes.

    With `completion_only` prompts are masked out of the loss; else every token is in the loss.
    """

    chat_template: str | None
    special_tokens: dict[str, str]  # variables of the template, such as `bos_token`
    completion_only: bool

    @staticmethod
    def from_tokenizer(tokenizer: "PreTrainedTokenizerFast", completion_only: bool) -> "LossMasking":
        """With the chat template and the special tokens of `tokenizer`."""
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        special_tokens = {
            name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
        }
        return LossMasking(template, special_tokens, completion_only)

    def segments(self, example: Example) -> Segments:
        """The text of an example, split where the loss mask changes.

        Raises UserError if there is no chat template, or if its output cannot be split into prompt and completion.
        """
        if example.is_conversational:
            segments = self._conversation_segments(example)
        else:
            segments = [(str(example.prompt), False), (str(example.completion), True)]
        return [(text, in_loss or not self.completion_only) for text, in_loss in segments if text]

    def _conversation_segments(self, example: Example) -> Segments:
        messages = example.messages
        if example.prompt:
            answers = [(len(example.prompt), len(messages))]
        else:
            answers = [(index, index + 1) for index, message in enumerate(messages) if message["role"] == "assistant"]
        segments: Segments = []
        written = ""
        for first, end in answers:
            prompt = self._render(messages[:first], example.where, add_generation_prompt=True) if first else ""
            with_answer = self._render(messages[:end], example.where)
            if not (prompt.startswith(written) and with_answer.startswith(prompt)):
                raise UserError(
                    f"{example.where}: the chat template writes a message differently when others follow it, so "
                    "prompt and completion cannot be separated; give them as strings"
                )
            segments += [(prompt[len(written) :], False), (with_answer[len(prompt) :], True)]
            written = with_answer
        return [*segments, (self._render(messages, example.where)[len(written) :], False)]

    def _render(self, messages: Messages, where: str, add_generation_prompt: bool = False) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.chat_template is None:
            raise UserError(
                f"{where}: a conversation, but the tokenizer has no chat_template; use a tokenizer that has one"
            )
        variables: dict[str, Any] = {**self.special_tokens, "add_generation_prompt": add_generation_prompt}
        try:
            # annotated as str, but it returns a list of texts and a list of generation indices
            rendered: Any = render_jinja_template([messages], chat_template=self.chat_template, **variables)
        except Exception as error:  # a template may raise anything
            raise UserError(f"{where}: the chat template fails: {' '.join(str(error).split())[:300]}") from error
        texts, _ = rendered
        return str(texts[0])


def is_example(record: dict[str, Any]) -> bool:
    """Whether a row has the columns of an example."""
    return {"prompt", "completion"} <= record.keys() or "messages" in record


def parse_example(record: dict[str, Any], where: str) -> Example:
    """The example in a row; `where` names the row in errors. Raises UserError if the row is not an example."""
    if not is_example(record):
        raise UserError(
            f"{where}: neither 'prompt' and 'completion' nor 'messages', which other rows have (its fields: "
            f"{', '.join(record) or 'none'})"
        )
    prompt = record.get("prompt", [])
    completion = record.get("completion", record.get("messages"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return Example(prompt, completion, where)
    for part in (prompt, completion):
        if not isinstance(part, list) or not all(
            isinstance(message, dict) and {"role", "content"} <= message.keys() for message in part
        ):
            raise UserError(f"{where}: prompt and completion must both be strings, or both lists of {{role, content}}")
    if not completion:
        raise UserError(f"{where}: a conversation without messages")
    return Example(prompt, completion, where)


def encode_examples(
    examples: Sequence[Example],
    loss_masking: LossMasking,
    encode: Callable[[list[str], bool], list[np.ndarray]],
    end_of_text: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Encode examples into one array of ids [T], one array of marks [T] (uint8), and the UTF-8 bytes of their text.

    A mark has the bits IN_LOSS and ENDS_DOCUMENT. `encode(texts, allow_special)` returns the ids of each text; with
    `allow_special`, special tokens in a text are recognized, as they must be in the output of a chat template. Every
    example ends with the id `end_of_text`, which is in the loss if the segment before it is.

    Raises UserError as `LossMasking.segments`.
    """
    ids: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    text_bytes = 0
    for example in examples:
        segments = loss_masking.segments(example)
        segment_ids = encode([text for text, _ in segments], example.is_conversational)
        last_in_loss = segments[-1][1] if segments else False
        if not segments or segment_ids[-1][-1:].tolist() != [end_of_text]:
            segment_ids = [*segment_ids, np.array([end_of_text])]
            segments = [*segments, ("", last_in_loss)]
        segment_marks = [
            np.full(len(token_ids), IN_LOSS * in_loss, np.uint8)
            for token_ids, (_, in_loss) in zip(segment_ids, segments, strict=True)
        ]
        segment_marks[-1][-1] |= ENDS_DOCUMENT
        ids += segment_ids
        marks += segment_marks
        text_bytes += sum(len(text.encode()) for text, _ in segments)
    return np.concatenate(ids), np.concatenate(marks), text_bytes
