"""An interactive session in the terminal."""

import sys
from contextlib import suppress
from typing import Any

from minigpt.generation.sampling import Sampling, complete, context_length, first_stop, prompt_ids

COMMANDS = "/again for another answer, /undo to forget the last turn"


def _converse(model: Any, tokenizer: Any, sampling: Sampling, seed: int) -> None:
    """Prompt, answer, prompt ...; the whole conversation stays in the context while it fits."""
    turns: list[tuple[list[int], str]] = []  # what the context held before each prompt, and the prompt
    history: list[int] = []
    limit = context_length(model)
    print(f"Type a text to continue. {COMMANDS}; Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
    while (prompt := _ask()) is not None:
        if prompt in ("/undo", "/again"):
            if not turns:
                print("(there is nothing before this)", file=sys.stderr)
                continue
            history, last = turns.pop()
            if prompt == "/undo":
                continue
            seed += 1
            prompt = last
        try:
            new_ids = prompt_ids(model, tokenizer, prompt) if prompt or not history else []
        except ValueError as error:
            print(f"({error})", file=sys.stderr)
            continue
        turns.append((history, prompt))
        ids = history + new_ids
        if limit is not None and len(ids) >= limit:
            ids = ids[-max(len(new_ids), limit // 2) :]
            print(f"(note: the context of {limit} tokens is full: its oldest part is forgotten)", file=sys.stderr)
        streamer = _Printer(tokenizer, sampling.stop)
        try:
            complete(model, tokenizer, ids, sampling, seed + len(turns) - 1, streamer)
        except KeyboardInterrupt:
            print(" ...", end="")
        streamer.finish()
        history = ids + streamer.new_ids


def _ask() -> str | None:
    """A line from the keyboard, edited and remembered as in a shell where Python has readline; None at its end."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - `input` uses it once it is imported
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


class _Printer:
    """A streamer for `generate` that prints text as soon as its characters are whole, and remembers the ids."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.new_ids: list[int] = []
        self.printed = 0
        self.is_prompt = True

    def put(self, value: Any) -> None:
        if self.is_prompt:  # `generate` hands over the prompt first
            self.is_prompt = False
            return
        self.new_ids += value.flatten().tolist()
        text = self.text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[self.printed :], end="", flush=True)
            self.printed = len(text)

    def text(self) -> str:
        text: str = self.tokenizer.decode(self.new_ids, skip_special_tokens=True)
        return text[: first_stop(text, self.stop)]

    def finish(self) -> None:
        print(self.text()[self.printed :], flush=True)

    def end(self) -> None:
        self.is_prompt = True  # the context was refilled: the next call begins with a prompt again
