"""Train a model through accelerate's launcher, with the launch profile that fits this machine.

    minigpt train quickstart --max_steps 100
    minigpt train my_config.yaml --output_dir runs/mine
    minigpt train pretrain_gpt2 --profile multi_gpu --num_processes 8
    minigpt train --train_file my.txt --train_minutes 10             chooses all other options for this time
    minigpt train --list                                             presets and launch profiles

Options override the preset. `minigpt train` alone trains the preset quickstart. With --train_minutes but without a
preset, model, tokenizer, batch and learning rates are chosen for the text, the time and this machine, and written as a
preset next to --output_dir. With other options but without a preset, the defaults below apply. Options of `accelerate
launch`, such as --num_processes, are passed on to it.
"""

import argparse
import sys
from collections.abc import Sequence

from minigpt.utils.command_line import CommandParser, lacks_preset


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `words` are the presets, options of the trainer and options of the launcher."""
    parser = CommandParser(
        "minigpt train",
        __doc__,
        usage="%(prog)s [PRESET | CONFIG.yaml ...] [--profile NAME] [--option value ...] [--list]",
    )
    parser.add_argument("--list", action="store_true", help="list the presets and launch profiles, and exit")
    parser.add_argument(
        "--profile",
        "--config_file",
        metavar="NAME",
        help="launch profile: a name from --list or a file (default: single_gpu, multi_gpu or cpu, by this machine)",
    )
    if "-h" in argv or "--help" in argv:
        _print_help(parser)
        sys.exit(0)
    args, words = parser.parse_known_args(argv)
    args.words = words
    return args


def run(args: argparse.Namespace) -> None:
    """Train and exit with the exit code of the trainer, or with `--list` print the presets and launch profiles."""
    if args.list:
        _print_list()
        return
    from minigpt.training.launch import default_profile, launch, process_count, split_words

    launcher_words, trainer_words = split_words(args.words)
    profile = args.profile or default_profile(trainer_words)
    if lacks_preset(trainer_words):
        from minigpt.planning.timed_preset import with_chosen_preset

        processes = process_count(profile, launcher_words)
        trainer_words = with_chosen_preset(trainer_words, "minigpt train", processes)
    sys.exit(launch(profile, launcher_words, trainer_words))


def _print_list() -> None:
    from minigpt.config.presets import first_comment, presets, profiles

    for title, files in (("presets", presets()), ("launch profiles", profiles())):
        print(f"{title}:")
        width = max(map(len, files))
        for name, path in files.items():
            print(f"  {name:<{width}}  {first_comment(path)}")


def _print_help(parser: argparse.ArgumentParser) -> None:
    from minigpt.config.arguments import Arguments
    from minigpt.config.parser import OptionParser

    parser.print_help()
    print("\nOptions of the trainer:")
    text = OptionParser(Arguments.GROUPS, prog="minigpt train", add_help=False).format_help()
    print(text[text.index("\nmodel:") :], end="")
