"""Parsers with one-line errors, and the options and checks that several commands share."""

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from minigpt.utils.errors import UserError, exit_in_one_line
from minigpt.utils.files import write_atomically
from minigpt.utils.run_files import EVALUATIONS_DIR

# Names of options in nanoGPT, transformers, TRL and litgpt, and MiniGPT's options for the same.
OTHER_NAMES = {
    "batch_size": "--per_device_train_batch_size",
    "micro_batch_size": "--per_device_train_batch_size",
    "train_batch_size": "--per_device_train_batch_size",
    "eval_batch_size": "--per_device_eval_batch_size",
    "lr": "--learning_rate",
    "min_lr": "--min_learning_rate",
    "max_iters": "--max_steps",
    "lr_decay_iters": "--max_steps",
    "steps": "--max_steps",
    "epochs": "--num_train_epochs",
    "warmup_iters": "--warmup_steps",
    "warmup_ratio": "--warmup_steps",
    "eval_interval": "--eval_steps",
    "log_interval": "--logging_steps",
    "save_interval": "--save_steps",
    "n_layer": "--num_hidden_layers",
    "n_head": "--num_attention_heads",
    "n_embd": "--hidden_size",
    "depth": "--num_hidden_layers",
    "seq_len": "--block_size",
    "max_length": "--block_size",
    "max_seq_length": "--block_size",
    "context_length": "--block_size",
    "out_dir": "--output_dir",
    "out": "--output_dir",
    "dataset": "--dataset_name or --train_file",
    "init_from": "--model_name_or_path or --resume_from_checkpoint",
    "resume": "--resume_from_checkpoint latest",
    "beta1": "--adam_beta1",
    "beta2": "--adam_beta2",
    "grad_clip": "--max_grad_norm",
    "optim": "--optimizer",
    "bf16": "--mixed_precision bf16",
    "fp16": "--mixed_precision fp16",
    "dtype": "--mixed_precision",
    "device": "--use_cpu",
    "compile": "--torch_compile",
    "wandb": "--report_to wandb",
    "wandb_log": "--report_to wandb",
    "wandb_project": "--run_name",
    "max_tokens": "--max_new_tokens",
    "num_samples": "--num_return_sequences",
    "start": "--prompt",
    "validation_split": "--validation_split_percentage",
    "vocab": "--vocab_size",
}

MAY_BE_EMPTY = ("prompt", "sample_prompts")  # the start of a new text

MAX_FLOAT32 = 3.4e38

DTYPES = ("float32", "bfloat16", "float16")


def option_names(words: Sequence[str]) -> set[str]:
    """The options that words of the command line give, without dashes."""
    names = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    return {name.removeprefix("no_") for name in names}


def lacks_preset(words: Sequence[str]) -> bool:
    """Whether words of the command line name a time and a text, but no preset and no model to start from."""
    names = option_names(words)
    has_preset = bool(words) and not words[0].startswith("-")
    return not has_preset and "train_minutes" in names and "model_name_or_path" not in names


