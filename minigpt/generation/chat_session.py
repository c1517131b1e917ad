"""A conversation at the keyboard, with commands; or with one question per line of a pipe."""

import difflib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from minigpt.data.chat import Messages
from minigpt.data.rows import ROLES
from minigpt.generation.conversation import Conversation
from minigpt.generation.interactive import ContinuationPrinter, read_line
from minigpt.generation.sampling import Completion, Sampling, context_length
from minigpt.utils.errors import UserError, file_errors_are_user_errors
from minigpt.utils.files import read_text, write_atomically

GREEN, DIM = "32", "2"
WRITING = "End a line with \\ to continue on the next one. Put a space before a question that begins with /."


class ChatSession:
    """Takes questions and commands. Answers go to stdout, notes to stderr.

    The first answer is generated with `seed`; each question before it and each /again adds 1. So an answer depends on
    the messages, the options and the number of repetitions, and not on how the conversation came about.
    """

    def __init__(self, conversation: Conversation, sampling: Sampling, seed: int) -> None:
        self.conversation, self.sampling, self.seed = conversation, sampling, seed
        self.streams = False
        self.ended = False
        self._repetitions = 0  # of the last question

    def run_at_keyboard(self) -> None:
        """Take lines until the input ends. An answer appears token by token, and Ctrl-C stops it."""
        self.streams = True
        note("Ask a question. /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the session.")
        while not self.ended:
            try:
                text = _read_text(_read_key_line)
                if text is None:
                    return
                with file_errors_are_user_errors():
                    self.take(text)
            except UserError as error:
                note(str(error))
            except KeyboardInterrupt:
                print(file=sys.stderr)
                note("Ctrl-D ends the session")

    def run_pipe(self) -> None:
        """Take lines from stdin until it ends. Raises UserError for the first question or command that fails."""
        while not self.ended and (text := _read_text(_read_pipe_line)) is not None:
            self.take(text)

    def take(self, text: str) -> None:
        """Answer a question or carry out a command. Raises UserError if that is impossible."""
        if text.startswith("/"):
            self._command(text)
        elif question := text.strip():
            self._ask(question)

    def _ask(self, question: str, repetitions: int = 0) -> bool:
        """Ask and print the answer. Returns False if it was stopped before its first word, and is not kept."""
        conversation, stop = self.conversation, self.sampling.stop
        printer = ContinuationPrinter(conversation.tokenizer, stop, strip=True) if self.streams else None
        seed = self.seed + conversation.turns + repetitions
        dropped_turns = conversation.dropped_turns
        is_kept = True
        try:
            completion = conversation.ask(question, self.sampling, seed, printer)
        except KeyboardInterrupt:
            if printer is None:
                raise
            print(flush=True)
            is_kept = bool(printer.printed)
            if is_kept:
                conversation.messages += [_message("user", question), _message("assistant", printer.printed)]
                note("stopped; the answer so far is kept")
            else:
                note("stopped before the first word; nothing is kept")
        else:
            if printer:
                printer.finish()
            else:
                print(conversation.messages[-1]["content"], flush=True)
            self._explain(completion)
            if conversation.dropped_turns and not dropped_turns:
                limit = context_length(conversation.model)
                note(f"from now on the oldest turns are dropped: the context holds {limit} tokens")
        if is_kept:
            self._repetitions = repetitions
        if printer:
            print(file=sys.stderr)  # between two turns
        return is_kept

    def _explain(self, completion: Completion) -> None:
        """Say why an answer is empty or ends in the middle."""
        if not self.conversation.messages[-1]["content"]:
            note("the answer is empty; /again for another one")
        elif completion.finish_reason == "length" and completion.new_tokens < self.sampling.max_new_tokens:
            note(f"the answer is cut off: the context of {context_length(self.conversation.model)} tokens is full")
        elif completion.finish_reason == "length":
            note(f"the answer is cut off: max_new_tokens={completion.new_tokens}")

    def _command(self, text: str) -> None:
        word, *rest = text.split(maxsplit=1)
        argument = rest[0].strip() if rest else ""
        command = COMMANDS.get(word)
        if command is None:
            nearest = difflib.get_close_matches(word, COMMANDS, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "/help lists the commands."
            raise UserError(f"unknown command {word}; {hint} (A question that begins with / needs a space before it.)")
        if argument and not command.argument:
            raise UserError(f"{word} takes nothing after it, but {argument!r} follows")
        if not argument and command.argument.isalpha():
            raise UserError(f"{word} needs a name: {word} {command.argument}")
        command.run(self, argument)

    def again(self, _: str) -> None:
        """Replace the last answer by another one, generated with the next seed."""
        if self.sampling.temperature == 0:
            raise UserError("temperature=0 always gives the same answer; start with another --temperature")
        messages = self.conversation.messages.copy()
        question = self.conversation.undo()
        is_kept = False
        try:
            is_kept = self._ask(question, self._repetitions + 1)
        finally:
            if not is_kept:
                self.conversation.messages[:] = messages

    def undo(self, _: str) -> None:
        """Remove the last question and its answer."""
        self.conversation.undo()
        self._repetitions = 0
        note("the last question and its answer are removed")

    def system(self, text: str) -> None:
        """Set the system prompt, or show it."""
        if text:
            self.conversation.system_prompt = text
            note("the next answer follows this system prompt")
        else:
            prompt = self.conversation.system_prompt
            note("there is no system prompt" if prompt is None else f"the system prompt is: {prompt}")

    def save(self, name: str) -> None:
        """Write the conversation to a file."""
        path = Path(name).expanduser()
        save_conversation(self.conversation.messages, path)
        note(f"saved in {path}")

    def load(self, name: str) -> None:
        """Go on with the conversation in a file."""
        messages = load_conversation(Path(name).expanduser())
        self.conversation.clear()
        self.conversation.messages[:] = messages
        self._repetitions = 0
        note(f"questions so far: {self.conversation.turns}; the last answer was: {messages[-1]['content']}")

    def clear(self, _: str) -> None:
        """Begin a new conversation with the same system prompt."""
        self.conversation.clear()
        self._repetitions = 0
        note("a new conversation begins" + (", with the same system prompt" if self.conversation.messages else ""))

    def help(self, _: str) -> None:
        """Show the commands."""
        usages = {f"{word} {command.argument}".strip(): command.help for word, command in COMMANDS.items()}
        width = max(map(len, usages))
        print("\n".join([*(f"{usage:<{width}}  {text}" for usage, text in usages.items()), WRITING]), file=sys.stderr)

    def exit(self, _: str) -> None:
        """End the session."""
        self.ended = True


@dataclass(frozen=True)
class Command:
    """argument: what follows the word, in capitals if it is required, in brackets if not, "" if nothing may follow."""

    run: Callable[[ChatSession, str], None]
    argument: str
    help: str


COMMANDS = {
    "/again": Command(ChatSession.again, "", "another answer to the last question"),
    "/undo": Command(ChatSession.undo, "", "remove the last question and its answer"),
    "/system": Command(ChatSession.system, "[TEXT]", "set the system prompt for the next answers, or show it"),
    "/save": Command(ChatSession.save, "FILE", "write the conversation as a row of training data"),
    "/load": Command(ChatSession.load, "FILE", "go on with a saved conversation"),
    "/clear": Command(ChatSession.clear, "", "begin a new conversation"),
    "/help": Command(ChatSession.help, "", "show this list"),
    "/exit": Command(ChatSession.exit, "", "end the session, as Ctrl-D does"),
}


def save_conversation(messages: Messages, path: Path) -> None:
    """Write a file with one line, {"messages": [...]}, which is a row for fine-tuning.

    Raises UserError if the file exists or if there is no answer yet.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("there is no answer yet that could be saved")
    if os.path.lexists(path):
        raise UserError(f"{path} exists; give another name or remove it first")
    write_atomically(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def load_conversation(path: Path) -> Messages:
    """The messages of a file as `save_conversation` writes it. Raises UserError if it holds anything else."""
    text = read_text(path)
    try:
        messages = [_message(one["role"], one["content"]) for one in json.loads(text)["messages"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f'{path} is not one JSON object {{"messages": [{{"role", "content"}}, ...]}}') from error
    roles = [message["role"] for message in messages]
    if not (set(map(str, roles)) <= set(ROLES) and all(isinstance(message["content"], str) for message in messages)):
        raise UserError(f"{path}: a message needs a text as its content, and one of the roles {', '.join(ROLES)}")
    if "system" in roles[1:] or roles[-1:] != ["assistant"]:
        raise UserError(f"{path}: only the first message can be a system prompt, and the last one must be an answer")
    return messages


def note(text: str) -> None:
    """Print a remark in parentheses on stderr, dim if that is a terminal."""
    print(_colored(f"({text})", DIM, sys.stderr), file=sys.stderr, flush=True)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _read_text(read: Callable[[str], str | None]) -> str | None:
    """The next line, joined with the lines after it while they end with a backslash; None at the end of input."""
    line = read("> ")
    text = line
    while line is not None and text is not None and line.endswith("\\"):
        line = read("... ")
        text = text[:-1] + "\n" + (line or "")
    return text


def _read_key_line(prompt: str) -> str | None:
    """A line from the keyboard. The prompt goes to the terminal even if stdout is a file."""
    if sys.stdout.isatty():
        return read_line(_colored(prompt, GREEN, sys.stdout, in_prompt=True))
    print(prompt, end="", file=sys.stderr, flush=True)
    return read_line("")


def _read_pipe_line(_: str) -> str | None:
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8 text: byte {error.start} cannot be read") from error
    return line.removesuffix("\n") if line else None


def _colored(text: str, code: str, stream: TextIO, in_prompt: bool = False) -> str:
    """`text` in a color of ANSI terminals, if `stream` is one and NO_COLOR (no-color.org) is not set."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    # readline counts the width of a prompt without what is between these two characters
    start, end = ("\001", "\002") if in_prompt else ("", "")
    return f"{start}\033[{code}m{end}{text}{start}\033[0m{end}"
