"""Choose the options of `minigpt train --train_minutes N` without a preset, and keep them as a preset."""

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from minigpt.config.arguments import Arguments
from minigpt.config.parser import parse_arguments
from minigpt.planning.time_budget import TimedRun, choose_run
from minigpt.training.run_dir import OutputDir
from minigpt.utils.command_line import option_names
from minigpt.utils.errors import UserError
from minigpt.utils.files import read_text, write_atomically
from minigpt.utils.run_files import ARGUMENTS_FILE

HEADER = "# Chosen by `minigpt train --train_minutes`:"
STARTING_OPTIONS = ("overwrite_output_dir", "resume_from_checkpoint")  # of one command, not of the preset


def choose(words: Sequence[str], program: str, processes: int = 1) -> TimedRun:
    """Choose the options of the run that words of the command line describe; report what is measured on stderr."""
    args = parse_arguments(words, program=program)
    return choose_run(
        args, option_names(words), processes, report=lambda line: print(line, file=sys.stderr, flush=True)
    )


def with_chosen_preset(words: Sequence[str], program: str, processes: int = 1) -> list[str]:
    """The words of a command line without a preset, with one: the options of the run to resume, or chosen ones.

    Chosen options are written next to the folder of the run, all given ones among them. Raises UserError if a file is
    there that this function has not written, and for what the trainer would refuse.
    """
    args = parse_arguments(words, program=program)
    OutputDir(args).check()
    if args.resume_from_checkpoint is not None:
        recorded = args.run_dir / ARGUMENTS_FILE
        if not recorded.is_file():
            raise UserError(f"resume_from_checkpoint: output_dir={args.run_dir} holds no run; give its preset")
        return [str(recorded), *words]
    path = preset_path(args)
    if path.exists() and not read_text(path).startswith(HEADER):
        raise UserError(
            f"{path} would be replaced by the options that are chosen; move it, or give another output_dir"
        )
    run = choose(words, program, processes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, as_yaml(run))
    print("\n".join(f"  {line}" for line in [*run.lines(), f"options    {path}"]), flush=True)
    return [str(path), *(["--overwrite_output_dir"] if args.overwrite_output_dir else [])]


def preset_path(args: Arguments) -> Path:
    """Next to the folder of the run, which may be deleted."""
    return args.run_dir.with_name(f"{args.run_dir.name}.yaml")


def as_yaml(run: TimedRun) -> str:
    """The options as a preset, after comments that say why they were chosen."""
    options = yaml.safe_load(run.args.as_yaml())
    options = {name: value for name, value in options.items() if name not in STARTING_OPTIONS}
    comments = "".join(f"#   {line}\n" for line in run.lines())
    return f"{HEADER}\n{comments}{yaml.safe_dump(options, sort_keys=False, allow_unicode=True)}"
