"""Laws of generated texts: what they depend on, and where they end."""

import random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from minigpt.data.tokenizer import train_bpe
from minigpt.generation.interactive import ContinuationPrinter
from minigpt.generation.sampling import (
    Completion,
    Sampling,
    complete,
    final_text,
    first_stop,
    prompt_ids,
    sample_text,
)
from modeling_minigpt import MiniGPTForCausalLM
from support.tiny import CONTEXT, byte_tokenizer, letter_tokenizer, tiny_model

# transformers' stop strings need the letters a to f in the vocabulary; without them texts are cut afterwards
LETTERS = ["abcdefgh", "ACGT"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def model() -> MiniGPTForCausalLM:
    return tiny_model()


def test_sample_depends_on_the_seed_alone(model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        texts.append(sample_text(model, tokenizer, ["a", "bc"], max_new_tokens=12, seed=7))
    assert texts[0] == texts[1]
    assert sample_text(model, tokenizer, ["bc"], max_new_tokens=12, seed=7) == texts[0][1:]
    assert sample_text(model, tokenizer, ["a", "bc"], max_new_tokens=12, seed=8) != texts[0]


def test_sampling_restores_random_state_and_training_modes(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model().train()
    model.transformer.layers[1].eval()
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    sample_text(model, tokenizer, ["a"], max_new_tokens=4, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_greedy_sample_takes_the_most_likely_token_each_time(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = prompt_ids(model, tokenizer, "hello")
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    (completion,) = complete(model, tokenizer, ids[:5], Sampling(max_new_tokens=8, temperature=0), seed=0)
    assert completion.token_ids == ids[5:]
    assert completion.continuation == tokenizer.decode(ids[5:])


def test_empty_prompt_begins_a_text(model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert prompt_ids(model, tokenizer, "") == [tokenizer.eos_token_id]
    without_special_tokens = byte_tokenizer()  # a text begins as a line does
    assert without_special_tokens.decode(prompt_ids(model, without_special_tokens, "")) == "\n"


def test_several_sequences_come_in_order_of_prompts(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = sample_text(model, tokenizer, ["x", "y"], max_new_tokens=6, num_return_sequences=3)
    assert [text[0] for text in texts] == list("xxxyyy")
    assert len(set(texts[:3])) > 1


def test_full_context_continues_with_its_second_half(model: MiniGPTForCausalLM) -> None:
    sampling = Sampling(max_new_tokens=3 * CONTEXT, temperature=0)
    endless = byte_tokenizer()  # no token ends a text
    ids = prompt_ids(model, endless, "abc")
    (completion,) = complete(model, endless, ids, sampling, seed=0)
    assert completion.new_tokens == 3 * CONTEXT
    assert completion.finish_reason == "length"
    # 32 - 3 tokens fit at first, then 16 after each refill: 29 + 5 * 16 >= 96
    assert completion.refills == 5
    last_half = completion.token_ids[29 - CONTEXT // 2 : 29]
    for _ in range(CONTEXT // 2):
        last_half.append(int(model(torch.tensor([last_half])).logits[0, -1].argmax()))
    assert completion.token_ids[29 : 29 + CONTEXT // 2] == last_half[CONTEXT // 2 :]


def test_end_of_text_ends_a_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    with torch.no_grad():  # the last norm gives one constant vector, which makes the end the most likely token
        model.transformer.norm.weight.zero_()
        model.transformer.norm.bias.copy_(10 * model.transformer.embed_tokens.weight[0])
    (completion,) = complete(model, tokenizer, [5], Sampling(8, temperature=0), seed=0)
    assert (completion.finish_reason, completion.token_ids, completion.continuation) == ("end", [0], "")


def test_ids_beyond_the_tokenizer_are_never_generated(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(vocab_size=1024)  # three of four ids are not a token
    (completion,) = complete(model, tokenizer, [5], Sampling(CONTEXT - 2), seed=0)
    assert 0 < completion.new_tokens < CONTEXT
    assert max(completion.token_ids) < len(tokenizer)


def generate(letters: str, prompt: str, sampling: Sampling, seed: int = 1) -> list[Completion]:
    tokenizer, model = letter_tokenizer(letters), tiny_model(vocab_size=len(letters))
    return complete(model, tokenizer, prompt_ids(model, tokenizer, prompt), sampling, seed)


@pytest.mark.parametrize("letters", LETTERS)
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_text_with_a_stop_is_the_free_text_cut_there(letters: str, length: int) -> None:
    prompt = letters[:3]
    (free,) = generate(letters, prompt, Sampling(2 * CONTEXT))
    # the context is refilled after 29 and 45 tokens: some of these stop texts span a refill
    for start in (0, 27, 28, 29, 43, 44):
        stop = free.continuation[start : start + length]
        (stopped,) = generate(letters, prompt, Sampling(2 * CONTEXT, stop=(stop, "zz")))
        assert stopped.finish_reason == "stop"
        assert stopped.continuation == free.continuation.partition(stop)[0]
        assert stopped.new_tokens == len(stopped.continuation) + length
        assert stopped.token_ids == free.token_ids[: stopped.new_tokens]


@pytest.mark.parametrize("letters", LETTERS)
def test_each_sequence_of_a_batch_ends_at_its_own_stop(letters: str) -> None:
    free = generate(letters, letters[:2], Sampling(24, num_return_sequences=5))
    stop = free[2].continuation[3:5]
    stopped = generate(letters, letters[:2], Sampling(24, num_return_sequences=5, stop=(stop,)))
    assert [one.continuation for one in stopped] == [one.continuation.partition(stop)[0] for one in free]
    assert [one.finish_reason for one in stopped] == ["stop" if stop in one.continuation else "length" for one in free]
    assert len({one.new_tokens for one in stopped}) > 1


@pytest.mark.parametrize("letters", LETTERS)
def test_stop_text_that_begins_in_the_prompt_does_not_count(letters: str) -> None:
    prompt = letters[:3]
    (free,) = generate(letters, prompt, Sampling(12))
    stop = prompt[-1] + free.continuation[0]
    (stopped,) = generate(letters, prompt, Sampling(12, stop=(stop,)))
    assert stopped.continuation == free.continuation.partition(stop)[0] != ""


def test_stop_text_may_begin_and_end_within_tokens_and_ends_the_generation_at_once() -> None:
    answer = "naïve café au lait, and more and more and more"
    tokenizer = train_bpe([answer] * 3, 320)
    ids = tokenizer(answer)["input_ids"]
    assert " café" in [tokenizer.decode([token]) for token in ids]
    steps = iter(ids)

    def force_the_answer(module: object, inputs: object, logits: torch.Tensor) -> torch.Tensor:
        logits = torch.full_like(logits, -100.0)
        logits[..., next(steps)] = 100.0
        return logits

    model = tiny_model(vocab_size=len(tokenizer))
    model.lm_head.register_forward_hook(force_the_answer)
    (completion,) = complete(model, tokenizer, [5], Sampling(len(ids), temperature=0, stop=("fé a",)), seed=0)
    assert completion.continuation == "naïve ca"
    assert completion.finish_reason == "stop"
    assert next(steps) == ids[completion.new_tokens]  # no forward pass came after the stop text


@pytest.mark.parametrize("stop", [("ab",), ("abab", "c"), ("aab", "ba"), ()])
def test_final_text_only_grows_and_ends_at_the_stop(stop: tuple[str, ...]) -> None:
    letters = random.Random(0)
    for _ in range(50):
        text, printed = "", ""
        while first_stop(text, stop) is None and len(text) < 12:
            text += letters.choice("abc")
            final = final_text(text, stop)
            assert final.startswith(printed)
            printed = final
        end = first_stop(text, stop)
        if end is not None:
            assert printed == text[:end]
        else:
            assert len(text) - len(printed) < max(map(len, stop), default=1)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_printed_text_is_the_continuation_without_the_stop(length: int, capsys: pytest.CaptureFixture[str]) -> None:
    letters, model = letter_tokenizer("abcdefgh"), tiny_model(vocab_size=8)
    ids = prompt_ids(model, letters, "abc")
    (free,) = complete(model, letters, ids, Sampling(2 * CONTEXT), seed=1)
    for start in (5, 28):
        stop = (free.continuation[start : start + length],)
        printer = ContinuationPrinter(letters, stop)
        (stopped,) = complete(model, letters, ids, Sampling(2 * CONTEXT, stop=stop), 1, printer)
        before_the_end = capsys.readouterr().out
        printer.finish()
        assert before_the_end + capsys.readouterr().out == stopped.continuation + "\n"
        assert before_the_end == stopped.continuation
        assert printer.token_ids == stopped.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": float("nan")}, "temperature=nan must not be negative"),
        ({"top_k": -5}, "top_k=-5 must not be negative"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"num_return_sequences": 0}, "num_return_sequences=0 must be at least 1"),
        ({"temperature": 0.0, "num_return_sequences": 2}, "always gives the same text"),
        ({"stop": ("",)}, "must not be empty"),
    ],
)
def test_impossible_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_new_tokens": 1} | options)


def test_prompt_longer_than_the_context_is_refused_with_both_numbers(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=r"the prompt has 40 tokens, but the context holds 32"):
        sample_text(model, tokenizer, ["x" * 40], max_new_tokens=1)
