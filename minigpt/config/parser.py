"""Parse YAML files and the command line into `Arguments`.

A YAML file is turned into argv and put in front of the command line, so that one parser checks types, choices and
unknown keys, and what is typed last wins.
"""

import argparse
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from transformers.hf_argparser import HfArgumentParser

from minigpt.config.arguments import TEXT_SOURCES, Arguments
from minigpt.config.presets import find_preset, presets
from minigpt.utils.command_line import OneLineParser, unknown_option
from minigpt.utils.errors import UserError

PATHS = {
    "output_dir", "resume_from_checkpoint", "model_name_or_path", "tokenizer", "data", "train_file", "validation_file",
    "dataset_name", "cache_dir", "hellaswag_file",
}  # fmt: skip


SCALARS = (str, int, float, date)  # what YAML makes of a plain word; bool is an int, and datetime a date


class OptionParser(OneLineParser, HfArgumentParser):
    """HfArgumentParser that reports an error in one line and names the option that was probably meant."""

    def __init__(self, dataclass_types: Any, **options: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=_HelpFormatter, **options)
        for action in self._actions:
            names = action.option_strings
            if names and names[0].startswith("--no_"):
                action.help = f"turn --{names[0].removeprefix('--no_')} off"
            elif isinstance(action.default, bool) or getattr(action.type, "__name__", "") == "string_to_bool":
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


class _StrictLoader(yaml.SafeLoader):
    """YAML without its traps: duplicate keys, numbers in base 8 and 60, and aliases are errors."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(
                None, None, "aliases are not supported", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if re.fullmatch(r"[-+]?0[0-9_]+|.*:.*", node.value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value} is not a decimal number; drop the leading zeros and colons", node.start_mark
            )
        return super().construct_yaml_int(node)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def read_config(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file. Keys set to null are dropped, so they keep their default."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also not UTF-8, no such date, nested without end
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of options to values")
    for key, value in values.items():
        if isinstance(value, dict):
            raise UserError(f"{path}: {key} is a mapping; options are flat")
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, SCALARS if isinstance(value, list) else (*SCALARS, type(None))):
                raise UserError(f"{path}: {key} holds a {type(item).__name__}; give text, a number, yes or no")
    return {key: value for key, value in values.items() if value is not None}


def to_argv(values: dict[str, Any]) -> list[str]:
    """Options as command-line words. Raises UserError for an item of a list that would be taken for an option."""
    argv: list[str] = []
    for key, value in values.items():
        words = ["no" if word is False else str(word) for word in (value if isinstance(value, list) else [value])]
        if not isinstance(value, list):
            argv.append(f"--{key}={words[0]}")  # YAML reads no as false
            continue
        for word in words:
            if word.startswith("-"):
                raise UserError(f"{key}: the item {word!r} of a list must not start with -")
        argv += [f"--{key}", *words]
    return argv


def parse_arguments(
    argv: Sequence[str], default_config: str | Path = "quickstart", program: str | None = None
) -> Arguments:
    """Read `[PRESET | CONFIG.yaml ...] [--option value ...]`; with no words at all, `default_config`.

    A source of text on the command line replaces the one in the YAML files, and the sample prompts of a preset that
    ships with MiniGPT, which fit its own text. Raises UserError that names the value, the
    rule and the way out; exits with 2 on an unknown option.
    """
    words = list(argv) or [str(default_config)]
    values: dict[str, Any] = {}
    shipped_prompts = None
    while words and not words[0].startswith("-"):
        preset = find_preset(words.pop(0))
        options = read_config(preset)
        values |= options
        if "sample_prompts" in options:
            is_shipped = any(preset.samefile(path) for path in presets().values())
            shipped_prompts = options["sample_prompts"] if is_shipped else None
    if any(word.split("=")[0].replace("-", "_") == f"__{source}" for word in words for source in TEXT_SOURCES):
        values = {
            key: value
            for key, value in values.items()
            if key not in (*TEXT_SOURCES, "validation_file", "data_weights")
        }
        if shipped_prompts is not None:  # they fit the text of the preset only
            del values["sample_prompts"]
    parser = OptionParser(
        Arguments.GROUPS,
        prog=program,
        usage="%(prog)s [PRESET | CONFIG.yaml ...] [--option value ...]",
        description="Train a GPT. Without any argument: the preset quickstart.",
    )
    options = parser.parse_strictly([*to_argv(values), *words])
    return Arguments(**{name: _without_tilde(value) if name in PATHS else value for name, value in options.items()})


def _without_tilde(value: Any) -> Any:
    """A path, or a list of them, with `~` replaced by the home folder, which the shell does not do in YAML."""
    if isinstance(value, list):
        return [_without_tilde(path) for path in value]
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value
