"""The corpus `python-docs`: English text that every Python carries."""

import ast
import inspect
import os
import random
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from minigpt.utils.errors import UserError

RECIPE = 1  # raise when the documents below change: it is part of the cache's key

SHORTEST_DOCSTRING = 200  # characters

LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "__pycache__"}

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documents() -> list[str]:
    """The reference's topics and the longer docstrings, each once, without interactive examples.

    The same list on every machine with the same Python. Shuffled by a fixed seed, so that a held-out end is of the
    same kind as the rest. Raises UserError on an installation that was stripped of them.
    """
    texts = {text for path in _modules() for text in _docstrings(path)}
    with suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics

        texts.update(text.strip() + "\n" for text in topics.values())
    if not texts:
        raise UserError(
            "corpus=python-docs: this Python was installed without its library's source; give --train_file"
        )
    unique = sorted(texts)
    random.Random(0).shuffle(unique)
    return unique


def _modules() -> Iterator[Path]:
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        code = path.read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(code))) if '"""' in code else []
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in nodes:
        if isinstance(node, DOCUMENTED):
            paragraphs = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")
            text = "\n\n".join(paragraph for paragraph in paragraphs if not _is_example(paragraph)).strip()
            if len(text) > SHORTEST_DOCSTRING:
                yield text + "\n"


def _is_example(paragraph: str) -> bool:
    return any(line.lstrip().startswith(">>>") for line in paragraph.split("\n"))
