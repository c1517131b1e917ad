"""Continue prompts from options, a file, a pipe or an interactive session."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.utils.errors import CommandParser, UserError

if TYPE_CHECKING:
    from minigpt.generation.sampling import Completion


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt generate`."""
    parser = CommandParser("minigpt generate", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="run folder, checkpoint, or any model folder or Hub name")
    add("--prompt", action="append", metavar="TEXT", help='text to continue (repeatable); "" begins a text')
    add("--prompt_file", metavar="FILE", help="file that holds one prompt; its last newline is not part of it")
    add("--max_new_tokens", type=int, default=200, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=1.0, metavar="X", help="0: always the likeliest token (default: 1)")
    add("--top_k", type=int, metavar="K", help="choose among the K likeliest tokens")
    add("--top_p", type=float, metavar="P", help="choose among the fewest tokens that hold P of the probability")
    add("--num_return_sequences", type=int, default=1, metavar="N", help="continuations a prompt and seed")
    add("--seed", type=int, nargs="+", default=[0], metavar="S", help="one or several seeds (default: 0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    add("--interactive", action="store_true", help="prompt after prompt; Ctrl-C stops an answer, Ctrl-D leaves")
    add("--json", action="store_true", help="one JSON object a line")
    add("--device", metavar="D", help="cpu, cuda, mps ... (default: the best there is)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="default: as saved")
    add("--trust_remote_code", action="store_true", help="run the code of a foreign model; MiniGPTs need it not")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """`minigpt generate`. Raises UserError with one clear line on bad input."""
    from minigpt.generation.interactive import _converse
    from minigpt.generation.sampling import (
        Sampling,
        complete,
        context_length,
        prompt_ids,
    )
    from minigpt.modeling.loading import load_model

    sampling = Sampling(
        args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.num_return_sequences, tuple(args.stop)
    )
    if args.interactive and (args.prompt or args.prompt_file or args.json):
        raise UserError("--interactive asks for prompts itself: leave out --prompt, --prompt_file and --json")
    if args.interactive and (sampling.num_return_sequences > 1 or len(args.seed) > 1):
        raise UserError("--interactive gives one answer at a time: one seed, num_return_sequences=1")
    prompts = [] if args.interactive else read_prompts(args)
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.trust_remote_code)
    from minigpt.modeling.packed_linear import pack_linears  # here, since it needs torch

    pack_linears(model)
    if args.interactive:
        _converse(model, tokenizer, sampling, args.seed[0])
        return
    prompts_ids = [prompt_ids(model, tokenizer, prompt) for prompt in prompts]  # every prompt is good, or none is run
    several = len(prompts) * len(args.seed) * sampling.num_return_sequences > 1
    for prompt, ids in zip(prompts, prompts_ids, strict=True):
        for seed in args.seed:
            for number, completion in enumerate(complete(model, tokenizer, ids, sampling, seed)):
                if args.json:
                    print(json.dumps(_record(prompt, seed, number, completion), ensure_ascii=False), flush=True)
                    continue
                if several:
                    print(f"--- seed {seed}, sequence {number + 1}")
                print(prompt + completion.continuation, flush=True)
                _note_refills(completion, context_length(model))


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts from the options, a file, or what is piped in. Raises UserError when the source is missing or empty."""
    prompts = list(args.prompt or [])
    if args.prompt_file:
        path = Path(args.prompt_file)
        if not path.is_file():
            raise UserError(f"prompt_file={args.prompt_file} is not a file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from error
        if not text:
            raise UserError(f"{path} is empty; for a text from nothing use --prompt ''")
        prompts.append(text.removesuffix("\n"))
    if not prompts and not sys.stdin.isatty():
        text = sys.stdin.read()
        if not text:
            raise UserError("no prompt: give --prompt TEXT, --prompt_file FILE, --interactive, or pipe a text in")
        prompts.append(text.removesuffix("\n"))
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT, --prompt_file FILE, --interactive, or pipe a text in")
    return prompts


def _record(prompt: str, seed: int, number: int, completion: "Completion") -> dict[str, Any]:
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
            f"each time the text went on from its last {(limit or 0) // 2} tokens)",
            file=sys.stderr,
        )
