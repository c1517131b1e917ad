"""Give a tokenizer a chat template: one of MiniGPT's, a Jinja file, or that of another tokenizer.

    chatml   <|im_start|>user\\n...<|im_end|>\\n for each message. Two new special tokens, as in most models today
    plain    User:\\n... and Assistant:\\n...; a turn of the assistant ends with the eos_token. No new token: also for
             tiny vocabularies, and for LoRA, which does not train embeddings

Both mark the assistant's words with `{% generation %}`, which TRL and transformers read as well.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.data.chat import Messages, render_messages, template_variables
from minigpt.data.tokenizer import load_tokenizer
from minigpt.utils.errors import UserError
from minigpt.utils.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = Path(__file__).parent / "templates"
NAMES = ("chatml", "plain")
CONTROL_TOKEN = re.compile(
    r"<\|[^<>|\s]+\|>"
)  # as <|im_start|>: how chat templates write tokens that no text contains

ANSWER = "Answer"
SAMPLE: Messages = [
    {"role": "system", "content": "System"},
    {"role": "user", "content": "Question"},
    {"role": "assistant", "content": ANSWER},
]


def read_chat_template(name: str) -> str:
    """The template that `name` means: 'chatml', 'plain', a Jinja file, or a tokenizer folder or Hub name.

    Raises UserError if there is no such template.
    """
    if name in NAMES:
        return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")
    path = Path(name).expanduser()
    if path.is_file():
        template = read_text(path).removesuffix("\n")
        if not template.strip():
            raise UserError(f"chat_template={name} is an empty file")
        return template
    try:
        template = load_tokenizer(name, require_eos=False, require_fast=False).get_chat_template()
    except UserError as error:
        choices = f"{', '.join(NAMES)}, a Jinja file, and a tokenizer that has a template"
        raise UserError(f"chat_template={name} is none of {choices} ({error})") from error
    except ValueError as error:
        raise UserError(
            f"chat_template={name}: this tokenizer has no chat template; try {' or '.join(NAMES)}"
        ) from error
    assert isinstance(template, str)
    return template


def set_chat_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> list[str]:
    """Set the chat template of a tokenizer, and add the control tokens that the template writes as special tokens.

    Returns the tokens that are new. Raises UserError if the template cannot write a conversation.
    """
    tokenizer.chat_template = template
    variables = template_variables(tokenizer)
    text, _ = render_messages(template, variables, _sample(template, variables), "chat_template")
    vocabulary = tokenizer.get_vocab()
    new_tokens = [token for token in dict.fromkeys(CONTROL_TOKEN.findall(text)) if token not in vocabulary]
    tokenizer.add_special_tokens({"additional_special_tokens": new_tokens}, replace_extra_special_tokens=False)
    return new_tokens


def sample_text(template: str) -> str:
    """A short text with all words that the template writes around messages, without control tokens.

    Raises UserError if the template cannot write a conversation.
    """
    no_tokens = {"bos_token": "", "eos_token": ""}
    text, _ = render_messages(template, no_tokens, _sample(template, no_tokens), "chat_template")
    return CONTROL_TOKEN.sub("", text)


def sample_prompts(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]) -> dict[str, str]:
    """The text that a model continues for each prompt: the prompt itself, or a question if there is a chat template.

    With a template, the prompt "" is skipped: a conversation does not begin with an answer.
    """
    if not tokenizer.chat_template:
        return {prompt: prompt for prompt in prompts}
    template, variables = tokenizer.get_chat_template(), template_variables(tokenizer)
    return {
        prompt: render_messages(template, variables, [{"role": "user", "content": prompt}], "sample_prompts", True)[0]
        for prompt in prompts
        if prompt
    }


def end_of_turn_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The id of the first special token after the assistant's words in the tokenizer's chat template.

    None if there is no template, or none that works, or if it ends a turn in another way.
    """
    if not tokenizer.chat_template:
        return None
    template, variables = tokenizer.get_chat_template(), template_variables(tokenizer)
    try:
        text, _ = render_messages(template, variables, _sample(template, variables), "chat_template")
    except UserError:
        return None
    _, found, end = text.rpartition(ANSWER)
    ids: list[int] = tokenizer(end, add_special_tokens=False)["input_ids"] if found else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((token for token in ids if token in special), None)


def _sample(template: str, variables: dict[str, str]) -> Messages:
    """A short conversation that the template accepts: some refuse a system message."""
    try:
        render_messages(template, variables, SAMPLE, "chat_template")
    except UserError:
        return SAMPLE[1:]
    return SAMPLE
