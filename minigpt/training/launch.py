"""Start train_accelerate.py through accelerate's launcher, and keep its exit code.

If the trainer's exit code is not 0, `accelerate launch` prints its own traceback and exits with 1. Here the last line
is the trainer's, its exit code is kept (2: bad input, 75: stopped, 76: diverged), and Ctrl-C or a termination signal
reaches the trainer, which then saves a checkpoint.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import psutil
import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from minigpt.config.arguments import Arguments
from minigpt.config.presets import find_profile
from minigpt.training.trainer_command import trainer_script
from minigpt.utils.command_line import name_once
from minigpt.utils.errors import UserError

FORWARDED_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


def default_profile(trainer_words: Sequence[str]) -> str:
    """The launch profile of this machine: its GPUs if there are any, else the CPU."""
    if "--use_cpu" in trainer_words or not torch.accelerator.is_available():
        return "cpu"
    return "multi_gpu" if torch.accelerator.device_count() > 1 else "single_gpu"


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the options of `accelerate launch` from the trainer's. An option that both have is the trainer's."""
    launcher_options = launch_command_parser()._option_string_actions
    trainer_options = Arguments.__dataclass_fields__
    launcher_words: list[str] = []
    trainer_words: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        action = launcher_options.get(name)
        if action is None or not name.startswith("--") or name[2:].replace("-", "_") in trainer_options:
            trainer_words.append(word)
            continue
        launcher_words.append(word)
        takes_value = action.nargs != 0 and not equals
        if takes_value and rest:
            launcher_words.append(rest.pop(0))
    return launcher_words, trainer_words


def launch(profile: str, launcher_words: Sequence[str], trainer_words: Sequence[str]) -> int:
    """Train, and return the trainer's exit code. Raises UserError for an unknown profile or bad launcher options."""
    config_file = str(find_profile(profile))
    words = [f"--config_file={config_file}", *_device_count(config_file, launcher_words), *launcher_words]
    parser = launch_command_parser()
    parser.error = _raise_user_error
    args = parser.parse_args([*words, trainer_script(), *trainer_words])
    # the launcher repeats what the trainer has already reported, and announces its defaults
    for name in ("torch.distributed.elastic", "torch.distributed.run", "accelerate.commands.launch"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    args.signals_to_handle = "SIGHUP,SIGQUIT"  # on these torchrun ends the trainers; the others are forwarded to them
    os.environ["MINIGPT_PROGRAM"] = "minigpt train"
    for name in FORWARDED_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _forward)
    try:
        launch_command(args)
    except subprocess.CalledProcessError as error:
        return _exit_code(error.returncode)
    except ChildFailedError as error:
        return _exit_code(error.get_first_failure()[1].exitcode)
    except ValueError as error:  # accelerate's checks of its options
        raise UserError(str(error)) from error
    return 0


def process_count(profile: str, launcher_words: Sequence[str]) -> int:
    """The number of processes that `launch` would start."""
    config_file = find_profile(profile)
    words = [*_device_count(str(config_file), launcher_words), *launcher_words]
    parser = launch_command_parser()
    parser.error = _raise_user_error
    given = parser.parse_args([*words, trainer_script()]).num_processes
    return given or yaml.safe_load(config_file.read_text(encoding="utf-8")).get("num_processes") or 1


def _device_count(config_file: str, launcher_words: Sequence[str]) -> list[str]:
    """One process per GPU of this machine, if the profile is for the GPUs of one machine and no number is given."""
    given = any(word.split("=")[0].replace("-", "_") == "__num_processes" for word in launcher_words)
    if given or not config_file.endswith(("multi_gpu.yaml", "fsdp2.yaml")) or not torch.accelerator.is_available():
        return []
    return ["--num_processes", str(torch.accelerator.device_count())]


def _forward(number: int, frame: Any) -> None:
    """Send a signal to the trainers. The terminal also sends them Ctrl-C; two at once count as one."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _raise_user_error(message: str) -> NoReturn:
    raise UserError(name_once(message, sys.argv))


def _exit_code(code: int) -> int:
    """The exit code as a shell reports it: 128 plus the number of the signal that ended the process."""
    return 128 - code if code < 0 else code
