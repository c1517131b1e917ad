"""Generate text from prompts.

Shapes: N sequences of one prompt, T tokens so far.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from minigpt.modeling.loading import evaluating
from minigpt.utils.errors import UserError

DEFAULT_MAX_NEW_TOKENS = 200


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises UserError that lists every value that cannot be.

    temperature divides the logits; 0 takes the likeliest token always. top_k keeps the k likeliest tokens, top_p the
    fewest whose probabilities add up to p; None keeps all. stop: texts that end a sequence, and are left out of it.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    num_return_sequences: int = 1
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
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

    def options(self) -> dict[str, Any]:
        """The choice in the words of `model.generate`."""
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
    """One continuation of one prompt. `finish_reason` is "end" (end-of-text token), "stop" (a stop text), "length"."""

    continuation: str
    new_tokens: int
    finish_reason: str
    refills: int  # times the context was full and generation went on with its latter half


def sample_text(
    model: Any,
    tokenizer: Any,
    prompts: Iterable[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    num_return_sequences: int = 1,
) -> list[str]:
    """Each prompt with its continuation, `num_return_sequences` a prompt, in order.

    A text is a function of (weights, prompt, options, seed) alone: neither the other prompts nor the global random
    state matter, and that state and every module's training mode are afterwards what they were. The prompt "" starts
    at the beginning of a text. Raises UserError on options that cannot be and on a prompt longer than the context.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, num_return_sequences)
    return [
        prompt + completion.continuation
        for prompt in prompts
        for completion in complete(model, tokenizer, prompt_ids(model, tokenizer, prompt), sampling, seed)
    ]


def prompt_ids(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt; an empty one becomes the token that texts begin with.

    Raises UserError for a prompt that fills the whole context or has characters that the tokenizer has no id for,
    and for "" where there is no such token.
    """
    try:
        ids: list[int] = list(tokenizer(prompt)["input_ids"]) if prompt else []
    except Exception as error:  # a bare Exception from Rust, for a vocabulary without an unknown token
        raise UserError(f"the prompt {prompt!r} has characters that the tokenizer does not know") from error
    if not ids:
        # documents end with the end-of-text token, so after it a new one begins
        begin = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
        ids = [begin] if begin is not None else list(tokenizer("\n", add_special_tokens=False)["input_ids"])
        if not ids:
            raise UserError("the tokenizer has no token to begin a text with; give a prompt")
    limit = context_length(model)
    if limit is not None and len(ids) >= limit:
        raise UserError(
            f"the prompt has {len(ids)} tokens, but the context holds {limit} and the answer needs room in it; "
            "give a shorter prompt"
        )
    return ids


def context_length(model: Any) -> int | None:
    """The longest sequence in tokens that the model can see, None where it has no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None else int(limit)


def complete(
    model: Any, tokenizer: Any, ids: list[int], sampling: Sampling, seed: int, streamer: Any = None
) -> list[Completion]:
    """Continue one prompt, given as token ids, `sampling.num_return_sequences` times.

    When the context is full before the text is complete, generation goes on with the latter half of it as the
    prompt (`Completion.refills` counts how often).
    """
    import torch

    end_ids = end_of_text_ids(model, tokenizer)
    limit = context_length(model)
    rows = [list(ids) for _ in range(sampling.num_return_sequences)]
    reasons = ["length"] * len(rows)
    refills = [0] * len(rows)
    unfinished = list(range(len(rows)))
    with seeded(seed, model.device), evaluating(model), torch.no_grad():
        while unfinished:
            length = len(rows[unfinished[0]])  # rows that are not finished are all as long as each other
            to_go = sampling.max_new_tokens - (length - len(ids))
            window = length if limit is None or length < limit else limit // 2
            if window < length:
                for row in unfinished:
                    refills[row] += 1
            new_rows = _generate(
                model,
                tokenizer,
                [rows[row][-window:] for row in unfinished],
                to_go if limit is None else min(to_go, limit - window),
                sampling,
                end_ids,
                already=[tokenizer.decode(rows[row][len(ids) :]) for row in unfinished] if sampling.stop else [],
                streamer=streamer,
            )
            still = []
            for row, new_ids in zip(unfinished, new_rows, strict=True):
                rows[row] += new_ids
                if rows[row][-1] in end_ids:
                    reasons[row] = "end"
                elif first_stop(tokenizer.decode(rows[row][len(ids) :]), sampling.stop) is not None:
                    reasons[row] = "stop"
                elif len(rows[row]) - len(ids) < sampling.max_new_tokens:
                    still.append(row)
            unfinished = still
    return [
        _completion(tokenizer, ids, row, reason, times, sampling.stop)
        for row, reason, times in zip(rows, reasons, refills, strict=True)
    ]


def _generate(
    model: Any,
    tokenizer: Any,
    windows: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    end_ids: list[int],
    already: list[str],
    streamer: Any,
) -> list[list[int]]:
    """New ids after each window (all equally long), each row cut behind its end-of-text token."""
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    inputs = torch.tensor(windows, device=model.device)  # [N, T]
    extra: dict[str, Any] = {}
    if sampling.stop:
        stop_at = _StopTexts(tokenizer, sampling.stop, inputs.shape[1], already)
        extra["stopping_criteria"] = StoppingCriteriaList([stop_at])
    if streamer is not None:
        extra["streamer"] = streamer
    # ids beyond the tokenizer only round the vocabulary up: no text has such a token
    no_tokens = list(range(len(tokenizer), getattr(model.config, "vocab_size", 0)))
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = end_ids[0] if end_ids else 0
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=end_ids or None,
            pad_token_id=padding,
            suppress_tokens=no_tokens or None,
            use_cache=True,
            **sampling.options(),
        ),
        **extra,
    )
    rows = []
    for row in output[:, inputs.shape[1] :].tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in end_ids), len(row))
        rows.append(row[:end])
    if sampling.stop:  # a row that stopped at a text was filled up while others went on
        rows = [row[:length] for row, length in zip(rows, stop_at.lengths(rows), strict=True)]
    return rows


