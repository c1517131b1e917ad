"""Laws of the command line: one spelling of an option, and the right answer to a name from another tool."""

from dataclasses import fields

import pytest

from minigpt.cli import VERBS, command_module
from minigpt.config.arguments import Arguments
from minigpt.utils.command_line import OTHER_NAMES, CommandParser, unknown_option

TRAINER = [f"--{field.name}" for field in fields(Arguments)]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--batch_size", "--per_device_train_batch_size"),
        ("--lr", "--learning_rate"),
        ("--n_layer=4", "--num_hidden_layers"),
        ("--max-iters", "--max_steps"),
        ("--learning_rat", "--learning_rate"),
        ("--bf16", "--mixed_precision bf16"),
    ],
)
def test_a_name_from_another_tool_is_answered_with_ours(typed: str, meant: str) -> None:
    assert unknown_option(typed, TRAINER).endswith(f"did you mean {meant}?")


def test_every_answer_is_an_option_of_some_command() -> None:
    known = {*TRAINER, "--max_new_tokens", "--prompt", "--num_return_sequences", "--dynamo_backend"}
    for answer in OTHER_NAMES.values():
        assert {word.rstrip(",") for word in answer.split() if word.startswith("--")} <= known


def test_dashes_and_underscores_are_one_spelling() -> None:
    parser = CommandParser("test", None)
    parser.add_argument("--top_k", type=int)
    assert parser.parse_args(["--top-k", "3"]) == parser.parse_args(["--top_k=3"]) == parser.parse_args(["--top-k=3"])


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_each_option_and_each_default_once(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command_module(verb).parse(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split("\noptions:")[-1].split())
    options = [
        word for word in text.split() if word.startswith("--") and word.endswith(tuple("abcdefghijklmnopqrstuvwxyz"))
    ]
    assert not [option for option in options if "-" in option[2:]], "an option is shown in two spellings"
    assert "default: None" not in text
    for entry in text.split(" --"):
        assert entry.count("(default") <= 1, entry
