"""Laws of YAML presets: what is read is what was written, or an error that names the line."""

from pathlib import Path

import pytest

from minigpt.config.parser import parse_arguments, read_config
from minigpt.utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpus: python-docs\nseed: 1\nseed: 2\n", "line 2: seed is given twice"),
        ("corpus: python-docs\nseed: 010\n", "line 2: 010 is not a decimal number"),
        ("max_steps: 1:30\n", "line 1: 1:30 is not a decimal number"),
        ("data: &a [x]\ntrain_file: *a\n", "line 2: aliases are not supported"),
        ("corpus: [python-docs\n", "line 2: expected ',' or ']'"),
        ("- corpus\n", "expected a mapping of options to values"),
        ("corpus: {name: python-docs}\n", "corpus is a mapping; options are flat"),
        ("train_file: [[a, b], c]\n", "train_file holds a list; give text, a number, yes or no"),
        ("train_file: [a, null]\n", "train_file holds a NoneType; give text"),
        ("train_file: !!binary aGVsbG8=\n", "train_file holds a bytes; give text"),
        ("run_name: 2020-99-01\n", "not YAML: month must be in 1..12"),
        (f"seed: {'9' * 5000}\n", "not YAML: Exceeds the limit"),
        (f"train_file: {'[' * 5000}{']' * 5000}\n", "not YAML: maximum recursion depth exceeded"),
        (
            "corpus: python-docs\nsample_prompts: ['--use_cpu']\n",
            "the item '--use_cpu' of a list must not start with -",
        ),
    ],
)
def test_a_trap_of_yaml_is_an_error_that_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        parse_arguments([str(preset)])
    assert message in str(error.value)


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match="aliases are not supported"):
        read_config(tmp_path / "bomb.yaml")


def test_values_keep_their_meaning_on_the_way_to_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "preset.yaml").write_text(
        "corpus: python-docs\nseed: 10\nlearning_rate: 6e-4\nmixed_precision: no\nuse_cpu: true\ntf32: false\n"
        "run_name: --name\nsample_prompts: ['', 'a b', 'x=1']\noutput_dir: ~/runs/one\nmodel_name_or_path: null\n",
        encoding="utf-8",
    )
    args = parse_arguments([str(tmp_path / "preset.yaml")])
    assert (args.seed, args.learning_rate, args.mixed_precision, args.use_cpu, args.tf32) == (
        10,
        6e-4,
        "no",
        True,
        False,
    )
    assert (args.run_name, args.sample_prompts) == ("--name", ["", "a b", "x=1"])
    assert args.output_dir == str(tmp_path / "runs" / "one")


def test_the_sample_prompts_of_a_preset_do_not_go_with_another_text(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("corpus: python-docs\nsample_prompts: [Mine]\n", encoding="utf-8")
    given = ["--sample_prompts", "Given"]
    assert len(parse_arguments(["quickstart"]).sample_prompts) == 3
    for source in ("--train_file=a.txt", "--data=a", "--dataset-name=a"):
        assert parse_arguments(["quickstart", source]).sample_prompts is None
        assert parse_arguments(["quickstart", source, *given]).sample_prompts == ["Given"]
        assert parse_arguments(["quickstart", str(own), source]).sample_prompts == ["Mine"]


def test_options_written_by_a_run_are_read_back_unchanged(tmp_path: Path) -> None:
    words = ["--corpus", "python-docs", "--sample_prompts", "", "a: b", "--learning_rate", "1e-3", "--run_name", "010"]
    args = parse_arguments(words)
    (tmp_path / "arguments.yaml").write_text(args.as_yaml(), encoding="utf-8")
    assert parse_arguments([str(tmp_path / "arguments.yaml")]) == args
