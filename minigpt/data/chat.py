"""Encode prompts with completions, and conversations, into token ids with a loss mask.

The loss is computed over the completion, or over the assistant's messages of a conversation.

A chat template that marks these messages with `{% generation %}` decides what belongs to them, such as the token that
ends a turn. Conversations are then encoded as by transformers' `return_assistant_tokens_mask` and TRL's
`assistant_only_loss`. Without the markers, and for prompts with completions, the text is split where the mask changes
and each part is encoded by itself. So a prompt has the same ids here as when the trained model shall complete it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS
from minigpt.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Message = dict[str, str]  # "role" and "content"
Messages = list[Message]
GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
Segments = list[tuple[str, bool]]  # consecutive texts, each with whether its tokens are in the loss


@dataclass(frozen=True)
class Example:
    """A prompt and its completion, both as text or both as messages. The prompt of a whole conversation is empty.

    `where` names the file and line in error messages; `kind` is the kind of the question, if the row has one.
    """

    prompt: str | Messages
    completion: str | Messages
    where: str
    kind: str = ""

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
        return "\n".join(message["content"] for message in self.messages)

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
        return LossMasking(template, template_variables(tokenizer), completion_only)

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
            prompt = self._render(messages[:first], example.where, add_generation_prompt=True)[0] if first else ""
            with_answer, _ = self._render(messages[:end], example.where)
            if not (prompt.startswith(written) and with_answer.startswith(prompt)):
                raise UserError(
                    f"{example.where}: the chat template writes a message differently when others follow it, so "
                    "prompt and completion cannot be separated; give them as strings"
                )
            segments += [(prompt[len(written) :], False), (with_answer[len(prompt) :], True)]
            written = with_answer
        return segments

    @property
    def has_markers(self) -> bool:
        """Whether the chat template marks the assistant's words."""
        return self.chat_template is not None and GENERATION_MARKER.search(self.chat_template) is not None

    def marked_text(self, example: Example) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the (start, end) of the assistant's words in it, in characters.

        Raises UserError if the chat template fails or marks nothing.
        """
        text, marked = self._render(example.messages, example.where)
        if not any(start < end for start, end in marked):
            raise UserError(
                f"{example.where}: the chat template marks no word of the assistant with {{% generation %}}"
            )
        return text, marked

    def _render(
        self, messages: Messages, where: str, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of messages, and what the template marks in it."""
        if self.chat_template is None:
            raise UserError(
                f"{where}: a conversation, but the rows before it are text and the tokenizer has no chat_template; "
                "give --chat_template chatml"
            )
        return render_messages(self.chat_template, self.special_tokens, messages, where, add_generation_prompt)


def template_variables(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """The special tokens by the names that a chat template knows them by, such as `eos_token`."""
    return {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def render_messages(
    chat_template: str,
    special_tokens: dict[str, str],
    messages: Messages,
    where: str,
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The text that a chat template makes of messages, and the (start, end) of the parts that it marks, in characters.

    `special_tokens` are variables of the template, such as `bos_token`. Raises UserError, which begins with `where`,
    if the template fails.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    options: dict[str, Any] = {
        "chat_template": chat_template,
        "return_assistant_tokens_mask": GENERATION_MARKER.search(chat_template) is not None,
        "add_generation_prompt": add_generation_prompt,
        **special_tokens,
    }
    try:
        # annotated as str, but it returns a list of texts and a list of marked parts
        rendered: Any = render_jinja_template([messages], **options)
    except Exception as error:  # a template may raise anything
        raise UserError(f"{where}: the chat template fails: {' '.join(str(error).split())[:300]}") from error
    (text,), marked = rendered
    return str(text), [tuple(span) for spans in marked for span in spans]


class TextEncoder(Protocol):
    """What `minigpt.data.encoding.Encoder` offers here."""

    def encode(self, texts: list[str], allow_special: bool) -> list[np.ndarray]: ...
    def encode_marked(self, text: str, marked: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]: ...


def encode_examples(
    examples: Sequence[Example],
    loss_masking: LossMasking,
    encoder: TextEncoder,
    end_of_text: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Encode examples into one array of ids [T], one array of marks [T] (uint8), and the UTF-8 bytes of their text.

    A mark has the bits IN_LOSS and ENDS_DOCUMENT. In the output of a chat template, special tokens are recognized.
    Every example ends with the id `end_of_text`: it is added, unless the text ends with it, and is in the loss if the
    token before it is.

    Raises UserError as `LossMasking.segments` and `LossMasking.marked_text`.
    """
    ids: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    text_bytes = 0
    for example in examples:
        if example.is_conversational and not example.prompt and loss_masking.has_markers:
            text, marked = loss_masking.marked_text(example)
            example_ids, is_marked = encoder.encode_marked(text, marked)
            in_loss = is_marked | (not loss_masking.completion_only)
            text_bytes += len(text.encode())
        else:
            segments = loss_masking.segments(example)
            segment_ids = encoder.encode([text for text, _ in segments], example.is_conversational)
            example_ids = np.concatenate([np.zeros(0, np.int64), *segment_ids])
            in_loss = np.repeat([part for _, part in segments], [len(part) for part in segment_ids]).astype(bool)
            text_bytes += sum(len(text.encode()) for text, _ in segments)
        if example_ids[-1:].tolist() != [end_of_text]:
            example_ids = np.append(example_ids, end_of_text)
            in_loss = np.append(in_loss, in_loss[-1:].any())
        example_marks = in_loss.astype(np.uint8) * np.uint8(IN_LOSS)
        example_marks[-1] |= ENDS_DOCUMENT
        ids.append(example_ids)
        marks.append(example_marks)
    return np.concatenate(ids), np.concatenate(marks), text_bytes
