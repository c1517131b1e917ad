"""The `minigpt` command: each verb is a module of `minigpt.commands`, imported only when it is called.

A command module has `parse(argv)`, which checks the command line and imports nothing heavy, and `run(args)`.
"""

import importlib
import sys
from collections.abc import Collection
from types import ModuleType

from minigpt import __version__
from minigpt.utils.errors import UserError, file_errors_are_user_errors, one_line_errors

VERBS = {
    "train": "train a model, through accelerate's launcher",
    "prepare": "turn text into token shards",
    "generate": "continue prompts",
    "playground": "explore a model in the browser",
    "eval": "loss, perplexity and bits per byte over a text",
    "hellaswag": "accuracy on HellaSwag, in three normalizations",
    "export gpt2": "export a model as a stock GPT-2 folder",
    "plan": "estimate the memory and time of a run before it starts",
    "plot": "draw the curves of runs",
    "verify-resume": "verify that a run resumes exactly",
    "replay": "replay a step that was skipped because its gradient was not finite",
    "data inspect": "describe token shards",
    "data verify": "compare token shards with their manifest",
    "bench train": "measure training beside nanoGPT and transformers' Trainer",
    "bench loss": "measure the time to a validation loss beside nanoGPT",
    "bench generate": "measure decoding beside transformers' GPT-2",
    "bench tokenize": "measure tokenizing beside tokenizers and tiktoken",
    "bench load": "measure loading batches",
}


def main(argv: list[str] | None = None) -> None:
    """Run one verb. Bad input prints one line and exits with 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(VERBS))
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"minigpt {__version__}")
        sys.exit(0)
    words = 2 if " ".join(argv[:2]) in VERBS else 1
    verb, rest = " ".join(argv[:words]), argv[words:]
    family = [name for name in VERBS if name.startswith(f"{verb} ")]
    if family and (not rest or rest[0] in ("-h", "--help")):
        print(_overview(family))
        sys.exit(0 if rest else 2)
    with one_line_errors("minigpt" if verb not in VERBS else f"minigpt {verb}"), file_errors_are_user_errors():
        if verb not in VERBS:
            unknown = " ".join(argv[:2]) if family else verb
            raise UserError(f"unknown verb {unknown}; choose one of {', '.join(family or VERBS)}")
        command = command_module(verb)
        command.run(command.parse(rest))


def command_module(verb: str) -> ModuleType:
    """The module of `minigpt.commands` that a verb stands for."""
    return importlib.import_module(f"minigpt.commands.{verb.replace(' ', '_').replace('-', '_')}")


def _overview(verbs: Collection[str]) -> str:
    width = max(map(len, verbs))
    lines = [f"  {verb:<{width}}  {VERBS[verb]}" for verb in verbs]
    return "\n".join(
        ["usage: minigpt VERB [options]     (minigpt VERB --help lists the options of a verb)", "", *lines]
    )


if __name__ == "__main__":
    main()
