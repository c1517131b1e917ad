"""The folder of a run: the name of each file in it, and the readers that several rooms share."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from minigpt.utils.errors import UserError
from minigpt.utils.files import read_text

ARGUMENTS_FILE = "arguments.yaml"  # in the run, in each checkpoint and next to each skipped step
METRICS_FILE = "metrics.jsonl"
DATA_FILE, ENVIRONMENT_FILE = "data.json", "environment.json"
CARD_FILE = "README.md"
EVALUATIONS_DIR, PROFILE_DIR = "evaluations", "profile"
CURVE_FILES = ("loss.png", "loss.pdf")
# in a checkpoint, next to the model
OPTIMIZER_FILE, STATE_FILE, CHECKSUMS_FILE = "optimizer.safetensors", "training_state.json", "checkpoint.json"
# patterns of the files with tensors, of which a sharded model has several
WEIGHT_FILES = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
OPTIMIZER_FILES = (OPTIMIZER_FILE, "optimizer-?????-of-?????.safetensors")
# in skipped_steps/step-<step>, next to the model
SKIPPED_STEPS_DIR, REPLAY_FILE = "skipped_steps", "replay.json"
# of an adapter, instead of config.json, the weights and the code; the names are PEFT's
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# of a model that was exported as a web page into a folder
PAGE_FILE, PAGE_WEIGHTS_FILE = "index.html", "model.bin"
# while a run has the folder
LOCK_FILE, REPLACED_DIR = ".lock", ".replaced"

MODEL_FILES = (
    "config.json", "generation_config.json", *WEIGHT_FILES,
    "configuration_*.py", "modeling_*.py", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja",
    ADAPTER_CONFIG, ADAPTER_WEIGHTS,
)  # fmt: skip
RUN_FILES = (*MODEL_FILES, ARGUMENTS_FILE, METRICS_FILE, DATA_FILE, ENVIRONMENT_FILE, *CURVE_FILES)
RUN_FOLDERS = (
    EVALUATIONS_DIR, PROFILE_DIR, SKIPPED_STEPS_DIR, "additional_chat_templates", "tensorboard", "wandb",
    ".writing-*", ".deleting-*", ".pushing-*",
)  # fmt: skip
CHECKPOINT = re.compile(r"checkpoint-(?P<step>0|[1-9][0-9]*)")
SET_ASIDE = re.compile(CHECKPOINT.pattern + r"\.(damaged|abandoned)(-[0-9]+)?")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl. A last line that a kill has cut short is dropped.

    Raises UserError that names the first line which is not an object with a step.
    """
    metrics = []
    *lines, unfinished = read_text(path, errors="replace").split("\n")
    for number, line in enumerate([*lines, *([unfinished] if _is_metrics(unfinished) else [])], start=1):
        if not _is_metrics(line):
            raise UserError(f"{path} line {number} is not a line of metrics; remove it, or move the file away")
        metrics.append(json.loads(line))
    return metrics


def _is_metrics(line: str) -> bool:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and isinstance(values.get("step"), int)


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>` in `run_dir`, or links to folders, oldest first."""
    folders = (path for path in run_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir())
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    """The step in the name of a `checkpoint-<step>` folder."""
    return int(folder.name.removeprefix("checkpoint-"))


def find_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in `folder` whose names match one of `patterns`, by name."""
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
