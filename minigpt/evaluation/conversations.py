"""How well a model answers: the loss of the assistant's words, and the share of answers that it gives exactly.

Shapes: B questions of a batch, T tokens of the longest prompt.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from minigpt.config.arguments import DataArguments
from minigpt.data.chat import Example, LossMasking, encode_examples
from minigpt.data.chat_template import read_chat_template, set_chat_template
from minigpt.data.corpora import open_corpus
from minigpt.data.encoding import Encoder, EncoderSpec
from minigpt.data.python_chat import HELD_OUT_PERCENTAGE
from minigpt.data.readers import JsonLines
from minigpt.data.rows import Columns
from minigpt.data.shards import IN_LOSS
from minigpt.evaluation.perplexity import MeasuredText
from minigpt.generation.conversation import Conversation
from minigpt.generation.sampling import decode, end_of_text_ids
from minigpt.utils.errors import UserError
from minigpt.utils.progress import Progress

SPARE_TOKENS = 8  # beyond those of the right answer; a longer answer is wrong in any case


def read_conversations(name: str, limit: int | None = None) -> list[Example]:
    """The conversations of a JSON lines file, or the held-out ones of `python-chat`; at most `limit` of them.

    Raises UserError if there is no such file, or if a row is no conversation or prompt with completion.
    """
    if name == "python-chat":
        data_args = DataArguments(corpus="python-chat", validation_split_percentage=HELD_OUT_PERCENTAGE)
        documents = open_corpus(data_args).validation.pieces()
    else:
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"conversations={name} is not a file; give a file of JSON lines, or python-chat")
        source = JsonLines(path, Columns("text", prefer_examples=True))
        if source.row_format is None:
            raise UserError(
                f"conversations={name}: its first row holds no conversation; see docs/data.md for the formats"
            )
        documents = source.pieces(0, source.count())
    examples = [cast(Example, document) for document, _ in documents]
    if not examples:
        raise UserError(f"conversations={name} has no rows")
    return examples[:limit]


def give_plain_template(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Give a tokenizer that has no chat template `plain`, which needs no new token. Returns whether it had none."""
    if tokenizer.chat_template:
        return False
    set_chat_template(tokenizer, read_chat_template("plain"))
    return True


@dataclass(frozen=True)
class EncodedConversations:
    """Conversations as token ids [N] with marks [N], as `minigpt.evaluation.perplexity.TokenText` describes them."""

    ids: np.ndarray
    all_marks: np.ndarray
    has_loss_mask = True

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]

    def marks(self, start: int, stop: int) -> np.ndarray:
        return self.all_marks[start:stop]


def assistant_words(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> MeasuredText:
    """The conversations as a text in which only the assistant's words, and the ends of its turns, are targets.

    Raises UserError if the chat template or the vocabulary cannot express a conversation.
    """
    encoder = Encoder(EncoderSpec.from_tokenizer(tokenizer, np.dtype(np.uint32), large=False))
    masking = LossMasking.from_tokenizer(tokenizer, completion_only=True)
    ids, marks, _ = encode_examples(examples, masking, encoder, tokenizer.eos_token_id)
    text = decode(tokenizer, ids[marks & IN_LOSS > 0].tolist(), skip_special_tokens=True)
    return MeasuredText(EncodedConversations(ids, marks), len(text.encode()), len(text.split()))


@dataclass(frozen=True, order=True)
class Answer:
    """A model's answer to the last question of conversation number `item`."""

    item: int
    kind: str
    question: str
    expected: str
    answer: str

    @property
    def is_exact(self) -> bool:
        """Whether the answer is the expected one, white space around them aside."""
        return self.answer == self.expected.strip()


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    batch_size: int,
    accelerator: Accelerator,
) -> list[Answer]:
    """The most likely answer, token by token, to the last question of each conversation, in their order.

    Prompts and completions that are texts are completed as they are. All processes take part and get the same result.
    Raises UserError if a question does not fit into the context.
    """
    prompts = [_prompt(model, tokenizer, example) for example in examples]
    by_length = sorted(range(len(examples)), key=lambda number: len(prompts[number]))  # little padding
    batches = [by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size)]
    own_batches = batches[accelerator.process_index :: accelerator.num_processes]
    answers: list[Answer] = []
    with Progress("answers", len(own_batches), "batches", enabled=accelerator.is_main_process) as progress:
        for batch in own_batches:
            expected = [_expected(examples[number]) for number in batch]
            longest = max(len(tokenizer(text)["input_ids"]) for text in expected)
            texts = _generate(model, tokenizer, [prompts[number] for number in batch], longest + SPARE_TOKENS)
            for number, right, text in zip(batch, expected, texts, strict=True):
                example = examples[number]
                answers.append(Answer(number, example.kind, _question(example), right, text.strip()))
            progress.update()
    return sorted(gather_object(answers)) if accelerator.num_processes > 1 else sorted(answers)


def exact_match(answers: Sequence[Answer]) -> dict[str, float]:
    """The share of exact answers: of each kind of question, if there are kinds, and of all ("exact_match")."""
    of_kind: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        of_kind[answer.kind].append(answer.is_exact)
    shares = {f"exact_match/{kind}": float(np.mean(exact)) for kind, exact in sorted(of_kind.items()) if kind}
    return shares | {"exact_match": float(np.mean([answer.is_exact for answer in answers]))}


def _prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, example: Example) -> list[int]:
    if isinstance(example.prompt, str):
        ids: list[int] = tokenizer(example.prompt)["input_ids"]
        return ids
    conversation = Conversation(model, tokenizer)
    conversation.messages = example.messages[:-1]
    try:
        prompt, _ = conversation.prompt(len(tokenizer(_expected(example))["input_ids"]) + SPARE_TOKENS)
    except UserError as error:
        raise UserError(f"{example.where}: {error}") from error
    return prompt


def _expected(example: Example) -> str:
    return example.completion if isinstance(example.completion, str) else example.messages[-1]["content"]


def _question(example: Example) -> str:
    return example.prompt if isinstance(example.prompt, str) else example.messages[-2]["content"]


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    """The texts that follow some prompts, which are padded on the left to one length [B, T]."""
    width = max(map(len, prompts))
    ends = end_of_text_ids(model, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    inputs = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(inputs)
    for row, prompt in enumerate(prompts):
        inputs[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    limit = getattr(model.config, "max_position_embeddings", width + max_new_tokens)
    options: dict[str, Any] = {
        "max_new_tokens": min(max_new_tokens, limit - width),
        "do_sample": False,
        "eos_token_id": ends,
        "pad_token_id": padding,
    }
    # PreTrainedModel does not declare `generate`: the classes that can generate inherit it from GenerationMixin
    output = cast(Any, model).generate(
        inputs.to(model.device), attention_mask=mask.to(model.device), generation_config=GenerationConfig(**options)
    )
    texts = []
    for row in output[:, width:].tolist():
        length = next((position for position, token in enumerate(row) if token in ends), len(row))
        texts.append(decode(tokenizer, row[:length], skip_special_tokens=True))
    return texts
