"""A conversation with a model: its messages, and how they become a prompt that fits the context."""

from bisect import bisect_left
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from minigpt.data.chat import Messages
from minigpt.generation.sampling import Completion, Sampling, complete, context_length
from minigpt.utils.errors import UserError

NO_CHAT_TEMPLATE = (
    "the tokenizer has no chat template, so the model was not trained on conversations; fine-tune it on rows of "
    "`messages`, or continue texts with `minigpt generate --interactive`"
)


class Conversation:
    """A conversation with any causal language model whose tokenizer has a chat template.

    - messages: all of them, {"role", "content"}; the system prompt, if there is one, is the first.
    - dropped_turns: how many of the oldest turns were not in the last prompt, since they did not fit. A turn is a
      question with its answer.

    Raises UserError if the tokenizer has no chat template.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(NO_CHAT_TEMPLATE)
        self.model, self.tokenizer = model, tokenizer
        self.messages: Messages = []
        self.dropped_turns = 0
        self.system_prompt = system_prompt

    @property
    def turns(self) -> int:
        """How many questions there are."""
        return len(self._questions())

    @property
    def system_prompt(self) -> str | None:
        """The text of the system message; setting it changes the next prompt, None removes it."""
        return self.messages[0]["content"] if self._first_turn() else None

    @system_prompt.setter
    def system_prompt(self, text: str | None) -> None:
        self.messages[: self._first_turn()] = [] if text is None else [{"role": "system", "content": text}]

    def ask(self, text: str, sampling: Sampling, seed: int, streamer: BaseStreamer | None = None) -> Completion:
        """Append a question and its answer. The answer depends on the messages, `sampling` and `seed` alone.

        The content of the answer is the text of the completion without white space around it. An answer ends at the
        latest when the context is full. After any exception, and after Ctrl-C, the messages are as before.
        Raises UserError as `prompt`.
        """
        messages = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            return self.answer(sampling, seed, streamer)
        except BaseException:
            del self.messages[messages:]
            raise

    def answer(self, sampling: Sampling, seed: int, streamer: BaseStreamer | None = None) -> Completion:
        """Append an answer to messages that end with a question; see `ask`."""
        prompt, dropped_turns = self.prompt(sampling.max_new_tokens)
        limit = context_length(self.model)
        room = sampling.max_new_tokens if limit is None else min(sampling.max_new_tokens, limit - len(prompt))
        sampling = replace(sampling, max_new_tokens=room, num_return_sequences=1)
        (completion,) = complete(self.model, self.tokenizer, prompt, sampling, seed, streamer)
        self.dropped_turns = dropped_turns
        self.messages.append({"role": "assistant", "content": completion.continuation.strip()})
        return completion

    def undo(self) -> str:
        """Remove the last question with its answer; returns the question. Raises UserError if there is none."""
        if not (questions := self._questions()):
            raise UserError("there is no question yet")
        question = self.messages[questions[-1]]["content"]
        del self.messages[questions[-1] :]
        return question

    def clear(self) -> None:
        """Remove all messages but the system prompt."""
        del self.messages[self._first_turn() :]
        self.dropped_turns = 0

    def prompt(self, max_new_tokens: int) -> tuple[list[int], int]:
        """The token ids from which the next answer is generated, and how many of the oldest turns are dropped.

        The prompt leaves room for `max_new_tokens`, but for no more than a quarter of the context, so that most of it
        is for what was said. The system prompt is always in the prompt, and as many of the last turns as fit. Raises
        UserError if the last turn does not fit, if the messages do not end with a question, and if the chat template
        refuses them.
        """
        if not self.messages or self.messages[-1]["role"] in ("system", "assistant"):
            raise UserError("the conversation does not end with a question; ask one")
        limit = context_length(self.model)
        if limit is None:
            return self._encode(self.messages), 0
        room = max(1, min(max_new_tokens, limit // 4))
        first = self._first_turn()
        # what comes before the first question belongs to no turn and is dropped first
        starts = [first, *(position for position in self._questions() if position > first)]

        def from_turn(turn: int) -> list[int]:
            return self._encode(self.messages[:first] + self.messages[starts[turn] :])

        def fits(turn: int) -> bool:
            return len(from_turn(turn)) <= limit - room

        # the last turn stays in any case, so it is not searched
        dropped_turns = 0 if fits(0) else bisect_left(range(len(starts) - 1), True, key=fits)
        prompt = from_turn(dropped_turns)
        if len(prompt) > limit - room:
            parts = "the question" if not first else "the question with the system prompt"
            raise UserError(
                f"{parts} has {len(prompt)} tokens, but the context holds {limit} and {room} of them are kept for the "
                "answer; ask a shorter question"
            )
        return prompt, dropped_turns

    def _first_turn(self) -> int:
        """How many messages come before the first turn: 1 if there is a system prompt."""
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def _questions(self) -> list[int]:
        """The positions of the user's messages."""
        return [position for position, message in enumerate(self.messages) if message["role"] == "user"]

    def _encode(self, messages: Messages) -> list[int]:
        try:
            ids: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template may raise anything, and the tokenizers library a bare Exception
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"the chat template cannot write this conversation: {reason}") from error
        if not ids:
            raise UserError("the chat template writes nothing for this conversation; give the tokenizer another one")
        return list(ids)
