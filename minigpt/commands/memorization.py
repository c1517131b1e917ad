"""Measure how much of its training text a model recites.

    minigpt memorization --model runs/quickstart

The model writes texts, and every token of them that lies in a copy of 20 or more training tokens is found. Then it
continues prompts from the training text and from the validation text. A suffix array of the training tokens is built
once and kept in the cache: 6 bytes per token.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.command_line import (
    CommandParser,
    add_model_options,
    check_output_file,
    check_positive,
    write_result,
)
from minigpt.utils.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt memorization`."""
    parser = CommandParser("minigpt memorization", __doc__)
    add = parser.add_argument
    add_model_options(parser)
    add("--data", metavar="DIR", help="folder of the token shards (default: what the run of the model was trained on)")
    add("--samples", type=int, default=100, metavar="N", help="texts that the model writes (default: %(default)s)")
    add("--max_new_tokens", type=int, default=256, metavar="N", help="tokens of each (default: %(default)s)")
    add("--temperature", type=float, default=1.0, metavar="T", help="of these texts (default: %(default)s)")
    add("--prompts", type=int, default=200, metavar="N", help="prompts from each split (default: %(default)s)")
    add(
        "--prompt_tokens",
        type=int,
        metavar="N",
        help="tokens of a prompt, and of its continuation (default: 50, or half of a shorter context)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of texts and prompts (default: %(default)s)")
    add("--device", metavar="D", help="default: the accelerator of this machine, else the CPU")
    add("--json", action="store_true", help="print JSON instead of text")
    add("--output", metavar="FILE", help="also write JSON; RUN/evaluations/memorization.json puts it on the card")
    args = parser.parse_args(argv)
    check_positive(args, "samples", "max_new_tokens", "prompts", "prompt_tokens")
    check_output_file(args, "output")
    if not args.temperature >= 0:
        raise UserError(f"temperature={args.temperature} must be at least 0")
    return args


def run(args: argparse.Namespace) -> None:
    """Measure and print. Raises UserError if model and text cannot be loaded or do not belong together."""
    from transformers.utils import logging

    from minigpt.config.parser import parse_arguments
    from minigpt.data.copy_index import build_copy_index, index_folder
    from minigpt.data.datamodule import load_data
    from minigpt.data.prepare import cache_folder
    from minigpt.data.shards import open_shards
    from minigpt.data.tokenizer import load_tokenizer, tokenizer_hash
    from minigpt.evaluation.memorization import measure
    from minigpt.modeling.loading import find_model, load_model
    from minigpt.utils.run_files import ARGUMENTS_FILE

    logging.set_verbosity_error()
    source = find_model(args.model)
    options, recorded = None, Path(source) / ARGUMENTS_FILE
    if recorded.is_file():
        options = parse_arguments([str(recorded)], program="minigpt memorization")
    if args.data is None and options is None:
        raise UserError(f"model={args.model} is no run of MiniGPT; give its token shards with --data")
    tokenizer = load_tokenizer(source, trust_remote_code=args.trust_remote_code)
    shards = open_shards(args.data) if args.data else load_data(options)[0]  # type: ignore[arg-type]
    if shards.tokenizer_hash is not None and shards.tokenizer_hash != tokenizer_hash(tokenizer):
        raise UserError(f"the token shards were made with another tokenizer than that of model={args.model}")
    folder = index_folder(cache_folder(options) if options else Path(args.data), shards)
    index = build_copy_index(shards.train, tokenizer.eos_token_id, folder)
    model = load_model(
        source, dtype=args.dtype, device=args.device, trust_remote_code=args.trust_remote_code, pack=True
    )
    report = measure(
        model,
        tokenizer,
        index,
        shards.train,
        shards.validation,
        samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        prompts=args.prompts,
        prompt_tokens=args.prompt_tokens,
        seed=args.seed,
    )
    print(json.dumps(report.as_dict(), indent=2) if args.json else "\n".join(report.lines()))
    if args.output:
        write_result(args.output, report.as_dict())
