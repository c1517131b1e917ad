"""Laws of a conversation: what its prompt is, when turns are dropped from it, and that an answer is reproducible."""

import random
from itertools import pairwise

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer

from minigpt.generation.conversation import Conversation
from minigpt.generation.sampling import Sampling
from minigpt.utils.errors import UserError
from modeling_minigpt import MiniGPTForCausalLM
from support.tiny import byte_tokenizer, letter_tokenizer, tiny_model

CONTEXT = 96
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
STRICT_TEMPLATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate,\nand begin with user') }}{% endif %}{% endfor %}" + TEMPLATE
)
GREEDY = Sampling(8, temperature=0)


def byte_chat_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_chat_tokenizer()


@pytest.fixture(scope="module")
def model() -> MiniGPTForCausalLM:
    return tiny_model(max_position_embeddings=CONTEXT)


@pytest.mark.parametrize("system_prompt", [None, "be brief"])
@pytest.mark.parametrize("kind", ["minigpt", "llama"])
def test_greedy_answers_are_those_of_the_pipeline_of_transformers(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, kind: str, system_prompt: str | None
) -> None:
    if kind == "llama":
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = LlamaConfig(vocab_size=257, max_position_embeddings=CONTEXT, initializer_range=0.5, **shape)
        model = AutoModelForCausalLM.from_config(config).eval()
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    conversation = Conversation(model, tokenizer, system_prompt)
    for question in ("hello", "and then?"):
        asked = [*conversation.messages, {"role": "user", "content": question}]
        (expected,) = answer(asked, max_new_tokens=8, do_sample=False)
        conversation.ask(question, GREEDY, seed=0)
        content = expected["generated_text"][-1]["content"].strip()
        assert conversation.messages == [*asked, {"role": "assistant", "content": content}]


@pytest.mark.parametrize("system_prompt", [None, "be brief"])
def test_prompt_is_the_system_prompt_and_the_most_turns_that_leave_room(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, system_prompt: str | None
) -> None:
    conversation = Conversation(model, tokenizer, system_prompt)
    system = conversation.messages.copy()
    letters = random.Random(0)
    turns: list[list[dict[str, str]]] = []
    for number in range(12):
        text = "".join(letters.choices("abc ", k=letters.randrange(1, 20)))
        turns.append([{"role": "user", "content": f"{number}{text}"}])
        conversation.messages.append(turns[-1][0])
        prompt, dropped_turns = conversation.prompt(max_new_tokens=10)

        def render(first: int) -> list[int]:
            messages = [*system, *(message for turn in turns[first:] for message in turn)]
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

        assert prompt == render(dropped_turns)
        assert len(prompt) + 10 <= CONTEXT
        if dropped_turns:
            assert len(render(dropped_turns - 1)) + 10 > CONTEXT
        turns[-1].append({"role": "assistant", "content": text.upper()})
        conversation.messages.append(turns[-1][1])
    assert dropped_turns > 5
    assert conversation.messages == system + [message for turn in turns for message in turn]


