"""Laws of the options: YAML files and the command line mean the same, and impossible values are refused by name."""

from pathlib import Path

import pytest

from minigpt.config.arguments import Arguments
from minigpt.config.parser import parse_arguments, read_config
from support.runs import ROOT

TEXT = ["--corpus", "python-docs"]


def parse(*words: str) -> Arguments:
    return parse_arguments(words, ROOT / "configs" / "quickstart.yaml")


def test_yaml_and_the_command_line_give_the_same_options(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text(
        "corpus: python-docs\nlearning_rate: 6e-4\nmax_steps: 10\ntf32: false\nstride: null\nmixed_precision: no\n"
    )
    same = parse(*TEXT, "--learning_rate=6e-4", "--max_steps=10", "--tf32=false", "--mixed_precision=no")
    assert parse(str(config)) == same
    assert parse(str(config), "--max_steps", "20").max_steps == 20
    assert same.learning_rate == 6e-4


def test_options_survive_a_round_trip_through_yaml(tmp_path: Path) -> None:
    args = parse(*TEXT, "--sample_prompts", "\n", "a: b", "--dropout", "0.1", "--report_to", "none", "--seed", "7")
    path = tmp_path / "arguments.yaml"
    path.write_text(args.as_yaml(), encoding="utf-8")
    assert parse(str(path)) == args


def test_without_arguments_the_preset_is_quickstart() -> None:
    assert parse() == parse(str(ROOT / "configs" / "quickstart.yaml"))


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_accepted_and_starts_in_a_folder_of_its_own(config: Path) -> None:
    text = [] if any(key in read_config(config) for key in ("corpus", "dataset_name")) else TEXT
    assert parse(str(config), *text).output_dir == f"runs/{config.stem}"


def test_text_on_the_command_line_replaces_that_of_the_preset() -> None:
    args = parse(str(ROOT / "configs" / "quickstart.yaml"), "--train-file", "mine.txt")
    assert (args.corpus, args.train_file) == (None, ["mine.txt"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rte", "1"], "unknown option --learning_rte; did you mean --learning_rate?"),
        (["--learning-rte=1"], "did you mean --learning_rate?"),
        (["--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
        (["--lr_scheduler_type", "cosin"], "invalid choice: 'cosin'"),
        (["--max_steps", "1.5"], "invalid int value: '1.5'"),
        (["--learning-rate", "nan"], "--learning-rate: nan is not a finite number"),
        (["--max_steps", "9" * 30], "has more than 64 bits"),
        (["--run_name="], "--run_name: the value is empty"),
        (["--tf32", "maybe"], "tf32"),
    ],
)
def test_errors_of_the_parser_are_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*TEXT, *words)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--block_size", "-4"], "block_size=-4 must be a number of at least 1"),
        (["--dropout", "1"], "dropout=1.0 must be at least 0 and below 1"),
        (["--stride", "8", "--packing_strategy", "bfd"], "stride=8 requires packing_strategy=wrapped, not bfd"),
        (["--completion_only_loss", "true", "--data", "shards"], "completion_only_loss has no effect on data=shards"),
        (["--vocab_size", "64", "--pad_vocab_size_to_multiple_of", "64"], "vocab_size=64 is already given"),
        (["--stride", "2048"], "stride=2048 is greater than block_size=1024 and would skip tokens"),
        (["--min_learning_rate", "1"], "min_learning_rate=1.0 is above learning_rate"),
        (["--data", "d"], "data and corpus are given"),
        (["--model_name_or_path", "gpt2", "--hidden_size", "8"], "hidden_size=8: the shape is fixed by"),
        (["--report_to", "mlflow"], "report_to=mlflow is none of"),
        (["--block_size", "0", "--seed", "-1"], "block_size=0 .*; seed=-1"),
        (["--resume_from_checkpoint", "latest", "--overwrite_output_dir"], "overwrite_output_dir would delete"),
        (["--num_train_epochs", "0"], "num_train_epochs=0.0 must be greater than 0"),
        (["--validation_split_percentage", "100"], "between 0 and 100"),
    ],
)
def test_impossible_values_are_named_with_the_rule(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*TEXT, *words)


def test_a_config_that_is_no_mapping_of_options_is_refused(tmp_path: Path) -> None:
    for text, message in [
        ("- a", "expected a mapping"),
        ("a: {b: 1}", "a is a mapping"),
        ("a: [", "line 1: expected"),
    ]:
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse(str(path))
    with pytest.raises(ValueError, match="no text to train on: give one of --data, --train_file"):
        parse("--max_steps", "5")
