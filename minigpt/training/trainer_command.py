"""The command line that starts train_accelerate.py, or another program, in a process of its own."""

import importlib.util
import sys
from collections.abc import Sequence

from minigpt.config.presets import find_profile


def trainer_script() -> str:
    """The path of train_accelerate.py, in a checkout or an installation."""
    spec = importlib.util.find_spec("train_accelerate")
    assert spec is not None
    assert spec.origin is not None
    return spec.origin


def trainer_command(
    options: Sequence[str], profile: str | None = None, launcher_options: Sequence[str] = ()
) -> list[str]:
    """The words that train with `options`, as `launched` does."""
    return launched([trainer_script(), *options], profile, launcher_options)


def launched(program: Sequence[str], profile: str | None = None, launcher_options: Sequence[str] = ()) -> list[str]:
    """The words that run a program of Python: in one process, or through `accelerate launch` with a launch profile.

    program: a script, or -m and a module, and its arguments. `launcher_options` are options of `accelerate launch`.
    Raises UserError if there is no such profile.
    """
    launcher: list[str] = []
    if profile is not None:
        launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(find_profile(profile))]
    return [sys.executable, *launcher, *launcher_options, *program]
