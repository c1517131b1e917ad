"""Laws of chat templates: what they write is read back by transformers, and the loss is on the assistant's words."""

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minigpt.config.arguments import DataArguments
from minigpt.data.chat_template import NAMES, end_of_turn_id, read_chat_template, set_chat_template
from minigpt.data.prepare import prepare
from minigpt.data.shards import IN_LOSS, open_shards
from minigpt.data.tokenizer import END_OF_TEXT, load_tokenizer, train_bpe, train_characters
from minigpt.utils.errors import UserError

WORDS = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "tis", "nobler", "in", "mind"]


def conversation(seed: int) -> list[dict[str, str]]:
    choose = random.Random(seed)
    texts = [" ".join(choose.choices(WORDS, k=choose.randint(1, 6))) for _ in range(2 * choose.randint(1, 3))]
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return [{"role": "system", "content": "Be brief."}, *messages] if choose.random() < 0.5 else messages


def written(tmp_path: Path, conversations: list[list[dict[str, str]]]) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["bpe", "char", "folder"])
def test_the_loss_is_on_the_words_that_the_assistant_says_and_on_the_end_of_its_turns(
    tmp_path: Path, name: str, kind: str
) -> None:
    conversations = [conversation(seed) for seed in range(12)]
    if kind == "folder":
        train_bpe(WORDS, 300).save_pretrained(tmp_path / "tokenizer")
    tokenizer_option = str(tmp_path / "tokenizer") if kind == "folder" else kind
    options = {"tokenizer": tokenizer_option, "tokenizer_vocab_size": 300, "chat_template": name}
    path = written(tmp_path, conversations)
    folder = prepare(DataArguments(train_file=[path], validation_file=[path], **options), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    end_of_turn = tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))
    assert end_of_turn == {"chatml": "<|im_end|>", "plain": END_OF_TEXT}[name]
    tokens = open_shards(folder).train
    in_loss = tokens.marks(0, len(tokens)) & IN_LOSS > 0
    learned = tokenizer.decode(tokens.read(0, len(tokens))[in_loss].tolist())
    answers = [turn["content"] for messages in conversations for turn in messages if turn["role"] == "assistant"]
    assert learned == "".join(answer + end_of_turn for answer in answers)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_the_beginning_of_the_conversation_that_was_trained_on(name: str) -> None:
    tokenizer = train_bpe(WORDS, 300)
    set_chat_template(tokenizer, read_chat_template(name))
    for seed in range(20):
        messages = conversation(seed)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert tokenizer.apply_chat_template(messages, return_dict=False)[: len(prompt)] == prompt


def test_a_template_adds_its_control_tokens_once_and_keeps_every_id() -> None:
    tokenizer, before = train_bpe(WORDS, 300), train_bpe(WORDS, 300)
    template = read_chat_template("chatml")
    assert set_chat_template(tokenizer, template) == ["<|im_start|>", "<|im_end|>"]
    assert set_chat_template(tokenizer, template) == []
    assert tokenizer("to be or not")["input_ids"] == before("to be or not")["input_ids"]
    assert len(tokenizer) == len(before) + 2
    assert tokenizer.eos_token == END_OF_TEXT
    assert set_chat_template(before, read_chat_template("plain")) == []


def test_a_template_comes_from_a_file_or_another_tokenizer(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
    other = train_bpe(WORDS, 300)
    assert set_chat_template(other, template) == ["<|system|>", "<|end|>", "<|user|>", "<|assistant|>"]
    other.save_pretrained(tmp_path / "other")
    assert read_chat_template(str(tmp_path / "chat.jinja")) == read_chat_template(str(tmp_path / "other")) == template
    assert end_of_turn_id(other) == other.convert_tokens_to_ids("<|end|>")


def saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_conversation_keeps_the_template_of_a_tokenizer_that_has_one(tmp_path: Path) -> None:
    tokenizer = train_bpe(WORDS, 300)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    rows = written(tmp_path, [conversation(0)] * 2)
    args = DataArguments(train_file=[rows], tokenizer=saved(tokenizer, tmp_path / "own"))
    prepared = load_tokenizer(prepare(args, tmp_path / "out") / "tokenizer")
    assert prepared.chat_template == tokenizer.chat_template
    assert len(prepared) == len(tokenizer)
    replaced = prepare(args.with_values(chat_template="plain"), tmp_path / "replaced")
    assert load_tokenizer(replaced / "tokenizer").chat_template == read_chat_template("plain")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('no conversations today') }}",
            "chat_template: the chat template fails: no conversations",
        ),
        ("{% for m in messages %}{{ m.content }}", "the chat template fails: Unexpected end of template"),
        (" \n", "is an empty file"),
    ],
)
def test_a_template_that_cannot_write_a_conversation_is_refused_and_leaves_nothing(
    tmp_path: Path, template: str, message: str
) -> None:
    (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
    rows = written(tmp_path, [conversation(0)] * 2)
    args = DataArguments(train_file=[rows], tokenizer="bpe", chat_template=str(tmp_path / "chat.jinja"))
    with pytest.raises(UserError, match=message) as error:
        prepare(args, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert {file.name for file in tmp_path.iterdir()} == {"chat.jinja", "rows.jsonl"}


def test_a_name_that_is_no_template_is_refused_with_the_choices(tmp_path: Path) -> None:
    no_template = saved(train_characters(WORDS), tmp_path / "characters")
    with pytest.raises(UserError, match="this tokenizer has no chat template; try chatml or plain"):
        read_chat_template(no_template)
    with pytest.raises(UserError, match=r"chat_template=\./chatmll is none of chatml, plain, a Jinja file"):
        read_chat_template("./chatmll")
