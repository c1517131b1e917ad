"""What exports begin with: a new folder, the model, its tokenizer, and a chat template that other engines read."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from minigpt.data.tokenizer import has_tokenizer, load_tokenizer, vocabulary_size
from minigpt.modeling.loading import find_model, load_model
from minigpt.utils.errors import UserError
from modeling_minigpt import MiniGPTForCausalLM

# a block tag and the marks that trim the white space around it
GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")


def empty_folder(destination: str | Path) -> Path:
    """`destination` as a path. Raises UserError if it is a file, or a folder with something in it."""
    folder = Path(destination)
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} exists and is not a folder; give a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give a new folder")
    return folder


@dataclass(frozen=True)
class Source:
    """A model that is exported; each id of its vocabulary is at most the tokenizer's last.

    name: a short name for files. notes: what the user should know.
    """

    name: str
    model: MiniGPTForCausalLM  # on the CPU, in float32
    tokenizer: PreTrainedTokenizerFast
    notes: list[str]


def load_source(name_or_folder: str | Path, file_format: str) -> Source:
    """Load the model in `name_or_folder` (a folder or Hub name) for an export to `file_format`.

    Rows that only round the size of the vocabulary up are removed: another engine could generate their ids.
    Raises UserError if it is not a MiniGPT, or if it has no fast tokenizer or one with more ids than the model.
    """
    found = find_model(name_or_folder)
    model = load_model(found, dtype=torch.float32, device="cpu")
    if not isinstance(model, MiniGPTForCausalLM):
        raise UserError(
            f"{name_or_folder} is a {type(model).__name__}; only a MiniGPT or a GPT-2 can be exported to {file_format}"
        )
    if Path(found).is_dir() and not has_tokenizer(Path(found)):
        raise UserError(f"{found} has no tokenizer, and {file_format} carries one; save the model's tokenizer there")
    tokenizer = load_tokenizer(found, require_eos=False)
    notes, rows, ids = [], model.config.vocab_size, vocabulary_size(tokenizer)
    if ids > rows:
        raise UserError(f"{found}: the tokenizer has ids up to {ids - 1}, but the model only has vocab_size={rows}")
    if ids < rows:
        model.resize_token_embeddings(ids)
        notes.append(f"{rows - ids} rows of the vocabulary have no token and are removed")
    return Source(_short_name(found), model, tokenizer, notes)


def _short_name(found: str) -> str:
    """The name of a folder or Hub model; that of a checkpoint begins with the name of its run."""
    if not Path(found).is_dir():
        return found.rpartition("/")[2]
    folder = Path(found).resolve()
    return f"{folder.parent.name}-{folder.name}" if CHECKPOINT_NAME.fullmatch(folder.name) else folder.name


def portable_chat_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The tokenizer's chat template, if there is one, without `{% generation %}`, which other engines do not know.

    The tag becomes `{% if true %}` with the same marks for white space, so the template writes the same text.
    """
    if not tokenizer.chat_template:
        return None
    template = tokenizer.get_chat_template()
    return GENERATION_TAG.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", template)
