"""Laws of presets and launch profiles: every one is found by its bare name, described, and read by its program."""

from pathlib import Path

import pytest

from minigpt.config.parser import parse_arguments, read_config
from minigpt.config.presets import find_preset, find_profile, first_comment, presets, profiles
from minigpt.utils.errors import UserError


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_found_by_its_bare_name_and_parses(name: str, tmp_path: Path) -> None:
    words = [name] if {"corpus", "dataset_name"} & read_config(find_preset(name)).keys() else [name, "--data", "d"]
    assert parse_arguments(words) == parse_arguments([str(presets()[name]), *words[1:]])
    assert len(first_comment(presets()[name])) > 20


def test_profiles_are_found_by_name_and_by_path() -> None:
    for name, path in profiles().items():
        assert find_profile(name) == find_profile(path) == path
        assert len(first_comment(path)) > 20


def test_a_file_of_the_user_goes_before_a_preset_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quickstart").write_text("max_steps: 1\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert find_preset("quickstart") == Path("quickstart")
    assert find_preset("configs/quickstart.yaml") == presets()["quickstart"]


def test_an_unknown_preset_names_its_neighbor() -> None:
    with pytest.raises(UserError, match=r"quikstart: no such file or preset; did you mean quickstart\?"):
        find_preset("quikstart")
