"""Parse YAML files and the command line into `Arguments`.

A YAML file is turned into argv and put in front of the command line, so that one parser checks types, choices and
unknown keys, and what is typed last wins.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers.hf_argparser import HfArgumentParser

from minigpt.config.arguments import TEXT_SOURCES, Arguments
from minigpt.config.presets import find_preset
from minigpt.utils.command_line import OneLineParser, unknown_option
from minigpt.utils.errors import UserError


class OptionParser(OneLineParser, HfArgumentParser):
    """HfArgumentParser that reports an error in one line and names the option that was probably meant."""

    def __init__(self, dataclass_types: Any, **options: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=_HelpFormatter, **options)
        for action in self._actions:
            names = action.option_strings
            if names and names[0].startswith("--no_"):
                action.help = f"turn --{names[0].removeprefix('--no_')} off"
            elif isinstance(action.default, bool):
                action.metavar = "BOOL"

    def parse_strictly(self, argv: Sequence[str]) -> dict[str, Any]:
        """Option values by name. An unknown option exits with 2 and names its nearest neighbor."""
        namespace, unknown = self.parse_known_args(list(argv))
        if unknown:
            self.error(unknown_option(unknown[0], self._option_string_actions))
        return vars(namespace)


class _HelpFormatter(argparse.HelpFormatter):
    """Shows each option once, with underscores, and its default once."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=119)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        underscored = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if action.nargs == 0:
            return ", ".join(underscored)
        return f"{', '.join(underscored)} {self._format_args(action, action.dest.upper())}"

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        if action.metavar is None and action.choices is None:
            kind = getattr(action.type, "__name__", "")
            action.metavar = {"int": "N", "float": "X"}.get(kind, "TEXT")
        return super()._metavar_formatter(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.default not in (None, argparse.SUPPRESS, [], [""]) and action.nargs != 0
        return f"{text} (default: %(default)s)" if shown and "default" not in text else text


def read_config(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file. Keys set to null are dropped, so they keep their default."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
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


def parse_arguments(
    argv: Sequence[str], default_config: str | Path = "quickstart", program: str | None = None
) -> Arguments:
    """Read `[PRESET | CONFIG.yaml ...] [--option value ...]`; with no words at all, `default_config`.

    A source of text on the command line replaces the one in the YAML files. Raises UserError that names the value, the
    rule and the way out; exits with 2 on an unknown option.
    """
    words = list(argv) or [str(default_config)]
    values: dict[str, Any] = {}
    while words and not words[0].startswith("-"):
        values |= read_config(find_preset(words.pop(0)))
    if any(word.split("=")[0].replace("-", "_") == f"__{source}" for word in words for source in TEXT_SOURCES):
        values = {
            key: value
            for key, value in values.items()
            if key not in (*TEXT_SOURCES, "validation_file", "data_weights")
        }
    parser = OptionParser(
        Arguments.GROUPS,
        prog=program,
        usage="%(prog)s [PRESET | CONFIG.yaml ...] [--option value ...]",
        description="Train a GPT. Without any argument: the preset quickstart.",
    )
    return Arguments(**parser.parse_strictly([*to_argv(values), *words]))
