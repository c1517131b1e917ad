"""The cases: every verb with every damaged file it reads, every odd path, and every option with bad values."""

import argparse
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from system.fuzz.accepted import reason_to_accept
from system.fuzz.materials import SHAPE, TRAINING, Damage, copy_material, damages_of

from minigpt.cli import VERBS, command_module
from minigpt.config.arguments import Arguments
from minigpt.config.parser import OptionParser
from support.runs import ROOT

LONG, BYTE = "x" * 5000, "\udcff"  # the latter is how Python names a byte that is not UTF-8
SHORT_LIST = (
    "missing", "a folder", "a FIFO", "unreadable", "truncated", "noise", "NaN", "another shape", "pickle only",
    "a list", "deep",
)  # fmt: skip
REST = [*TRAINING[8:], "--max_steps", "1", "--output_dir", "out", "--cache_dir", "CACHE"]
NAMED_BY_DAMAGE = (
    "story.t",
    "train_file",
    "learning_rate",
    "seed",
    "unknown option",
)  # what a damaged YAML file asks for
# how a message names what was given, if not by its name
OTHER_NAMES = (
    "needs Gradio",
    "token for the Hub",
    "cannot listen on",
    "name of a repository",
    "File name too long",
    "UTF-8",
    "no such file",
)


@dataclass(frozen=True)
class Verb:
    """How a program is started, and how its errors begin."""

    title: str
    program: tuple[str, ...]
    good: str  # a command line that does little


@dataclass(frozen=True)
class Input:
    """One way in which a verb is given a file or folder: `words` with @ for its path."""

    verb: str
    words: str
    material: str
    files: tuple[str, ...] = ()  # those to damage, in the folder `material`; () if that is a file itself
    every_damage: bool | tuple[str, ...] = False  # or the names of the damages
    others: tuple[str, ...] = ()  # further materials that the command line names

    @property
    def option(self) -> str:
        """The word before @, or the kind of the material."""
        before = self.words.split("@")[0].split()
        return before[-1].lstrip("-") if before and before[-1].startswith("--") else self.material


@dataclass(frozen=True)
class Case:
    """One command line in a folder of its own. `accepted`: why exit code 0 is right; None: it must be refused."""

    verb: str
    kind: str
    name: str
    words: list[str]
    title: str
    materials: tuple[tuple[str, str], ...]  # pairs of material and its name in the folder
    damage: Callable[[Path], None] | None
    culprits: tuple[str, ...]

    @property
    def accepted(self) -> str | None:
        return reason_to_accept(self.name)


MINIGPT = ("-m", "minigpt")
TRAIN, SHAPED, FROM_TEXT = " ".join(REST), " ".join(SHAPE), " ".join(TRAINING[:8])
MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
SHARDS = ("manifest.json", "train-00000.bin", "tokenizer/tokenizer.json")
GENERATE = "--prompt It --max_new_tokens 2 --device cpu"
EVALUATE = "--use_cpu --batch_size 64"
PREPARE = "--output_dir out --preprocessing_num_workers 1"

