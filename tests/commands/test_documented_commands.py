"""Every command in README.md, CONTRIBUTING.md, examples/ and docs/ is one that its program understands."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

import hub_upload
from minigpt.cli import VERBS, command_module
from minigpt.config.parser import parse_arguments
from minigpt.config.presets import presets, profiles
from support.runs import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = ("minigpt", "accelerate", "hub_upload.py", "train_accelerate.py", "make")


def commands_in(page: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, words) of each command of ours in the shell blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        first_line = text.count("\n", 0, block.start(1)) + 1
        lines = block.group(1).replace("\\\n", "  ")
        for name, value in re.findall(r"^(\w+)=\"([^\"]*)\"$", lines, re.MULTILINE):
            lines = lines.replace(f"${name}", value)
        for line in lines.splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and (words[0] in ("python", ".venv/bin/python") or re.fullmatch(r"\w+=\S*", words[0])):
                words = words[1:]
            for separator in ("&&", "|", ";", ">"):
                words = words[: words.index(separator)] if separator in words else words
            if words and Path(words[0]).name in PROGRAMS:
                yield first_line, [Path(words[0]).name, *words[1:]]


COMMANDS = [
    pytest.param(words, id=f"{page.name}:{line}:{' '.join(words)[:60]}")
    for page in PAGES
    if page.is_file()
    for line, words in commands_in(page)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_documented_command_parses(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("configs", "accelerate_configs", "train_accelerate.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    prepare = Path("DIR", "data", "shakespeare_char", "prepare.py")  # DIR is a checkout of nanoGPT
    (tmp_path / prepare).parent.mkdir(parents=True)
    for placeholder in (prepare, "DIR/train.py", "DIR/model.py", "tinyshakespeare.txt"):
        (tmp_path / placeholder).touch()
    for folder in ("runs/mine", "my_tasks"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    words = [word for word in words if word not in ("...", "…", "[...]")]
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif program == "hub_upload.py":
        hub_upload.parse(rest)
    elif program == "accelerate":
        check_launch(rest[1:])
    elif program == "train_accelerate.py":
        check_training(rest)
    else:
        check_verb(rest)


def check_launch(words: list[str]) -> None:
    numbers = {"R": "0", "N": "2"}
    args = launch_command_parser().parse_args([numbers.get(word, word) for word in words])
    if args.config_file is not None:
        assert (ROOT / args.config_file).is_file()
    if args.training_script == "minigpt":  # accelerate launch -m minigpt eval ...
        check_verb(args.training_script_args)
    else:
        assert args.training_script == "train_accelerate.py"
        check_training(args.training_script_args)


def check_training(words: list[str]) -> None:
    """Placeholders such as X.yaml stand for a preset; without a source of text, any will do."""
    words = [
        "quickstart" if re.fullmatch(r"(?:configs/)?[A-Z]+\.yaml|CONFIG|PRESET", word) else word for word in words
    ]
    if "--help" in words:
        return
    named = [word for word in words if word.startswith("--")]
    text = {"--train_file", "--data", "--dataset_name", "--corpus"} & set(named)
    first = words[0] if words else "--"
    needs_text = first.startswith("--") or Path(first).stem in presets_without_text()
    parse_arguments([*words, *(["--data", "d"] if needs_text and not text else [])])


def check_verb(words: list[str]) -> None:
    if not words or words[0].startswith("-"):
        assert words in ([], ["--help"], ["--version"])
        return
    verb = next(" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in VERBS)
    rest = words[len(verb.split()) :]
    if "--help" in rest:
        return
    if verb == "train":
        args = command_module(verb).parse(rest)
        assert args.profile is None or args.profile in profiles() or Path(args.profile).suffix == ".yaml"
        from minigpt.training.launch import split_words

        if not args.list:
            check_training(split_words(args.words)[1])
        return
    command_module(verb).parse(rest)


def presets_without_text() -> list[str]:
    return [name for name, path in presets().items() if "Give --train_file" in path.read_text(encoding="utf-8")]
