"""Continue prompts from options, a file, a pipe or an interactive session."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.utils.command_line import DTYPES, CommandParser, add_model_options, add_sampling_options
from minigpt.utils.errors import UserError
from minigpt.utils.files import read_text

if TYPE_CHECKING:
    from minigpt.generation.sampling import Completion

NO_PROMPT = "no prompt: give --prompt TEXT, --prompt_file FILE or --interactive, or pipe a text in"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt generate`."""
    parser = CommandParser("minigpt generate", __doc__)
    add = parser.add_argument
    add_model_options(parser, dtypes=("auto", *DTYPES))
    add_sampling_options(parser, max_new_tokens=200, temperature=1.0, top_p=None)
    add("--prompt", action="append", metavar="TEXT", help='text to continue (repeatable); "" begins a new text')
    add("--prompt_file", metavar="FILE", help="file with one prompt; its last newline is not part of the prompt")
    add(
        "--num_return_sequences",
        type=int,
        default=1,
        metavar="N",
        help="continuations per prompt and seed (default: %(default)s)",
    )
    add("--seed", type=int, nargs="+", default=[0], metavar="S", help="one or several seeds (default: 0)")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text appears in the continuation (repeatable)",
    )
    add(
        "--cache_implementation",
        choices=["dynamic", "static"],
        help="cache of keys and values: dynamic grows with the text, static has a fixed size and can be compiled "
        "(default: dynamic; static with --torch_compile)",
    )
    add(
        "--torch_compile",
        action="store_true",
        help="compile the decoding step, on a GPU with CUDA graphs; pays off for long or many texts",
    )
    add(
        "--torch_compile_backend",
        choices=["inductor", "aot_eager", "eager", "cudagraphs"],
        default="inductor",
        help="compiler of --torch_compile (default: %(default)s)",
    )
    add("--interactive", action="store_true", help="read prompt after prompt; Ctrl-C stops an answer, Ctrl-D ends")
    add("--json", action="store_true", help="print one JSON object per line")
    args = parser.parse_args(argv)
    if args.torch_compile and args.cache_implementation == "dynamic":
        raise UserError("torch_compile requires cache_implementation=static: a growing cache cannot be compiled once")
    return args


def run(args: argparse.Namespace) -> None:
    """`minigpt generate`. Raises UserError if an option is impossible, or if a prompt or the model cannot be used."""
    from transformers.utils import logging

    from minigpt.data.tokenizer import load_tokenizer
    from minigpt.generation.interactive import run_session
    from minigpt.generation.sampling import Sampling, complete, context_length, prompt_ids
    from minigpt.generation.static_cache import use_static_cache
    from minigpt.modeling.loading import find_model, load_model

    sampling = Sampling(
        args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.num_return_sequences, tuple(args.stop)
    )
    if args.interactive and (args.prompt or args.prompt_file or args.json):
        raise UserError("--interactive reads prompts from the keyboard: remove --prompt, --prompt_file and --json")
    if args.interactive and (sampling.num_return_sequences > 1 or len(args.seed) > 1):
        raise UserError("--interactive gives one answer at a time: use one seed and num_return_sequences=1")
    prompts = [] if args.interactive else read_prompts(args)
    logging.set_verbosity_error()  # otherwise transformers warns about a long prompt, which is an error anyway
    source = find_model(args.model)
    tokenizer = load_tokenizer(source, trust_remote_code=args.trust_remote_code, require_eos=False, require_fast=False)
    model = load_model(
        source, dtype=args.dtype, device=args.device, trust_remote_code=args.trust_remote_code, pack=True
    )
    if args.torch_compile or args.cache_implementation == "static":
        use_static_cache(model, args.torch_compile_backend if args.torch_compile else None)
    if args.interactive:
        run_session(model, tokenizer, sampling, args.seed[0])
        return
    # all prompts are checked before the first one is continued
    token_ids = [prompt_ids(model, tokenizer, prompt) for prompt in prompts]
    is_single = len(prompts) * len(args.seed) * sampling.num_return_sequences == 1
    for prompt, ids in zip(prompts, token_ids, strict=True):
        for seed in args.seed:
            for number, completion in enumerate(complete(model, tokenizer, ids, sampling, seed)):
                if args.json:
                    print(json.dumps(_record(prompt, seed, number, completion), ensure_ascii=False), flush=True)
                    continue
                if not is_single:
                    print(f"--- seed {seed}, sequence {number + 1}")
                print(prompt + completion.continuation, flush=True)
                _note_refills(completion, context_length(model))


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts from the options, a file, or a pipe. Raises UserError if the source is missing or empty."""
    prompts = list(args.prompt or [])
    if args.prompt_file:
        path = Path(args.prompt_file)
        if not path.is_file():
            raise UserError(f"prompt_file={args.prompt_file} is not a file")
        text = read_text(path)
        if not text:
            raise UserError(f"{path} is empty; to begin a new text use --prompt ''")
        prompts.append(text.removesuffix("\n"))
    if not prompts and not sys.stdin.isatty():
        text = sys.stdin.read()
        if not text:
            raise UserError(NO_PROMPT)
        prompts.append(text.removesuffix("\n"))
    if not prompts:
        raise UserError(NO_PROMPT)
    return prompts


def _record(prompt: str, seed: int, number: int, completion: "Completion") -> dict[str, str | int]:
    return {
        "prompt": prompt,
        "continuation": completion.continuation,
        "seed": seed,
        "sequence": number,
        "new_tokens": completion.new_tokens,
        "finish_reason": completion.finish_reason,
        "context_refills": completion.refills,
    }


def _note_refills(completion: "Completion", limit: int | None) -> None:
    if completion.refills:
        print(
            f"(note: the context of {limit} tokens was full {completion.refills} times; "
            f"each time the text continued from its last {(limit or 0) // 2} tokens)",
            file=sys.stderr,
        )