PROGRAMS = {
    "train_accelerate.py": Verb(
        "train_accelerate.py",
        (str(ROOT / "train_accelerate.py"),),
        f"--train_file story.txt --tokenizer char {SHAPED} {TRAIN}",
    ),
    "hub_upload.py": Verb("hub_upload.py", (str(ROOT / "hub_upload.py"),), "tinyrun user/name --dry_run"),
}
GOOD = {  # a verb that is not listed needs no options
    "train": "recipe.yaml --output_dir out --cache_dir CACHE",
    "prepare": f"--train_file story.txt --tokenizer char {PREPARE}",
    "generate": f"--model tinyrun {GENERATE}",
    "playground": "--model tinyrun",
    "eval": f"--model tinyrun --text_file story.txt {EVALUATE}",
    "hellaswag": f"--model tinyrun --data_file quiz.jsonl {EVALUATE}",
    "export gpt2": "tinyrun out",
    "plan": "recipe.yaml --device cpu --no_probe",
    "plot": "tinyrun --output_dir out",
    "verify-resume": "recipe.yaml --steps 2",
    "audit": "tinyrun",
    "compare": "recipe.yaml recipe.yaml --max_pairs 1 --output_dir out --cache_dir CACHE",
    "sweep": "recipe.yaml --option seed=1,2 --output_dir out --cache_dir CACHE",
    "replay": "tinystep/replay.json --device cpu",
    "data inspect": "tinyshards",
    "data verify": "tinyshards",
    "bench train": "--shape shakespeare --trainers minigpt --turns 1 --steps 1 --warmup 1 --device cpu",
    "bench loss": "--nanogpt nanogpt --train_file story.txt --nanogpt_steps 2 --seeds 1",
    "bench generate": "--layers 1 --batch_sizes 1 --dtypes float32 --modes eager --new_tokens 1 --turns 1",
    "bench tokenize": "--train_file story.txt --megabytes 0.01 --workers 1 --turns 1 --tokenizer tinyrun",
    "bench load": "--tokens 10000 --shards 1 --sparse_tokens 10000 --block_size 16 --workers 0 --seconds 0.1",
}
PROGRAMS |= {verb: Verb(f"minigpt {verb}", (*MINIGPT, *verb.split()), GOOD.get(verb, "")) for verb in VERBS}

