"""Find presets (`configs/`) and launch profiles (`accelerate_configs/`), in a checkout and in an installed package."""

import difflib
from pathlib import Path

from minigpt.utils.errors import UserError

_PACKAGE = Path(__file__).parents[1]


def find_preset(name_or_path: str | Path) -> Path:
    """The YAML file of a preset: a path, or the bare name of one that ships with MiniGPT, such as `quickstart`."""
    return _find(name_or_path, presets(), "preset", "`minigpt train --list` shows them")


def find_profile(name_or_path: str | Path) -> Path:
    """The YAML file of a launch profile: a path, or the bare name of one that ships with MiniGPT, such as `cpu`."""
    return _find(name_or_path, profiles(), "launch profile", "`minigpt train --list` shows them")


def presets() -> dict[str, Path]:
    """Name and file of every preset that ships with MiniGPT."""
    return _yaml_files("configs", "presets")


def profiles() -> dict[str, Path]:
    """Name and file of every launch profile that ships with MiniGPT."""
    return _yaml_files("accelerate_configs", "launch_profiles")


def first_comment(path: Path) -> str:
    """What a preset or profile is for: its first comment line."""
    line = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return line.removeprefix("#").strip() if line.startswith("#") else ""


def _yaml_files(folder: str, installed: str) -> dict[str, Path]:
    """The files of a top-level folder of the checkout, which a wheel carries inside the package as `installed`."""
    for place in (_PACKAGE / installed, _PACKAGE.parent / folder):
        if place.is_dir():
            return {path.stem: path for path in sorted(place.glob("*.yaml"))}
    raise FileNotFoundError(f"{_PACKAGE}: this installation of MiniGPT has no {folder}")


def _find(name_or_path: str | Path, shipped: dict[str, Path], kind: str, hint: str) -> Path:
    path = Path(name_or_path)
    if not str(name_or_path):
        raise UserError(f"the name of a {kind} is empty; {hint}")
    if path.is_file():
        return path
    name = path.name.removesuffix(".yaml")
    if path.parent in (Path(), Path("configs"), Path("accelerate_configs")):
        if name in shipped:
            return shipped[name]
        if nearest := difflib.get_close_matches(name, shipped, n=1):
            raise UserError(f"{name_or_path}: no such file or {kind}; did you mean {nearest[0]}? {hint}")
    raise UserError(f"{name_or_path}: no such file or {kind}; {hint}")