class _StopTexts:
    """Ends a row of `generate` when its new text holds one of the stop texts."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], prompt_tokens: int, already: list[str]) -> None:
        self.tokenizer, self.stop, self.prompt_tokens, self.already = tokenizer, stop, prompt_tokens, already
        self.stopped_at: dict[int, int] = {}

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        for row, ids in enumerate(input_ids[:, self.prompt_tokens :].tolist()):
            if row not in self.stopped_at:
                text = self.already[row] + self.tokenizer.decode(ids)
                if first_stop(text, self.stop) is not None:
                    self.stopped_at[row] = len(ids)
        done = [row in self.stopped_at for row in range(input_ids.shape[0])]
        return torch.tensor(done, device=input_ids.device)

    def lengths(self, rows: list[list[int]]) -> list[int]:
        return [self.stopped_at.get(row, len(ids)) for row, ids in enumerate(rows)]


def first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first stop text begins in `text`, None when there is none."""
    places = [place for place in (text.find(ending) for ending in stop) if place >= 0]
    return min(places, default=None)


def _completion(
    tokenizer: Any, ids: list[int], row: list[int], reason: str, refills: int, stop: tuple[str, ...]
) -> Completion:
    prompt = tokenizer.decode(ids, skip_special_tokens=True)
    text = tokenizer.decode(row, skip_special_tokens=True)
    # decoded in one piece, since a character may begin in the prompt's last token
    if text.startswith(prompt):
        continuation = text[len(prompt) :]
    else:
        continuation = tokenizer.decode(row[len(ids) :], skip_special_tokens=True)
    if reason == "stop":
        continuation = continuation[: first_stop(continuation, stop)]
    return Completion(continuation, len(row) - len(ids), reason, refills)


def end_of_text_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a text: the tokenizer's, and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return [token for token in dict.fromkeys([*ids, tokenizer.eos_token_id]) if token is not None]


@contextmanager
def seeded(seed: int, device: Any) -> Iterator[None]:
    """Random numbers that follow from `seed`, on the CPU and on `device`; afterwards the global state is as before."""
    import torch

    generators = [torch.random] if device.type == "cpu" else [torch.random, torch.get_device_module(device)]
    states = [generator.get_rng_state() for generator in generators]
    torch.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_rng_state(state)