TEXTS = ("story.txt", "story.txt.gz", "story.txt.zst", "story.jsonl", "chat.jsonl", "story.parquet", "story.arrow")
INPUTS = [
    Input("train_accelerate.py", "@ --output_dir out --cache_dir CACHE", "recipe.yaml", every_damage=True,
          others=("story.txt",)),
    *(
        Input("train_accelerate.py", f"--train_file @ {FROM_TEXT} {TRAIN}", text)
        for text in TEXTS
    ),
    Input("train_accelerate.py", f"--train_file story.txt --validation_file @ {FROM_TEXT} {TRAIN}",
          "story.jsonl"),
    Input("train_accelerate.py", f"--data @ {SHAPED} {TRAIN}", "tinyshards", SHARDS),
    Input("train_accelerate.py", f"--data @ {SHAPED} {TRAIN}", "nanoshards", ("train.bin",)),
    Input("train_accelerate.py", f"--data @ {SHAPED} {TRAIN}", "numpyshards", ("edu_train_000000.npy",)),
    Input("train_accelerate.py", f"--data @ {SHAPED} {TRAIN}", "llmcshards", ("edu_train_000000.bin",)),
    Input("train_accelerate.py", f"--train_file story.txt --tokenizer @ {SHAPED} {TRAIN}", "tinyrun",
          ("tokenizer.json", "tokenizer_config.json")),
    Input("train_accelerate.py", f"--train_file story.txt --model_name_or_path @ {TRAIN}", "tinyrun", MODEL, True),
    Input("train_accelerate.py", f"--train_file story.txt --model_name_or_path @ {TRAIN}", "tinygpt2", MODEL),
    Input("train_accelerate.py",
          f"--train_file story.txt --tokenizer char {SHAPED} {TRAIN} --max_steps 2 --resume_from_checkpoint @",
          "tinyrun/checkpoint-1",
          ("training_state.json", "optimizer.safetensors", "model.safetensors", "arguments.yaml", "checkpoint.json")),
    Input("train_accelerate.py",
          f"--train_file story.txt {FROM_TEXT} {TRAIN} --hellaswag_steps 1 --hellaswag_file @", "quiz.jsonl"),
    Input("train", "@ --output_dir out --cache_dir CACHE", "recipe.yaml", others=("story.txt",)),
    Input("train", "recipe.yaml --output_dir out --cache_dir CACHE --profile @", "profile.yaml",
          others=("story.txt",)),
    *(Input("prepare", f"--train_file @ --tokenizer char {PREPARE}", text, every_damage=True) for text in TEXTS),
    Input("prepare", f"--train_file story.txt --validation_file @ --tokenizer char {PREPARE}", "story.jsonl"),
    Input("prepare", f"--train_file story.txt --tokenizer @ {PREPARE}", "tinyrun",
          ("tokenizer.json", "tokenizer_config.json"), True),
    Input("prepare", f"--dataset_name @ --tokenizer char {PREPARE}", "texts", ("story.jsonl",)),
    Input("generate", f"--model @ {GENERATE}", "tinyrun", MODEL, True),
    Input("generate", f"--model @ {GENERATE}", "tinygpt2", MODEL[:2]),
    Input("generate", "--model tinyrun --max_new_tokens 2 --device cpu --prompt_file @", "prompt.txt"),
    Input("playground", "--model @", "tinyrun", MODEL),
    Input("eval", f"--model @ --text_file story.txt {EVALUATE}", "tinyrun", MODEL),
    Input("eval", f"--model tinyrun --data @ {EVALUATE}", "tinyshards", SHARDS),
    Input("eval", f"--model tinyrun --text_file @ {EVALUATE}", "story.txt", every_damage=True),
    Input("hellaswag", f"--model @ --data_file quiz.jsonl {EVALUATE}", "tinyrun", MODEL),
    Input("hellaswag", f"--model tinyrun {EVALUATE} --data_file @", "quiz.jsonl", every_damage=True),
    Input("export gpt2", "@ out", "tinyrun", MODEL),
    Input("plan", "@ --device cpu --no_probe", "recipe.yaml", every_damage=True, others=("story.txt",)),
    Input("plan", "recipe.yaml --device cpu --no_probe --tokenizer @", "tinyrun", ("tokenizer.json",),
          others=("story.txt",)),
    Input("plot", "@ --output_dir out", "tinyrun", ("metrics.jsonl",), True),
    Input("verify-resume", "@ --steps 2", "recipe.yaml", others=("story.txt",)),
    Input("verify-resume", "recipe.yaml --steps 2 --config_file @", "profile.yaml", others=("story.txt",)),
    Input("compare", "recipe.yaml @ --max_pairs 1 --output_dir out", "recipe.yaml", others=("story.txt",)),
    Input("sweep", "@ --option seed=1 --output_dir out", "recipe.yaml", others=("story.txt",)),
    Input("replay", "@/replay.json --device cpu", "tinystep", ("replay.json", "arguments.yaml", *MODEL[:3]), True,
          others=("story.txt",)),
    Input("data inspect", "@", "tinyshards", SHARDS, True),
    Input("data inspect", "@", "nanoshards", ("train.bin",), True),
    Input("data inspect", "@", "numpyshards", ("edu_train_000000.npy",), True),
    Input("data inspect", "@", "llmcshards", ("edu_train_000000.bin",), True),
    Input("data inspect", "tinyshards --tokenizer @", "tinyrun", ("tokenizer.json",)),
    Input("data verify", "@", "tinyshards", SHARDS, True),
    Input("bench loss", "--nanogpt @ --train_file story.txt --nanogpt_steps 2 --seeds 1", "nanogpt", ("train.py",),
          ("missing", "a folder", "a FIFO")),
    Input("bench loss", "--nanogpt nanogpt --nanogpt_steps 2 --seeds 1 --train_file @", "story.txt", (), ("missing",)),
    Input("bench train", "--shape shakespeare --trainers minigpt nanogpt --turns 1 --nanogpt @", "nanogpt",
          ("model.py",), ("missing", "a folder", "a FIFO")),
    Input("bench tokenize", "--megabytes 0.01 --workers 1 --turns 1 --tokenizer tinyrun --train_file @", "story.txt"),
    Input("bench tokenize", "--megabytes 0.01 --workers 1 --turns 1 --train_file story.txt --tokenizer @", "tinyrun",
          ("tokenizer.json",)),
    Input("hub_upload.py", "@ user/name --dry_run", "tinyrun",
          ("config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "data.json", "environment.json",
           "arguments.yaml", "README.md"), True),
]  # fmt: skip
OUTPUTS = {  # words with @ for what is written
    "train_accelerate.py": PROGRAMS["train_accelerate.py"].good.replace("--output_dir out", "--output_dir=@"),
    "prepare": GOOD["prepare"].replace("--output_dir out", "--output_dir=@"),
    "eval": GOOD["eval"] + " --output=@",
    "hellaswag": GOOD["hellaswag"] + " --output=@",
    "hellaswag items": GOOD["hellaswag"] + " --items=@",
    "export gpt2": "tinyrun @",
    "plot": "tinyrun --output_dir=@",
    "bench load": GOOD["bench load"] + " --output=@",
}
PATHS = {  # what a path may be: a way to make it, and the path
    "missing": (None, "nowhere"),
    "an empty text": (None, ""),
    "a name of 5000 characters": (None, LONG),
    "a missing name with a newline": (None, "no\nwhere"),
    "not UTF-8": (None, f"no{BYTE}where"),
    "below a file": (None, "story.txt/below"),
    "an empty folder": (lambda folder: (folder / "hollow").mkdir(), "hollow"),
    "a FIFO": (lambda folder: os.mkfifo(folder / "pipe"), "pipe"),
    "a looping link": (lambda folder: (folder / "loop").symlink_to("loop"), "loop"),
    "unreadable": (None, "/proc/self/mem"),
}
NAMES = {
    "spaces and quotes": "a 'b' \"c\"",
    "a newline": "a\nb",
    "special characters": "a*[b]?{c}$d@#:%e",
    "a leading dash": "-a",
}
PLACES_TO_WRITE = {  # never a real device: a program that renames onto it would destroy it
    "a file": (lambda folder: (folder / "taken").write_text("mine"), "taken"),
    "a folder with files": (
        lambda folder: [(folder / "taken").mkdir(), (folder / "taken" / "thesis.tex").write_text("mine")],
        "taken",
    ),
    "below a file": (None, "story.txt/below"),
    "read-only": (None, "READ_ONLY/result"),
    "the read-only folder": (None, "READ_ONLY"),
    "in /proc": (None, "/proc/result"),
    "a dangling link into nowhere": (lambda folder: (folder / "loose").symlink_to("no/where"), "loose"),
    "a looping link": (lambda folder: (folder / "loop").symlink_to("loop"), "loop"),
    "a name of 5000 characters": (None, LONG),
    "an empty text": (None, ""),
    "a FIFO": (lambda folder: os.mkfifo(folder / "pipe"), "pipe"),
}

