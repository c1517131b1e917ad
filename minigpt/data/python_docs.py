"""Create the corpus `python-docs` from the documentation that comes with every Python."""

import ast
import inspect
import os
import random
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minigpt.utils.errors import UserError

RECIPE = 1  # increase when the documents below change: it is part of the cache key
TEXT_BYTES = 1_600_000  # about
SHORTEST_DOCSTRING = 200  # characters

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "__pycache__",
}

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documents() -> list[str]:
    """The topics of the language reference and the longer docstrings, without duplicates and interactive examples.

    The list is the same on every machine with the same Python. It is shuffled with a fixed seed, so that the
    validation split at its end is like the rest. Raises UserError if this Python has no documentation.
    """
    texts = {text for path in _modules() for text in _docstrings(path)}
    with suppress(ImportError):  # some distributions do not ship it
        from pydoc_data.topics import topics

        texts.update(text.strip() + "\n" for text in topics.values())
    if not texts:
        raise UserError(
            "corpus=python-docs: this Python was installed without the source of its library; give --train_file"
        )
    unique_texts = sorted(texts)
    random.Random(0).shuffle(unique_texts)
    return unique_texts


def _modules() -> Iterator[Path]:
    """The source files of the standard library, in sorted order."""
    for folder, subfolders, files in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(_parse(path)):
        if isinstance(node, DOCUMENTED):
            paragraphs = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")
            text = "\n\n".join(paragraph for paragraph in paragraphs if not _is_example(paragraph)).strip()
            if len(text) > SHORTEST_DOCSTRING:
                yield text + "\n"


def _parse(path: Path) -> ast.Module:
    """The syntax tree of a source file; an empty one if the file has no docstring or is no valid source."""
    with suppress(SyntaxError, UnicodeDecodeError):
        code = path.read_text(encoding="utf-8")
        if '"""' in code:
            return ast.parse(code)
    return ast.Module([], [])


def _is_example(paragraph: str) -> bool:
    return any(line.lstrip().startswith(">>>") for line in paragraph.split("\n"))


@dataclass(frozen=True, order=True)
class Described:
    """A public name of the standard library, such as `os.path.join`, with its docstring."""

    name: str
    docstring: str
    is_function: bool


def described_names(module: str) -> list[Described]:
    """A module of the standard library with its public functions and classes: those with a docstring.

    The list is empty if this Python was installed without the source of the module.
    """
    library = Path(sysconfig.get_path("stdlib"))
    stem = "posixpath" if module == "os.path" else module.replace(".", "/")
    path = next((path for path in (library / f"{stem}.py", library / stem / "__init__.py") if path.is_file()), None)
    if path is None:
        return []
    tree = _parse(path)
    nodes: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]] = [(module, tree)]
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            nodes.append((f"{module}.{node.name}", node))
    described = ((name, ast.get_docstring(node), isinstance(node, ast.FunctionDef)) for name, node in nodes)
    return [Described(name, docstring, is_function) for name, docstring, is_function in described if docstring]
