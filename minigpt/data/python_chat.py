"""Create the corpus `python-chat`: conversations made by rules, and from the documentation that comes with Python.

Their answers are rules to learn, and the first sentence of a docstring. Some conversations have a system message or
several turns. What a rule asks for occurs in one conversation only, so the held-out ones show whether a model has
learned the rules.
"""

import builtins
import importlib
import inspect
import random
import re
from collections.abc import Iterator
from types import BuiltinFunctionType, MethodDescriptorType, ModuleType
from typing import Any

from minigpt.data.chat import Message, Messages
from minigpt.data.python_docs import Described, described_names
from minigpt.data.rule_tasks import NAMES, RuleTask, rule_tasks

RECIPE = 4  # increase when the conversations below change: it is part of the cache key
RULE_TASKS = 32_000
HELD_OUT_PERCENTAGE = 3  # the end of the list: no training may see it that `minigpt eval` is to measure
TEXT_BYTES = 2_700_000  # about
DOCUMENTATION = "documentation"  # the kind of the conversations that no rule makes
LONGEST_DESCRIPTION = 80  # characters

SYSTEM_MESSAGES = ("You are a helpful assistant.", "You know Python well.", "Answer in one line.", "Be brief.")
GREETINGS = ("Hello!", "Hi!", "Hi there.", "Good morning.", "Hello, who are you?")
WELCOME = "Hello! I am a small model that knows some Python. How can I help?"
BUILTIN_TYPES = (bool, bytes, dict, float, frozenset, int, list, set, str, tuple)
EXTENSION_MODULES = ("itertools", "math")  # written in C and the same on every platform
MODULES = (
    *("argparse", "ast", "base64", "bisect", "calendar", "collections", "configparser", "contextlib", "copy", "csv"),
    *("dataclasses", "datetime", "decimal", "difflib", "email", "enum", "fileinput", "fnmatch", "fractions"),
    *("functools", "getpass", "glob", "gzip", "hashlib", "heapq", "hmac", "html", "http.client", "inspect", "io"),
    *("ipaddress", "json", "keyword", "linecache", "locale", "logging", "mimetypes", "numbers", "operator", "os"),
    *("os.path", "pathlib", "pickle", "pickletools", "pkgutil", "platform", "pprint", "queue", "random", "re"),
    *("sched", "secrets", "shelve", "shlex", "shutil", "signal", "socket", "sqlite3", "statistics", "string"),
    *("struct", "subprocess", "symtable", "sysconfig", "tarfile", "tempfile", "textwrap", "threading", "timeit"),
    *("tokenize", "trace", "traceback", "types", "typing", "unittest.case", "unittest.mock", "urllib.parse"),
    *("urllib.request", "uuid", "warnings", "weakref", "webbrowser", "zipfile"),
)


def documents() -> list[dict[str, Any]]:
    """Rows of `messages` and `kind`, which names the last question's rule; the kind "documentation" has no rule.

    The list is the same on every machine with the same Python. It is shuffled with a fixed seed, so that the
    validation split at its end is like the rest. Raises UserError if this Python has no documentation.
    """
    choice = random.Random(0)
    questions = [*rule_tasks(RULE_TASKS), *_questions_about_python()]
    choice.shuffle(questions)
    rows = []
    while questions:
        task = questions.pop()
        kind, turns = task.kind, _turn(task.question, task.answer)
        form = choice.random()
        if form < 0.02:
            turns = [{"role": "system", "content": choice.choice(SYSTEM_MESSAGES)}, *turns]
        elif form < 0.04:
            turns = [*_turn(choice.choice(GREETINGS), WELCOME), *turns]
        elif form < 0.16 and questions:
            next_task = questions.pop()
            kind, turns = next_task.kind, [*turns, *_turn(next_task.question, next_task.answer)]
        elif form < 0.2:
            kind, turns = "name", _conversation_about_a_name(choice.choice(NAMES), turns)
        rows.append({"kind": kind, "messages": turns})
    return rows


def _turn(question: str, answer: str) -> Messages:
    messages: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _conversation_about_a_name(name: str, turns: Messages) -> Messages:
    """A name is told, something else is asked, and the name is asked for."""
    introduction = _turn(f"My name is {name}.", f"Hello, {name}!")
    return [*introduction, *turns, *_turn("What is my name?", f"Your name is {name}.")]


def _questions_about_python() -> list[RuleTask]:
    from_source = [item for module in MODULES for item in described_names(module)]
    described = sorted({item.name: item for item in [*from_source, *_described_in_c()]}.values())
    tasks = []
    for item in described:
        sentence = _first_sentence(item.docstring)
        if sentence:
            question = f"What does {item.name} do?" if item.is_function else f"What is {item.name}?"
            tasks.append(RuleTask(DOCUMENTATION, question, sentence))
    return tasks


def _described_in_c() -> Iterator[Described]:
    """The builtins, their methods, and extension modules: their docstrings are in no source file of the library."""
    modules: list[ModuleType] = [builtins, *map(importlib.import_module, EXTENSION_MODULES)]
    owners = [("" if module is builtins else f"{module.__name__}.", module) for module in modules]
    for prefix, owner in [*owners, *((f"{kind.__name__}.", kind) for kind in BUILTIN_TYPES)]:
        for name, value in vars(owner).items():
            is_function = isinstance(value, BuiltinFunctionType | MethodDescriptorType)
            # an alias such as IOError has another name, and there are more of them on Windows
            if (is_function or isinstance(value, type)) and not name.startswith("_") and value.__name__ == name:
                yield Described(prefix + name, inspect.cleandoc(value.__doc__ or ""), is_function)


def _first_sentence(docstring: str) -> str | None:
    """The first sentence on one line; None if there is none, or a long one, or one that starts with a signature."""
    for paragraph in docstring.split("\n\n")[:2]:
        sentence = re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(paragraph.split()))[0]
        if re.match(r"[A-Z][a-z]* [^=|*~`]*\.$", sentence) and sentence.isascii():
            return sentence if 15 <= len(sentence) <= LONGEST_DESCRIPTION else None
    return None