# further words that an option is only valid with
COMPANIONS = {
    "hellaswag_limit": "--hellaswag_steps 1 --hellaswag_file quiz.jsonl",
    "hellaswag_steps": "--hellaswag_file quiz.jsonl",
    "hellaswag_file": "--hellaswag_steps 1",
    "hub_private_repo": "--push_to_hub",
    "hub_model_id": "--push_to_hub",
    "num_decay_steps": "--lr_scheduler_type warmup_stable_decay",
    "muon_learning_rate": "--optimizer muon",
    "muon_momentum": "--optimizer muon",
    "tokenizer_vocab_size": "--tokenizer bpe",
    "tokenizer_special_tokens": "--tokenizer bpe",
    "tokenizer_training_megabytes": "--tokenizer bpe",
    "link": "--device H100 --devices 2",
    "network": "--device H100 --devices 2",
}
NOT_TRIED = {"help", "version"}
PATH_OPTIONS = {
    "output_dir", "output", "items", "cache_dir", "train_file", "validation_file", "data", "model", "text_file",
    "data_file", "prompt_file", "hellaswag_file", "nanogpt", "config_file", "profile", "tokenizer",
    "model_name_or_path", "resume_from_checkpoint", "dataset_name",
}  # fmt: skip
PLANNED_OPTIONS = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "block_size",
    "max_position_embeddings", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps",
    "num_train_epochs", "pad_vocab_size_to_multiple_of",
}  # fmt: skip


