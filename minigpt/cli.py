"""The `minigpt` command: each verb is a module of `minigpt.commands`, imported only when it is called.

A command module has `parse(argv)`, which checks the command line and imports nothing heavy, and `run(args)`.
"""

import difflib
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
    "chat": "hold a conversation with a model",
    "playground": "explore a model in the browser",
    "eval": "loss, perplexity and bits per byte over a text",
    "hellaswag": "accuracy on HellaSwag, in three normalizations",
    "memorization": "how much of its training text a model recites",
    "export gpt2": "export a model as a stock GPT-2 folder",
    "export html": "export a model as a web page that runs it",
    "export gguf": "export a model as a GGUF file for llama.cpp and Ollama",
    "export onnx": "export a model for ONNX Runtime and transformers.js",
    "merge": "merge a LoRA adapter into a whole model",
    "plan": "estimate the memory and time of a run before it starts",
    "compare": "compare two configurations, with as many seeds as it takes",
    "sweep": "train every combination of some options, and rank them",
    "plot": "draw the curves of runs",
    "verify-resume": "verify that a run resumes exactly",
    "audit": "say whether a run is what its folder says, by training parts of it again",
    "replay": "replay a step that was skipped because its gradient was not finite",
    "data inspect": "describe token shards",
    "data verify": "compare token shards with their manifest",
    "bench train": "measure training beside nanoGPT and transformers' Trainer",
    "bench loss": "measure the time to a validation loss beside nanoGPT",
    "bench race": "train beside nanoGPT for a fixed time, and draw both",
    "bench generate": "measure decoding beside transformers' GPT-2",
    "bench engines": "compare a model in llama.cpp, ONNX Runtime and here",
    "bench tokenize": "measure tokenizing beside tokenizers and tiktoken",
    "bench load": "measure loading batches",
    "bench scaling": "train small models of many shapes, for the fitted law of the loss",
    "bench choice": "hold the choice of --train_minutes against a grid by hand",
    "bench gpu": "check and measure everything that needs a GPU, in one run",
}


def main(argv: list[str] | None = None) -> None:
    """Run one verb. Bad input prints one line and exits with 2."""
    argv = sys.argv[1:] if argv is None else argv
    words = 2 if " ".join(argv[:2]) in VERBS else 1
    verb, rest = " ".join(argv[:words]), argv[words:]
    with one_line_errors(f"minigpt {verb}" if verb in VERBS else "minigpt"), file_errors_are_user_errors():
        if verb in VERBS:
            command = command_module(verb)
            command.run(command.parse(rest))
        elif verb == "--version":
            print(f"minigpt {__version__}")
        else:
            sys.exit(_show_overview(verb, rest))


def _show_overview(verb: str, rest: list[str]) -> int:
    """List all verbs, or those that begin with the word `verb`. Returns 0 if asked for, 2 if a verb is missing.

    Raises UserError for a verb that does not exist.
    """
    family = [name for name in VERBS if name.startswith(f"{verb} ")]
    is_help = (rest[:1] if family else [verb]) in (["-h"], ["--help"])
    if not is_help and (rest if family else verb):
        unknown = f"{verb} {rest[0]}" if family else verb
        choices = family or list(VERBS)
        nearest = difflib.get_close_matches(unknown, choices, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(choices)}"
        raise UserError(f"unknown verb {unknown}; {hint}")
    print(_overview(family or VERBS))
    return 0 if is_help else 2


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
