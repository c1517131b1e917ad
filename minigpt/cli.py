"""`minigpt VERB …`: one console command whose verbs are imported only when they are called."""

import importlib
import sys
from collections.abc import Collection

from minigpt.errors import OneLineParser, one_line_errors

# verb: (module, what it does). A module has `main(argv)`, or `add_arguments(parser)` and `main(args)`.
VERBS = {
    "prepare": ("minigpt.prepare", "turn text into token shards"),
    "generate": ("minigpt.generate", "continue prompts, or talk with a model"),
    "playground": ("minigpt.playground", "a page to play with a model"),
    "eval": ("minigpt.perplexity", "loss, perplexity and bits per byte over a text"),
    "hellaswag": ("minigpt.hellaswag", "accuracy on HellaSwag, in three normalisations"),
    "export-gpt2": ("minigpt.gpt2_export", "write a stock GPT-2 folder"),
    "plan": ("minigpt.budget", "what a run will cost: memory and time, before it starts"),
    "plot": ("minigpt.plot", "draw the curves of runs"),
    "verify-resume": ("minigpt.verify_resume", "prove that a run resumes exactly"),
    "replay": ("minigpt.replay", "run a step again whose gradient was not finite"),
    "data": ("minigpt.data_inspect", "inspect or verify token shards"),
    "bench tokenize": ("minigpt.benchmark_tokenize", "measure tokenizing"),
    "bench load": ("minigpt.benchmark_load", "measure loading batches"),
    "bench train": ("minigpt.benchmark_train", "measure training against nanoGPT and transformers' Trainer"),
    "bench loss": ("minigpt.benchmark_loss", "measure the time to a validation loss against nanoGPT"),
    "bench generate": ("minigpt.benchmark_generate", "measure generation against transformers' GPT-2"),
}


def main(argv: list[str] | None = None) -> None:
    """Run one verb; bad input prints one line and exits with 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(VERBS))
        sys.exit(0 if argv else 2)
    words = 2 if " ".join(argv[:2]) in VERBS else 1
    verb, rest = " ".join(argv[:words]), argv[words:]
    family = [name for name in VERBS if name.startswith(f"{verb} ")]
    if family and (not rest or rest[0] in ("-h", "--help")):
        print(_overview(family))
        sys.exit(0 if rest else 2)
    if verb not in VERBS:
        unknown = " ".join(argv[:2]) if family else verb
        print(f"minigpt: unknown verb {unknown}; choose one of {', '.join(family or VERBS)}", file=sys.stderr)
        sys.exit(2)
    with one_line_errors(f"minigpt {verb}"):
        module = importlib.import_module(VERBS[verb][0])
        if not hasattr(module, "add_arguments"):
            module.main(rest)
            return
        parser = OneLineParser(f"minigpt {verb}", description=module.__doc__, allow_abbrev=False)
        module.add_arguments(parser)
        module.main(parser.parse_args(rest))


def _overview(verbs: Collection[str]) -> str:
    width = max(map(len, verbs))
    lines = [f"  {verb:<{width}}  {VERBS[verb][1]}" for verb in verbs]
    return "\n".join(["usage: minigpt VERB [options]     (minigpt VERB --help tells a verb's options)", "", *lines])


if __name__ == "__main__":
    main()