class _Parser(BaseException):
    """Carries the parser of a verb out of its `parse`."""


@cache
def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser that a verb builds; it is caught when it begins to parse."""
    if verb == "train_accelerate.py":
        return OptionParser(Arguments.GROUPS)
    if verb == "hub_upload.py":
        import hub_upload

        parse = hub_upload.parse
    else:
        parse = command_module(verb).parse
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def catch(self: argparse.ArgumentParser, *words: object, **options: object) -> None:
        raise _Parser(self)

    argparse.ArgumentParser.parse_known_args = catch  # type: ignore[assignment,method-assign]
    try:
        parse([])
    except _Parser as caught:
        return caught.args[0]
    finally:
        argparse.ArgumentParser.parse_known_args = parse_known_args  # type: ignore[method-assign]
    raise AssertionError(f"{verb} does not parse its words with argparse")


def all_cases(materials: Path, read_only: Path | None) -> list[Case]:
    """Every case; `materials` must exist. `read_only`: a folder that even root cannot write into, if there is one."""
    cases = [*_file_cases(materials), *_path_cases(), *_output_cases(read_only), *_option_cases()]
    if importlib.util.find_spec("gradio") is None:
        cases = [case for case in cases if case.verb != "playground" or case.kind == "option"]
    names = [case.name for case in cases]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)[:5]
    return cases


def _words(template: str, path: str) -> list[str]:
    return [word.replace("@", path) for word in template.split()]


def _materials(words: str, material: str, name: str, others: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """What lies in the folder of a case: the material under its name, and all that the other words mention."""
    known = ("story.txt", "quiz.jsonl", "tinyrun", "tinyshards", "nanogpt", "recipe.yaml", "tinystep")
    mentioned = {word.split("/")[0].split("=")[-1] for word in words.split()}
    further = {other for other in known if other in mentioned} | set(others)
    if "recipe.yaml" in further or "tinystep" in further:
        further.add("story.txt")
    return ((material, name), *((other, other) for other in sorted(further) if other != material or name != material))


def _file_cases(materials: Path) -> Iterator[Case]:
    for entry in INPUTS:
        verb = PROGRAMS[entry.verb]
        for file in entry.files or ("",):
            path = materials / entry.material / file if file else materials / entry.material
            for name, damage in damages_of(path).items():
                chosen = SHORT_LIST if entry.every_damage is False else entry.every_damage
                if chosen is not True and name not in chosen:
                    continue
                target = f"{entry.material}/{file}" if file else entry.material
                option = entry.option if entry.option != entry.material else "argument"
                yield Case(
                    entry.verb, "file", f"{entry.verb}: {option}: {target}: {name}",
                    _words(entry.words, entry.material), verb.title,
                    _materials(entry.words, entry.material, entry.material, entry.others),
                    _damage_at(target, damage), (Path(target).name, entry.material, f"{option}=", *NAMED_BY_DAMAGE),
                )  # fmt: skip


def _damage_at(target: str, damage: Damage) -> Callable[[Path], None]:
    return lambda folder: damage(folder / target)


def _path_cases() -> Iterator[Case]:
    seen = set()
    for entry in INPUTS:
        verb, option = PROGRAMS[entry.verb], entry.option
        place = (entry.verb, option if option != entry.material else "argument", bool(entry.files))
        if place in seen:
            continue
        seen.add(place)
        words = entry.words
        form = re.sub(r"(--\w+) @", r"\1=@", words)  # a path may begin with a dash
        label = f"{place[1]} ({'folder' if entry.files else 'file'})"
        for name, (make, path) in PATHS.items():
            yield Case(
                entry.verb, "path", f"{entry.verb}: {label} is {name}", _words(form, path), verb.title,
                _materials(words, "story.txt", "story.txt", entry.others), make,
                (" ".join(path.split()).replace(BYTE, "\\udcff")[:100] or "empty", option, *OTHER_NAMES),
            )  # fmt: skip
        if entry.verb in (
            "bench loss",
            "bench train",
            "verify-resume",
            "compare",
            "sweep",
        ):  # what they start takes long
            continue
        for name, path in NAMES.items():
            suffix = "" if entry.files else "".join(Path(entry.material).suffixes)
            given = f"./{path}{suffix}" if not re.search(r"--\w+=@", form) else path + suffix
            yield Case(
                entry.verb, "name", f"{entry.verb}: {label} has a name with {name}", _words(form, given), verb.title,
                _materials(words, entry.material, path + suffix, entry.others), None, (option,),
            )  # fmt: skip


def _output_cases(read_only: Path | None) -> Iterator[Case]:
    for output, words in OUTPUTS.items():
        verb = output.removesuffix(" items")
        for name, (make, path) in PLACES_TO_WRITE.items():
            if read_only is None and path.startswith("READ_ONLY"):
                continue
            path = path.replace("READ_ONLY", str(read_only))
            yield Case(
                verb, "output", f"{output}: writes to {name}", _words(words, path), PROGRAMS[verb].title,
                _materials(words, "story.txt", "story.txt", ()), make,
                (path.removesuffix("/below")[:100] or "empty", "output", "items"),
            )  # fmt: skip
        for name, path in NAMES.items():
            given = path if "=@" in words else f"./{path}"
            yield Case(
                verb, "output", f"{output}: writes to a name with {name}", _words(words, given), PROGRAMS[verb].title,
                _materials(words, "story.txt", "story.txt", ()), None, ("output",),
            )  # fmt: skip


def _option_cases() -> Iterator[Case]:
    for name, verb in PROGRAMS.items():
        if name == "prepare":  # its options are those of the trainer
            continue
        actions = list(parser_of(name)._actions)
        if name == "plan":
            actions += [
                action for action in parser_of("train_accelerate.py")._actions if action.dest in PLANNED_OPTIONS
            ]
        for action in actions:
            options = [option for option in action.option_strings if option.startswith("--")]
            if not options or options[0].startswith("--no_") or action.dest in NOT_TRIED:
                continue
            for value in _values(action):
                yield _option_case(name, verb, action, f"{options[0]}={value}")
            if action.nargs in ("+", "*", None) and action.type is not None:
                yield _option_case(name, verb, action, options[0])


def _option_case(name: str, verb: Verb, action: argparse.Action, word: str) -> Case:
    companions = COMPANIONS.get(action.dest, "") if name in ("train_accelerate.py", "plan") else ""
    words = f"{verb.good} {companions}"
    shown = word if len(word) < 100 else f"{word[:40]}…"
    return Case(
        name, "option", f"{name}: {shown!r}", [*words.split(), word], verb.title,
        _materials(words, "story.txt", "story.txt", ()), None,
        (action.dest, action.dest.replace("_", "-"), "prompt", *OTHER_NAMES),
    )  # fmt: skip


def _values(action: argparse.Action) -> list[str]:
    """Bad and borderline values for an option, by its type."""
    kind = getattr(action.type, "__name__", "str")
    if action.nargs == 0:
        return ["x"]
    if action.choices is not None or kind in ("make_choice_type_function", "<lambda>"):
        return ["", "word", "no\nword"]
    if kind == "string_to_bool":
        return ["", "maybe", "2"]
    if kind == "int":
        return ["", "word", "1.5", "nan", "-1", "0", str(10**30)]
    if kind == "float":
        return ["", "word", "nan", "inf", "-inf", "-1", "0", "1e308"]
    if action.dest in PATH_OPTIONS:  # tried as paths
        return []
    return ["", f"no{BYTE}word", f"no\n{LONG}"]


def copy_all(case: Case, materials: Path, folder: Path) -> None:
    """The folder of a case, with its damaged input."""
    for material, name in case.materials:
        copy_material(materials / material, folder / name)
    if case.damage is not None:
        case.damage(folder)
