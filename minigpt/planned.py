"""Which model do the options of a run mean, and how many steps? Answered before there are a tokenizer and shards."""

import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from configuration_minigpt import MiniGPTConfig
from minigpt.arguments import TEXT_SOURCES, Arguments
from minigpt.command_line import parse_arguments, read_config
from minigpt.corpora import open_corpus
from minigpt.data import SampleOrder, steps_of_run
from minigpt.shards import open_shards
from minigpt.tokenization import load_tokenizer


def planned_arguments(words: Sequence[str]) -> Arguments:
    """The options of the run. A preset that leaves its text to the command line can be planned without it."""
    if not words or words[0].startswith("-"):
        raise ValueError("give a preset first, as in: minigpt plan configs/quickstart.yaml")
    sys.argv[0] = "minigpt plan"  # the parser of the options names itself by it
    presets = takewhile(lambda word: not word.startswith("-"), words)
    named = {f"--{key}" for preset in presets for key in read_config(preset)} | {word.split("=")[0] for word in words}
    has_text = any(f"--{source}" in named for source in TEXT_SOURCES)
    # any text: the shape does not depend on it, or the error below says so
    args = parse_arguments([*words, *([] if has_text else ["--corpus", "python-docs"])], words[0])
    if not has_text and args.tokenizer == "char" and args.vocab_size is None:
        raise ValueError("tokenizer=char: the text decides how many ids there are; give --train_file or --vocab_size")
    return args


def planned_config(args: Arguments) -> Any:
    """The configuration of the model as `minigpt.build` would make it, without its tokenizer where that is not there.

    Raises ValueError where the model cannot be found or options do not go together.
    """
    dropout = {} if args.dropout is None else dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), args.dropout)
    multiple = args.pad_vocab_size_to_multiple_of or 1
    if args.model_name_or_path is not None:
        try:
            config = MiniGPTConfig.from_pretrained(args.model_name_or_path, **dropout)
        except OSError as error:
            raise ValueError(
                f"model_name_or_path={args.model_name_or_path}: {' '.join(str(error).split())}"
            ) from error
        config.vocab_size = -(-config.vocab_size // multiple) * multiple
    else:
        rows = args.vocab_size or -(-_ids(args) // multiple) * multiple
        no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
        shape = {"max_position_embeddings": args.block_size} | args.shape | {"vocab_size": rows}
        config = MiniGPTConfig(**(no_dropout | dropout | shape))
    if args.block_size > config.max_position_embeddings:
        raise ValueError(
            f"block_size={args.block_size} is longer than the position table; "
            f"try its max_position_embeddings, block_size={config.max_position_embeddings}"
        )
    return config


def _ids(args: Arguments) -> int:
    """How many ids the tokenizer has, or will have once it is trained."""
    if args.data is not None:
        shards = open_shards(args.data[0])
        if args.tokenizer is None and shards.tokenizer_dir is None and shards.vocab_size is None:
            raise ValueError(f"data={args.data[0]} does not say how many ids it has; give --vocab_size or --tokenizer")
        source = args.tokenizer or shards.tokenizer_dir
        return shards.vocab_size or len(load_tokenizer(source or ""))
    if args.tokenizer == "char":
        corpus = open_corpus(args)
        characters: set[str] = set()
        for documents in (corpus.train, corpus.validation):
            for text, _ in documents.pieces():
                characters.update(str(text))
        return len(characters) + 1  # <|endoftext|>
    if args.tokenizer in (None, "bpe"):
        return args.tokenizer_vocab_size
    return len(load_tokenizer(args.tokenizer))


def planned_steps(args: Arguments, devices: int) -> int | None:
    """Steps of the whole run; None where only a text that is not prepared yet knows."""

    if args.max_steps is not None:
        return args.max_steps
    if args.data is None or args.packing_strategy != "wrapped":
        return None
    tokens = [len(open_shards(folder).train) for folder in args.data]
    samples = sum(SampleOrder(number, args.block_size, args.seed, args.stride).samples for number in tokens)
    return steps_of_run(args, samples, devices)
