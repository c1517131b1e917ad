"""The model behind the playground's page: it generates in a thread and passes the text on token by token."""

from collections.abc import Callable, Iterator
from queue import Empty, Queue
from threading import Lock, Thread
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from minigpt.generation.conversation import Conversation
from minigpt.generation.inspection import attention_weights, next_token_probabilities, token_label
from minigpt.generation.sampling import (
    Completion,
    Sampling,
    complete,
    decode,
    end_of_text_ids,
    final_text,
    first_stop,
    prompt_ids,
)
from minigpt.playground.views import attention_figure, bars_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BARS = 10
SHOWN_TOKENS = 24  # more labels would be too small to read


class Player:
    """One model for all visitors. Generation and views run one at a time: they set the random state and the kernel.

    A visitor is any name; it can have one generation at a time.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.lock = Lock()
        self.running: dict[str | None, _Stream] = {}  # by visitor

    def generate(
        self, visitor: str | None, prompt: str, sampling: Sampling, seed: int
    ) -> Iterator[tuple[str, list[int]]]:
        """Yields the text so far and its token ids; ends early after `stop`. Raises UserError on bad input."""
        ids = prompt_ids(self.model, self.tokenizer, prompt)
        stream = _Stream()

        def work() -> Completion:
            (completion,) = complete(self.model, self.tokenizer, ids, sampling, seed, stream)
            return completion

        for _ in self._run(visitor, work, stream):
            yield prompt + final_text(self._text(stream), sampling.stop), ids + stream.ids
        if stream.completion is not None:
            text = stream.completion.continuation
        else:  # stopped by the visitor
            text = self._text(stream)
            text = text[: first_stop(text, sampling.stop)]
        ended = stream.ids[-1:] and stream.ids[-1] in end_of_text_ids(self.model, self.tokenizer)
        yield prompt + text, ids + (stream.ids[:-1] if ended else stream.ids)  # the views follow the shown text

    def answer(self, visitor: str | None, conversation: Conversation, sampling: Sampling, seed: int) -> Iterator[str]:
        """Append an answer to a conversation that ends with a question; yields the answer so far.

        `stop` ends the answer early; if it has no text yet, none is appended. Raises UserError if the question does
        not fit into the context.
        """
        stream = _Stream()
        for _ in self._run(visitor, lambda: conversation.answer(sampling, seed, stream), stream):
            yield final_text(self._text(stream), sampling.stop).strip()
        text = self._text(stream).strip()
        if stream.completion is None and text:
            conversation.messages.append({"role": "assistant", "content": text})

    def stop(self, visitor: str | None) -> None:
        """End the visitor's generation after its current token."""
        if visitor in self.running:
            self.running[visitor].stopped = True

    def bars(self, ids: list[int]) -> str:
        """The most likely next tokens as HTML."""
        with self.lock:
            best = next_token_probabilities(self.model, ids, BARS)
        return bars_html([(token_label(self.tokenizer, token), probability) for token, probability in best])

    def attention(self, ids: list[int], layer: int, head: int) -> "Figure":
        """The attention of one head as a figure; `layer` and `head` count from 1, as on the page."""
        with self.lock:
            weights = attention_weights(self.model, ids, layer - 1, head - 1)
        tokens = len(weights)
        labels = [token_label(self.tokenizer, token) for token in ids[-tokens:][-SHOWN_TOKENS:]]
        part = f"last {len(labels)} of {tokens} tokens" if tokens > len(labels) else f"{tokens} tokens"
        title = f"layer {layer}, head {head}: {part}"
        return attention_figure(weights[-SHOWN_TOKENS:, -SHOWN_TOKENS:].numpy(), labels, title)

    def _text(self, stream: "_Stream") -> str:
        return decode(self.tokenizer, stream.ids, skip_special_tokens=True)

    def _run(self, visitor: str | None, work: Callable[[], Completion], stream: "_Stream") -> Iterator[None]:
        """Generate in a thread; yields each time that `stream` has new ids. Raises what `work` raises."""
        self.running[visitor] = stream
        worker = Thread(target=self._work, args=(work, stream), daemon=True)
        worker.start()
        try:
            while stream.read():
                yield
            worker.join()
            if stream.error is not None:
                raise stream.error
        finally:
            stream.stopped = True  # also if the visitor has left
            self.running.pop(visitor, None)

    def _work(self, work: Callable[[], Completion], stream: "_Stream") -> None:
        try:
            with self.lock:
                stream.completion = work()
        except _Stopped:
            pass
        except Exception as error:  # raised again in the thread of the visitor
            stream.error = error
        finally:
            stream.tokens.put(None)


class _Stopped(Exception):
    """Raised inside `generate` to end it."""


class _Stream(BaseStreamer):
    """A streamer for `generate` that passes tokens to another thread, and ends the generation once it is stopped."""

    def __init__(self) -> None:
        self.tokens: Queue[list[int] | None] = Queue()
        self.ids: list[int] = []  # the tokens that were read
        self.stopped = False
        self.completion: Completion | None = None  # at the end, unless it was stopped
        self.error: Exception | None = None
        self._expects_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the next tokens; `generate` passes the prompt first."""
        if self.stopped:
            raise _Stopped
        if not self._expects_prompt:
            self.tokens.put(value.flatten().tolist())
        self._expects_prompt = False

    def end(self) -> None:
        """The end of one call of `generate`; after a refill of the context, the next call passes a prompt again."""
        self._expects_prompt = True

    def read(self) -> bool:
        """Wait for tokens and read all that have arrived. False if there will be no more."""
        tokens = self.tokens.get()
        while tokens is not None:
            self.ids += tokens
            try:
                tokens = self.tokens.get_nowait()
            except Empty:
                return True
        return False