def unknown_option(word: str, known: Iterable[str]) -> str:
    """The error for an unknown option. It suggests the option that was probably meant, one of `known`."""
    if not word.startswith("--"):
        return f"{word}: expected an option that starts with --"
    option = word.split("=")[0]
    name, known = option[2:].replace("-", "_"), list(known)
    suggestion = OTHER_NAMES.get(name)
    if suggestion is None or not any(part in known for part in suggestion.split() if part.startswith("--")):
        nearest = difflib.get_close_matches(f"--{name}", known, n=1)
        suggestion = nearest[0] if nearest else None
    return f"unknown option {option}" + (f"; did you mean {suggestion}?" if suggestion else "; see --help")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, and refuses what no option can mean.

    That is: an empty word (except for a prompt), a number that is not finite in float32 or has more than 64 bits, and
    a text with a NUL or with bytes that are not UTF-8.
    """

    _words: Sequence[str] = ()

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        self._words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._spelled(word) for word in self._words], namespace)

    def _spelled(self, word: str) -> str:
        """`word` as argparse knows it."""
        return word

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        value = super()._get_value(action, arg_string)
        if problem := _impossible(value, arg_string, may_be_empty=action.dest in MAY_BE_EMPTY):
            raise argparse.ArgumentError(action, problem)
        return value

    def error(self, message: str) -> NoReturn:
        exit_in_one_line(Path(self.prog).name, name_once(message, self._words))


def name_once(message: str, words: Iterable[str]) -> str:
    """argparse's message, which lists every name of an option, with the one name that is among the user's `words`."""
    match = re.fullmatch(r"argument (?P<names>\S+): (?P<problem>.*)", message, re.DOTALL)
    if match is None:
        return message
    names = match["names"].split("/")
    spellings = {name.replace("_", "-"): name for name in names}
    written = [word for word in (word.split("=")[0] for word in words) if word.replace("_", "-") in spellings]
    return f"{written[-1] if written else names[0]}: {match['problem']}"


def _impossible(value: object, word: str, may_be_empty: bool) -> str | None:
    """Why no option can have this value, which argparse has read from `word`; None if one can."""
    if not word and not may_be_empty:
        return "the value is empty"
    if "\0" in word:
        return f"{word!r} has a NUL character"
    if not word.isascii() and any("\ud800" <= letter <= "\udfff" for letter in word):
        return f"{word!r} is not UTF-8; give another name"
    if isinstance(value, float) and not abs(value) <= MAX_FLOAT32:
        return f"{word} is not a finite number of float32"
    if isinstance(value, int) and value.bit_length() > 63:
        return f"{word} has more than 64 bits"
    return None


class CommandParser(OneLineParser):
    """The parser of one command, described by its module's docstring.

    `--top-k` and `--top_k` are the same option. The error for an unknown option suggests the nearest one.
    """

    def __init__(
        self, program: str, description: str | None, usage: str | None = None, epilog: str | None = None
    ) -> None:
        super().__init__(
            program,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(unknown_option(unknown[0], self._option_string_actions))
        return parsed

    def _spelled(self, word: str) -> str:
        name, equals, value = word.partition("=")
        underscored = "--" + name[2:].replace("-", "_")
        known = self._option_string_actions
        is_other_spelling = name.startswith("--") and name not in known and underscored in known
        return underscored + equals + value if is_other_spelling else word


def add_model_options(
    parser: argparse.ArgumentParser, *, dtypes: Sequence[str] = DTYPES, several_models: bool = False
) -> None:
    """`--model`, `--dtype` (its default is the first of `dtypes`) and `--trust_remote_code`."""
    source = "run folder, checkpoint, model folder or Hub name"
    if several_models:
        parser.add_argument("--model", nargs="+", required=True, help=f"{source}, one or several")
    else:
        parser.add_argument("--model", required=True, help=source)
    as_saved = "; auto: as saved" if "auto" in dtypes else ""
    parser.add_argument(
        "--dtype", choices=dtypes, default=dtypes[0], help=f"dtype of the weights{as_saved} (default: %(default)s)"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code of a foreign model; not needed for MiniGPT"
    )


def add_sampling_options(
    parser: argparse.ArgumentParser, *, max_new_tokens: int, temperature: float, top_p: float | None
) -> None:
    """`--device` and how the next token is chosen, with these defaults."""
    add = parser.add_argument
    add("--device", metavar="D", help="cpu, cuda, mps ... (default: the accelerator of this machine, else the CPU)")
    add(
        "--max_new_tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help="most tokens to generate (default: %(default)s)",
    )
    add(
        "--temperature",
        type=float,
        default=temperature,
        metavar="X",
        help="divides the logits; 0 always takes the most likely token (default: %(default)s)",
    )
    add("--top_k", type=int, metavar="K", help="choose among the K most likely tokens (default: among all)")
    add(
        "--top_p",
        type=float,
        default=top_p,
        metavar="P",
        help="choose among the most likely tokens that together have the probability P "
        f"(default: {'among all' if top_p is None else top_p})",
    )


def check_output_file(args: argparse.Namespace, *names: str, suffixes: Sequence[str] = ("",)) -> None:
    """Raises UserError if a file cannot be written where one of the named options says; for use before long work.

    The `suffixes` are added to the value of the option.
    """
    for name in names:
        value = getattr(args, name)
        if value is None:
            continue
        path = Path(value)
        folder = path.absolute().parent
        if folder.name == EVALUATIONS_DIR and folder.parent.is_dir() and not os.path.lexists(folder):
            folder = folder.parent  # of a run, in which `write_result` makes the first
        if not folder.is_dir():
            raise UserError(f"{name}={value}: its folder does not exist; create it first")
        for file in (Path(f"{value}{suffix}") for suffix in suffixes):
            if os.path.lexists(file) and not file.is_file():
                raise UserError(f"{name}={value}: {file} exists and is not a file; give another name")
        if not os.access(folder, os.W_OK):
            raise UserError(f"{name}={value}: its folder cannot be written to")


def write_result(output: str, record: Mapping[str, Any]) -> None:
    """Write the results of an evaluation where `--output` says, as JSON."""
    Path(output).parent.mkdir(exist_ok=True)
    write_atomically(Path(output), json.dumps(record, indent=2) + "\n")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError if one of the named options is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
