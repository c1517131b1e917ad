"""Parse YAML files and the command line into `Arguments`.

A YAML file is turned into argv and put in front of the real command line, so types, choices and unknown keys
are checked by one parser, and what is typed last wins.
"""

import difflib
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers.hf_argparser import HfArgumentParser

from minigpt.config.arguments import TEXT_SOURCES, Arguments
from minigpt.utils.errors import OneLineParser, UserError


class OptionParser(HfArgumentParser):
    """HfArgumentParser that says what is wrong in one line and names the nearest option."""

    error = OneLineParser.error

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=ArgumentDefaultsHelpFormatter, **kwargs)

    def parse_strictly(self, argv: Sequence[str]) -> dict[str, Any]:
        """Option values by name; an unknown option ends the program and names its nearest neighbour."""
        namespace, unknown = self.parse_known_args(list(argv))
        if unknown:
            self.error(_unknown_option(unknown[0], [text for text in self._option_string_actions if "_" in text]))
        return vars(namespace)


def _unknown_option(name: str, known: list[str]) -> str:
    if not name.startswith("--"):
        return f"{name}: expected an option that starts with --"
    name = name.split("=")[0]
    nearest = difflib.get_close_matches(name.replace("-", "_").replace("__", "--", 1), known, n=1)
    return f"unknown option {name}" + (f"; did you mean {nearest[0]}?" if nearest else "; see --help")


def read_config(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file. Keys set to null are left out: they keep their default."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of options to values")
    for key, value in values.items():
        if isinstance(value, dict):
            raise UserError(f"{path}: {key} is a mapping; options are flat")
    return {key: value for key, value in values.items() if value is not None}


def to_argv(values: dict[str, Any]) -> list[str]:
    """Options as command-line words."""
    argv: list[str] = []
    for key, value in values.items():
        words = value if isinstance(value, list) else [value]
        argv += [f"--{key}", *("no" if word is False else str(word) for word in words)]  # YAML reads no as false
    return argv


def parse_arguments(argv: Sequence[str], default_config: str | Path) -> Arguments:
    """Read `[CONFIG.yaml ...] [--option value ...]`; with no words at all, `default_config`.

    A source of text on the command line takes the place of the one in the YAML files.
    Raises UserError that names the value, the rule and the way out; exits with 2 on an unknown option.
    """
    words = list(argv) or [str(default_config)]
    values: dict[str, Any] = {}
    while words and not words[0].startswith("-"):
        values |= read_config(words.pop(0))
    if any(word.split("=")[0].replace("-", "_") == f"__{source}" for word in words for source in TEXT_SOURCES):
        values = {
            key: value
            for key, value in values.items()
            if key not in (*TEXT_SOURCES, "validation_file", "data_weights")
        }
    parser = OptionParser(Arguments.GROUPS, usage="%(prog)s [CONFIG.yaml ...] [--option value ...]")
    return Arguments(**parser.parse_strictly([*to_argv(values), *words]))