def test_answer_in_a_long_conversation_is_that_of_the_turns_that_fit(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampling = Sampling(8, temperature=0.9, top_p=0.9)
    long, short = Conversation(model, tokenizer, "sys"), Conversation(model, tokenizer, "sys")
    for number in range(9):
        last = long.ask(f"question {number}", sampling, seed=number)
    assert long.dropped_turns
    short.messages += long.messages[1 + 2 * long.dropped_turns : -2]
    assert short.ask("question 8", sampling, seed=8) == last
    assert short.messages[1:] == long.messages[1 + 2 * long.dropped_turns :]


@pytest.mark.parametrize("context", [16, 40, 64])
def test_a_conversation_of_any_length_stays_within_the_context(
    context: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, numbers = tiny_model(max_position_embeddings=context), random.Random(context)
    lengths: list[int] = []

    class Counter(BaseStreamer):
        def put(self, value: Tensor) -> None:  # the prompt, then each new token
            lengths[-1] += value.numel()

        def end(self) -> None:
            pass

    conversation = Conversation(model, tokenizer, numbers.choice([None, "s"]))
    longest = context - context // 4 - len("s:s\nu:\na:")
    for number in range(12):
        before = conversation.messages.copy()
        question = "x" * numbers.randrange(1, longest + 1)
        sampling = Sampling(numbers.choice([1, 5, 300]), temperature=1.0)
        lengths.append(0)
        completion = conversation.ask(question, sampling, number, Counter())
        assert conversation.messages[: len(before) + 1] == [*before, {"role": "user", "content": question}]
        assert completion.refills == 0
        if completion.finish_reason == "length" and completion.new_tokens < sampling.max_new_tokens:
            assert lengths[-1] == context
    assert max(lengths) == context


def test_question_beyond_the_context_is_refused_and_not_kept(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    conversation = Conversation(model, tokenizer, "sys")
    conversation.ask("a", GREEDY, seed=0)
    messages = conversation.messages.copy()
    most = CONTEXT - 8 - len("s:sys\nu:\na:")
    with pytest.raises(UserError, match=rf"has {CONTEXT - 7} tokens, but the context holds {CONTEXT} and 8 of them"):
        conversation.ask("x" * (most + 1), GREEDY, seed=0)
    assert conversation.messages == messages
    conversation.ask("x" * most, GREEDY, seed=0)
    assert conversation.dropped_turns == 1


def test_undo_restores_the_messages(model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation(model, tokenizer, "sys")
    states = [conversation.messages.copy()]
    for number in range(5):
        conversation.ask(f"question {number}", GREEDY, seed=0)
        states.append(conversation.messages.copy())
    for number, state in reversed(list(enumerate(states[:-1]))):
        assert conversation.undo() == f"question {number}"
        assert conversation.messages == state
    with pytest.raises(UserError, match="no question"):
        conversation.undo()


def test_same_messages_and_seed_give_the_same_answer(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    def answers(conversation: Conversation, seed: int) -> str:
        for number in range(3):
            conversation.ask(f"q{number}", Sampling(8), seed + number)
        return str(conversation.messages)

    first = answers(Conversation(model, tokenizer), 5)
    assert answers(Conversation(model, tokenizer), 5) == first
    assert answers(Conversation(model, tokenizer), 6) != first


def test_system_prompt_can_be_set_changed_and_removed(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    conversation = Conversation(model, tokenizer)
    conversation.ask("a", GREEDY, seed=0)
    turn = conversation.messages.copy()
    for text in ("one", "two", None, "three"):
        conversation.system_prompt = text
        assert conversation.system_prompt == text
        assert conversation.messages == [{"role": "system", "content": text}] * (text is not None) + turn
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "three"}]


def test_exception_of_a_streamer_leaves_the_messages_alone(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    class Interrupt:
        def put(self, value: object) -> None:
            raise KeyboardInterrupt

    conversation = Conversation(model, tokenizer, "sys")
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("a", GREEDY, 0, Interrupt())
    assert conversation.messages == [{"role": "system", "content": "sys"}]


def test_what_the_template_or_tokenizer_refuses_is_one_line(model: MiniGPTForCausalLM) -> None:
    conversation = Conversation(model, byte_chat_tokenizer(STRICT_TEMPLATE), "sys")
    with pytest.raises(UserError, match=r"this conversation: roles must alternate, and begin with user$"):
        conversation.ask("a", GREEDY, seed=0)
    letters = letter_tokenizer("abu:\n")
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        Conversation(tiny_model(vocab_size=5), letters)
    letters.chat_template = TEMPLATE
    conversation = Conversation(tiny_model(vocab_size=5), letters)
    conversation.ask("ab", GREEDY, seed=0)
    with pytest.raises(UserError, match="cannot write this conversation"):
        conversation.ask("x", GREEDY, seed=0)
    assert len(conversation.messages) == 2


def test_dropped_turns_keep_the_roles_alternating(model: MiniGPTForCausalLM) -> None:
    conversation = Conversation(model, byte_chat_tokenizer(STRICT_TEMPLATE))
    for number in range(9):
        conversation.ask(f"question {number}", GREEDY, seed=0)
    assert conversation.dropped_turns
    roles = [message["role"] for message in conversation.messages]
    assert all(role != following for role, following in pairwise(roles))
