"""An interactive session in the terminal: prompt, answer, prompt, and so on."""

import sys
from contextlib import suppress

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from minigpt.generation.sampling import (
    Sampling,
    complete,
    context_length,
    decode,
    final_text,
    first_stop,
    prompt_ids,
)
from minigpt.utils.errors import UserError

HELP = "/again for another answer, /undo to remove the last turn"


def run_session(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, seed: int) -> None:
    """Read prompts from the keyboard and print the answers until the input ends.

    The whole conversation stays in the context while it fits. After that its oldest part is dropped.
    """
    turns: list[tuple[list[int], str]] = []  # the context before each prompt, and the prompt
    history: list[int] = []
    limit = context_length(model)
    print(f"Type a text to continue. {HELP}; Ctrl-C stops an answer, Ctrl-D ends the session.", file=sys.stderr)
    while (prompt := _read_prompt()) is not None:
        if prompt in ("/undo", "/again"):
            if not turns:
                print("(there is no turn before this one)", file=sys.stderr)
                continue
            history, last_prompt = turns.pop()
            if prompt == "/undo":
                continue
            seed += 1
            prompt = last_prompt
        try:
            new_ids = prompt_ids(model, tokenizer, prompt) if prompt or not history else []
        except UserError as error:
            print(f"({error})", file=sys.stderr)
            continue
        turns.append((history, prompt))
        context = history + new_ids
        if limit is not None and len(context) >= limit:
            context = context[-max(len(new_ids), limit // 2) :]
            print(f"(note: the context of {limit} tokens is full: its oldest part is dropped)", file=sys.stderr)
        printer = ContinuationPrinter(tokenizer, sampling.stop)
        try:
            (completion,) = complete(model, tokenizer, context, sampling, seed + len(turns) - 1, printer)
            answer = completion.token_ids
        except KeyboardInterrupt:
            print(" ...", end="")
            answer = printer.token_ids
        printer.finish()
        history = context + answer


def _read_prompt() -> str | None:
    """The next prompt; None at the end of input and after Ctrl-C."""
    try:
        return read_line("> ")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return None


def read_line(prompt: str) -> str | None:
    """A line from the keyboard, with the line editing and history of Python's readline; None at the end of input.

    Raises UserError if the line is not UTF-8.
    """
    with suppress(ImportError):  # Windows has no readline
        import readline  # noqa: F401 - `input` uses it once it is imported
    try:
        return input(prompt)
    except EOFError:
        print(file=sys.stderr)
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"the line is not UTF-8 text: byte {error.start} cannot be read") from error


class ContinuationPrinter(BaseStreamer):
    """A streamer for `generate` that prints new text as soon as it is final, and collects the new token ids.

    With `strip`, white space at the beginning and the end of the text is not printed. printed: the text so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], strip: bool = False) -> None:
        self.tokenizer, self.stop, self.strip = tokenizer, stop, strip
        self.token_ids: list[int] = []
        self.printed = ""
        self._expects_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the next tokens; `generate` passes the prompt first."""
        if self._expects_prompt:
            self._expects_prompt = False
            return
        self.token_ids += value.flatten().tolist()
        self._print(final_text(self._text(), self.stop))

    def end(self) -> None:
        """The end of one call of `generate`; after a refill of the context, the next call passes a prompt again."""
        self._expects_prompt = True

    def finish(self) -> None:
        """Print the rest of the text: no more tokens follow, so nothing has to be held back."""
        text = self._text()
        self._print(text[: first_stop(text, self.stop)])
        print(flush=True)

    def _print(self, text: str) -> None:
        """Print what `text` adds to the text so far."""
        text = text.strip() if self.strip else text
        if len(text) > len(self.printed):
            new_text = text[len(self.printed) :]
            self.printed = text  # first, since Ctrl-C may interrupt `print`
            print(new_text, end="", flush=True)

    def _text(self) -> str:
        return decode(self.tokenizer, self.token_ids, skip_special_tokens=True)
