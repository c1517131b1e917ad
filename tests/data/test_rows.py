"""Laws of rows: every usual format gives the same conversation, and a row that is none is refused with its line."""

import json
from pathlib import Path

import datasets
import pytest

from minigpt.config.arguments import DataArguments
from minigpt.data.corpora import open_corpus
from minigpt.data.prepare import prepare
from minigpt.data.rows import Columns
from minigpt.data.shards import open_shards
from minigpt.utils.errors import UserError

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Translate.\n\nchat"},
    {"role": "assistant", "content": "cat"},
]
FORMATS = {
    "messages": {"messages": CONVERSATION, "prompt": "ignored", "id": 7},
    "completion": {"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:]},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Translate.\n\nchat"},
            {"from": "gpt", "value": "cat"},
        ]
    },
    "sharegpt with a system field": {
        "system": "Be brief.",
        "conversations": [{"from": "user", "value": "Translate.\n\nchat"}, {"from": "assistant", "value": "cat"}],
    },
    "alpaca": {"instruction": "Translate.", "input": "chat", "output": "cat", "system": "Be brief."},
}


def written(tmp_path: Path, rows: list[dict], name: str = "rows.jsonl") -> str:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(tmp_path / name)


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("storage", ["jsonl", "parquet", "arrow", "data set"])
def test_every_format_gives_the_same_conversation_from_every_kind_of_file(
    tmp_path: Path, row: dict, storage: str
) -> None:
    rows = [row, row | {"id": 8}]
    table = datasets.Dataset.from_list(rows)
    if storage == "jsonl":
        args = DataArguments(train_file=[written(tmp_path, rows)])
    elif storage == "parquet":
        table.to_parquet(tmp_path / "rows.parquet")
        args = DataArguments(train_file=[str(tmp_path / "rows.parquet")])
    else:
        table.save_to_disk(tmp_path / "set")
        shard = next((tmp_path / "set").glob("*.arrow"))
        args = DataArguments(
            **({"train_file": [str(shard)]} if storage == "arrow" else {"dataset_name": str(tmp_path / "set")})
        )
    corpus = open_corpus(args)
    assert corpus.is_conversational
    examples = [example for documents in (corpus.train, corpus.validation) for example, _ in documents.pieces()]
    assert [example.messages for example in examples] == [CONVERSATION] * 2


def test_an_alpaca_row_without_input_asks_its_instruction_alone() -> None:
    form = Columns("text").format_of(["instruction", "input", "output"])
    assert form is not None
    for nothing in ("", None):
        example = form.parse({"instruction": "Say hi.", "input": nothing, "output": "Hi."}, "row")
        assert example.messages == [
            {"role": "user", "content": "Say hi."},
            {"role": "assistant", "content": "Hi."},
        ]


def test_a_row_with_text_and_a_conversation_is_text_unless_a_chat_option_is_given(tmp_path: Path) -> None:
    path = written(tmp_path, [{"text": "a text of its own", "messages": CONVERSATION}] * 2)
    assert open_corpus(DataArguments(train_file=[path])).row_format is None
    for option in ({"chat_template": "plain"}, {"completion_only_loss": True}):
        assert open_corpus(DataArguments(train_file=[path], **option)).is_conversational


USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
BAD_ROWS = {
    "unknown role": (
        {"messages": [USER, ASSISTANT | {"role": "robot"}]},
        "message 2 has the role 'robot'; the roles are",
    ),
    "no role": ({"messages": [{"content": "hi"}, ASSISTANT]}, "message 1 has the role None"),
    "empty turn": ({"messages": [USER | {"content": " \n"}, ASSISTANT]}, r"message 1 \(user\) is empty"),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, r"message 2 \(assistant\) has no content"),
    "content in parts": ({"messages": [USER | {"content": [{"type": "text"}]}, ASSISTANT]}, "content of type list"),
    "two system messages": (
        {"messages": [{"role": "system", "content": "a"}] * 2 + [USER, ASSISTANT]},
        "message 2 is a system message; only the first",
    ),
    "late system message": (
        {"messages": [USER, {"role": "system", "content": "a"}, ASSISTANT]},
        "message 2 is a system message; only the first",
    ),
    "last turn by the user": ({"messages": [USER, ASSISTANT, USER]}, "the last message is by the user"),
    "no messages": ({"messages": []}, "a conversation without messages"),
    "a number": ({"messages": 3}, "a list of messages {role, content} is needed, not int"),
    "sharegpt of texts": ({"conversations": ["hi", "hello"]}, "'conversations' is not a list of {from, value}"),
    "unknown sharegpt role": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}]},
        "message 2 has the role 'observation'",
    ),
    "alpaca without an answer": ({"instruction": "a", "output": " "}, r"message 2 \(assistant\) is empty"),
    "alpaca with a list": ({"instruction": ["a"], "output": "b"}, "'instruction' and 'input' must be strings"),
    "completion by the user": ({"prompt": [USER], "completion": [USER]}, "the last message is by the user"),
    "empty completion": ({"prompt": [USER, ASSISTANT], "completion": []}, "the completion has no messages"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_one_line_with_its_file_and_line_and_leaves_nothing(
    tmp_path: Path, row: dict, message: str
) -> None:
    good = FORMATS["alpaca"] if "instruction" in row else FORMATS["messages"]
    path = written(tmp_path, [good, good, row, good])
    with pytest.raises(UserError, match=rf"rows\.jsonl line 3: .*{message}") as error:
        prepare(DataArguments(train_file=[path], tokenizer_vocab_size=300), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_preparation_says_which_rows_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, [FORMATS["sharegpt"]] * 4)
    folder = prepare(DataArguments(train_file=[path], tokenizer_vocab_size=300), tmp_path / "out")
    printed = capsys.readouterr().err
    assert "rows: conversations in ShareGPT's format; completions in the loss" in printed
    assert "new special tokens <|im_start|> <|im_end|>" in printed
    assert open_shards(folder).train.has_loss_mask
