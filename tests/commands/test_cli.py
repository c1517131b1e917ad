"""Laws of the `minigpt` command: every verb has help, and a wrong verb is one line."""

import re
import subprocess
import sys

import pytest

from minigpt.cli import VERBS, main


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_each_option_and_each_default_once(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split("\noptions:")[-1].split())
    options = re.findall(r"(?<!\S)--[\w-]*[a-z](?!\S)", text)
    assert options
    assert not [option for option in options if "-" in option[2:]], "an option is shown in two spellings"
    assert "default: None" not in text
    for entry in text.split(" --"):
        assert entry.count("(default") <= 1, entry


def test_an_unknown_verb_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("minigpt: unknown verb trian; did you mean train?")


def test_the_first_word_of_a_group_of_verbs_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, code in ((["bench"], 2), (["bench", "--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == code
        listed = [line.strip().split("  ")[0] for line in capsys.readouterr().out.splitlines()[2:]]
        assert listed == [verb for verb in VERBS if verb.startswith("bench ")]
    with pytest.raises(SystemExit):
        main(["bench", "losses"])
    assert capsys.readouterr().err.startswith("minigpt: unknown verb bench losses; did you mean bench loss?")


def test_help_imports_no_heavy_library() -> None:
    program = (
        "import sys; from minigpt.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
