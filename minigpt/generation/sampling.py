"""Generate text from prompts.

Shapes: N sequences of one prompt, T tokens so far.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from minigpt.generation.cpu_decoding import decode as decode_on_cpu
from minigpt.generation.cpu_decoding import has_fast_decoding
from minigpt.modeling.loading import evaluating
from minigpt.utils.errors import UserError

INCOMPLETE_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to before the rest of the character follows


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises UserError that lists every impossible value.

    - temperature: divides the logits; 0 always takes the most likely token.
    - top_k: only the k most likely tokens; None keeps all.
    - top_p: only the fewest tokens with probabilities that add up to p; None keeps all.
    - stop: texts that end a sequence and are not part of it; a stop text that begins in the prompt does not count.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    num_return_sequences: int = 1
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not self.temperature >= 0:
            problems.append(f"temperature={self.temperature} must not be negative")
        if self.top_k is not None and self.top_k < 0:
            problems.append(f"top_k={self.top_k} must not be negative")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.num_return_sequences < 1:
            problems.append(f"num_return_sequences={self.num_return_sequences} must be at least 1")
        if self.temperature == 0 and self.num_return_sequences > 1:
            problems.append(
                f"temperature=0 always gives the same text: num_return_sequences={self.num_return_sequences} "
                "needs a temperature above 0"
            )
        if "" in self.stop:
            problems.append("a stop text must not be empty")
        if problems:
            raise UserError("; ".join(problems))

    def generate_options(self) -> dict[str, Any]:
        """The choice of the next token as options of `model.generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
        }


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt.

    - continuation: the new text, without a stop text.
    - token_ids: the new tokens, with the end-of-text token or the tokens of the stop text if there is one.
    - finish_reason: "end" (end-of-text token), "stop" (a stop text), "length".
    - refills: how often the context was full and generation continued with the second half of it.
    """

    continuation: str
    token_ids: list[int]
    finish_reason: str
    refills: int

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids)


def sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    num_return_sequences: int = 1,
) -> list[str]:
    """Each prompt with its continuation, `num_return_sequences` texts per prompt, in order.

    A text depends on the weights, its prompt, the options and the seed, and on nothing else: not on the other prompts
    and not on the global random state, which is restored, as is the training mode of each module. The prompt ""
    begins a new text. Raises UserError for impossible options and for a prompt that does not fit into the context.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, num_return_sequences)
    return [
        prompt + completion.continuation
        for prompt in prompts
        for completion in complete(model, tokenizer, prompt_ids(model, tokenizer, prompt), sampling, seed)
    ]


def prompt_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt; an empty prompt becomes the token that texts begin with.

    Raises UserError if the prompt fills the whole context or has characters without an id, and for "" if the
    tokenizer has no token to begin a text with.
    """
    try:
        ids: list[int] = list(tokenizer(prompt)["input_ids"]) if prompt else []
    except Exception as error:  # the tokenizers library raises a bare Exception if there is no unknown token
        raise UserError(f"the prompt {prompt!r} has characters that the tokenizer does not know") from error
    if not ids:
        # documents end with the end-of-text token, so a new one begins after it
        first_id = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
        ids = [first_id] if first_id is not None else list(tokenizer("\n", add_special_tokens=False)["input_ids"])
        if not ids:
            raise UserError("the tokenizer has no token to begin a text with; give a prompt")
    limit = context_length(model)
    if limit is not None and len(ids) >= limit:
        raise UserError(
            f"the prompt has {len(ids)} tokens, but the context holds {limit} and the answer needs room in it; "
            "give a shorter prompt"
        )
    return ids


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence in tokens that the model can process; None if it has no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None else int(limit)


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    sampling: Sampling,
    seed: int,
    streamer: BaseStreamer | None = None,
) -> list[Completion]:
    """Continue one prompt, given as token ids, `sampling.num_return_sequences` times.

    If the context is full before a text is complete, generation continues with the second half of the context as the
    prompt (`Completion.refills` counts how often).
    """
    end_ids = end_of_text_ids(model, tokenizer)
    limit = context_length(model)
    stop_criterion = _stop_criterion(tokenizer, sampling.stop)
    sequences = [_Sequence() for _ in range(sampling.num_return_sequences)]
    with seeded(seed, model.device), evaluating(model), torch.no_grad():
        while unfinished := [sequence for sequence in sequences if sequence.finish_reason is None]:
            new_tokens = len(unfinished[0].new_ids)  # the same for all unfinished sequences
            total = len(prompt) + new_tokens
            window = total if limit is None or total < limit else limit // 2
            if stop_criterion is not None:
                stop_criterion.prompt_length = max(0, window - new_tokens)
            remaining = sampling.max_new_tokens - new_tokens
            generated = _generate(
                model,
                tokenizer,
                [(prompt + sequence.new_ids)[-window:] for sequence in unfinished],
                remaining if limit is None else min(remaining, limit - window),
                sampling,
                end_ids,
                stop_criterion,
                streamer,
            )
            for sequence, new_ids in zip(unfinished, generated, strict=True):
                if window < total:
                    sequence.refills += 1
                sequence.new_ids += new_ids
                stop_length = _length_until_stop(tokenizer, prompt, sequence.new_ids, sampling.stop)
                # `generate` pads a row that stops before the others
                sequence.new_ids = sequence.new_ids[:stop_length]
                if sequence.new_ids[-1] in end_ids:
                    sequence.finish_reason = "end"
                elif stop_length is not None:
                    sequence.finish_reason = "stop"
                elif len(sequence.new_ids) >= sampling.max_new_tokens:
                    sequence.finish_reason = "length"
    return [_completion(tokenizer, prompt, sequence, sampling.stop) for sequence in sequences]


@dataclass
class _Sequence:
    """A continuation while it is generated; see `Completion`."""

    new_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    refills: int = 0


def _completion(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], sequence: _Sequence, stop: tuple[str, ...]
) -> Completion:
    """The result for a finished sequence."""
    assert sequence.finish_reason is not None
    continuation = _new_text(tokenizer, prompt, sequence.new_ids, skip_special_tokens=True)
    if sequence.finish_reason == "stop":
        continuation = continuation[: first_stop(continuation, stop)]
    return Completion(continuation, sequence.new_ids, sequence.finish_reason, sequence.refills)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    end_ids: list[int],
    stop_criterion: "StopTexts | None",
    streamer: BaseStreamer | None,
) -> list[list[int]]:
    """New ids after each window (all windows have the same length), up to and including an end-of-text token."""
    inputs = torch.tensor(windows, device=model.device)  # [N, T]
    # ids that the tokenizer does not have, which only round the vocabulary size up
    unused_ids = list(range(len(tokenizer), getattr(model.config, "vocab_size", 0)))
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = end_ids[0] if end_ids else 0
    options: dict[str, Any] = {}
    if stop_criterion is not None:
        options["stopping_criteria"] = StoppingCriteriaList([stop_criterion])
    if streamer is not None:
        options["streamer"] = streamer
    if has_fast_decoding(model):
        options["custom_generate"] = partial(decode_on_cpu, streamer=streamer)  # `generate` does not pass it on
    # PreTrainedModel does not declare `generate`: the classes that can generate inherit it from GenerationMixin
    output: Tensor = cast(Any, model).generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=end_ids or None,
            pad_token_id=padding,
            suppress_tokens=unused_ids or None,
            use_cache=True,
            **sampling.generate_options(),
        ),
        **options,
    )
    rows = []
    for row in output[:, inputs.shape[1] :].tolist():
        length = next((position + 1 for position, token in enumerate(row) if token in end_ids), len(row))
        rows.append(row[:length])
    return rows


class StopTexts(StopStringCriteria):
    """Ends a row of `generate` when its new tokens complete a stop text.

    transformers' criterion searches the prompt as well, so a prompt that ends like the beginning of a stop text could
    end the answer with its first token.
    """

    prompt_length = 0  # tokens of the input that are not new

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Tensor:
        return super().__call__(input_ids[:, self.prompt_length :], scores, **kwargs)


def _stop_criterion(tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> StopTexts | None:
    """The criterion for these stop texts; None if there are none or transformers cannot prepare them.

    Without it rows are generated in full and cut at their stop texts afterwards.
    """
    try:
        return StopTexts(tokenizer, list(stop)) if stop else None
    except Exception:
        # ValueError if no token can end a stop text; a bare Exception of the tokenizers library if the vocabulary
        # lacks the letters a to f, which transformers encodes for its own use
        return None


def first_stop(text: str, stop: Iterable[str]) -> int | None:
    """The position of the first stop text in `text`; None if there is none."""
    positions = [position for position in map(text.find, stop) if position >= 0]
    return min(positions, default=None)


def final_text(text: str, stop: Iterable[str]) -> str:
    """The part of a growing text that more tokens cannot change.

    It ends before the first stop text, before an end that may become a stop text, and before an incomplete character.
    """
    stop = tuple(stop)
    stop_position = first_stop(text, stop)
    if stop_position is not None:
        return text[:stop_position]
    text = text.rstrip(INCOMPLETE_CHARACTER)
    beginnings = (ending[:length] for ending in stop for length in range(1, len(ending)))
    held_back = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
    return text[: len(text) - held_back]


def _length_until_stop(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], new_ids: list[int], stop: tuple[str, ...]
) -> int | None:
    """How many of the new tokens complete the first stop text; None if there is no stop text."""

    def has_stop(length: int) -> bool:
        text = _new_text(tokenizer, prompt, new_ids[:length], skip_special_tokens=False)
        return first_stop(text, stop) is not None

    if not stop or not has_stop(len(new_ids)):
        return None
    return bisect_left(range(len(new_ids)), True, key=has_stop)


def _new_text(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], new_ids: list[int], *, skip_special_tokens: bool
) -> str:
    """The text of the new tokens, decoded together with the prompt, since some tokenizers drop a first space."""
    prompt_text = decode(tokenizer, prompt, skip_special_tokens=skip_special_tokens)
    text = decode(tokenizer, prompt + new_ids, skip_special_tokens=skip_special_tokens)
    if text.startswith(prompt_text):
        return text[len(prompt_text) :]
    return decode(tokenizer, new_ids, skip_special_tokens=skip_special_tokens)  # the prompt ended within a character


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of one sequence of ids."""
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


def end_of_text_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a text: those of the model's generation config and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return [token for token in dict.fromkeys([*ids, tokenizer.eos_token_id]) if token is not None]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random numbers of the CPU and of `device` inside the block; afterwards their states are restored."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield
