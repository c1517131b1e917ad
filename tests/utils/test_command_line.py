"""Laws of the command line: both spellings of an option are accepted, and unknown options get a suggestion."""

from dataclasses import fields

import pytest

from minigpt.config.arguments import Arguments
from minigpt.utils.command_line import OTHER_NAMES, CommandParser, unknown_option

TRAINER = [f"--{field.name}" for field in fields(Arguments)]


@pytest.mark.parametrize(
    ("typed", "suggestion"),
    [
        ("--batch_size", "--per_device_train_batch_size"),
        ("--lr", "--learning_rate"),
        ("--n_layer=4", "--num_hidden_layers"),
        ("--max-iters", "--max_steps"),
        ("--learning_rat", "--learning_rate"),
        ("--bf16", "--mixed_precision bf16"),
    ],
)
def test_an_option_of_another_tool_gets_the_suggestion_of_minigpts(typed: str, suggestion: str) -> None:
    assert unknown_option(typed, TRAINER).endswith(f"did you mean {suggestion}?")


def test_every_suggestion_is_an_option_of_some_command() -> None:
    known = {*TRAINER, "--max_new_tokens", "--prompt", "--num_return_sequences"}
    for suggestion in OTHER_NAMES.values():
        assert {word.rstrip(",") for word in suggestion.split() if word.startswith("--")} <= known


def test_dashes_and_underscores_are_the_same() -> None:
    parser = CommandParser("test", None)
    parser.add_argument("--top_k", type=int)
    assert parser.parse_args(["--top-k", "3"]) == parser.parse_args(["--top_k=3"]) == parser.parse_args(["--top-k=3"])
