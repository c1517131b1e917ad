"""Laws of the Docker image: what it copies exists, and the files that reach the builder are enough for the wheel."""

import json
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from minigpt.cli import VERBS
from support.runs import ROOT, finish

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions(keyword: str) -> list[str]:
    """The arguments of every instruction of one kind in the Dockerfile."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.removeprefix(keyword).strip() for line in text.splitlines() if line.startswith(f"{keyword} ")]


def build_context() -> list[str]:
    """The files and folders of the repository that .dockerignore lets through: it excludes all, then names them."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    return [rule.removeprefix("!") for rule in rules if rule.startswith("!")]


def wheel_of(source: Path, folder: Path) -> set[str]:
    """The names of the files in the wheel that is built from `source`."""
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    built = finish([sys.executable, "-m", "pip", *words])
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_everything_that_is_copied_reaches_the_builder() -> None:
    context = build_context()
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert set(context) <= {path.split("/")[0] for path in tracked.splitlines()}
    for words in map(shlex.split, instructions("COPY")):
        if not words[0].startswith("--from="):
            assert set(words[:-1]) <= {*context, "."}


def test_the_image_has_a_python_and_extras_that_the_project_knows() -> None:
    defaults = dict(argument.split("=", 1) for argument in instructions("ARG"))
    version = defaults["PYTHON_IMAGE"].removeprefix("python:").removesuffix("-slim")
    assert version in SpecifierSet(PROJECT["requires-python"])
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    assert set(defaults["EXTRAS"].split(",")) <= PROJECT["optional-dependencies"].keys()
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert "torch" in {Requirement(pin).name for pin in pins if "==" in pin}


def test_the_image_runs_a_verb_and_not_as_root() -> None:
    (entry_point,), (command,) = (map(json.loads, instructions(name)) for name in ("ENTRYPOINT", "CMD"))
    assert entry_point == list(PROJECT["scripts"])
    assert command[0] in VERBS
    assert instructions("USER") == ["minigpt"]


@pytest.mark.slow
def test_the_wheel_needs_nothing_that_is_ignored(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    whole, context = tmp_path / "whole", tmp_path / "context"
    names = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    for name in names:
        for folder in (whole, context) if name.split("/")[0] in build_context() else (whole,):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    assert wheel_of(context, tmp_path / "a") == wheel_of(whole, tmp_path / "b")
