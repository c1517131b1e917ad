"""Laws of examples: only completions are in the loss, and prompts and completions have the tokenizer's ids."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from minigpt.cli import main
from minigpt.config.arguments import DataArguments
from minigpt.data.inspect import verify_folder
from minigpt.data.prepare import prepare
from minigpt.data.shard_writer import SplitWriter
from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS, Tokens, open_shards
from minigpt.data.tokenizer import load_tokenizer, train_bpe
from minigpt.utils.errors import UserError

ROWS = [
    {"prompt": f"Question {n}: what is {n} and {n}?\n" * (1 + n % 3), "completion": f"Answer: {2 * n} <|endoftext|>"}
    for n in range(20)
]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    trained = train_bpe([str(row) for row in ROWS], 300, ["<|im_start|>", "<|im_end|>"])
    trained.chat_template = TEMPLATE
    trained.save_pretrained(tmp_path / "tokenizer")
    return trained


def prepared(
    tmp_path: Path, rows: list[dict], name: str = "out", validation: list[dict] | None = None, **options
) -> Path:
    """The shards of `rows`, a part of which is held out if no `validation` rows are given."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if validation:
        text = "".join(json.dumps(row) + "\n" for row in validation)
        (tmp_path / "validation.jsonl").write_text(text, encoding="utf-8")
        options["validation_file"] = [str(tmp_path / "validation.jsonl")]
    args = DataArguments(train_file=[str(tmp_path / "rows.jsonl")], tokenizer=str(tmp_path / "tokenizer"), **options)
    return prepare(args, tmp_path / name)


def content(tokens: Tokens) -> tuple[list[int], list[int]]:
    """All ids and all marks."""
    return tokens.read(0, len(tokens)).tolist(), tokens.marks(0, len(tokens)).tolist()


def expected(documents: list[list[tuple[list[int], bool]]]) -> tuple[list[int], list[int]]:
    """The ids and marks of documents that are given as segments: ids, and whether they are in the loss."""
    ids = [token for document in documents for segment, _ in document for token in segment]
    marks = [IN_LOSS * in_loss for document in documents for segment, in_loss in document for _ in segment]
    for end in np.cumsum([sum(len(segment) for segment, _ in document) for document in documents]):
        marks[end - 1] |= ENDS_DOCUMENT
    return ids, marks


@pytest.mark.parametrize("shard_tokens", [7, 100_000])
@pytest.mark.parametrize("completion_only", [None, False])
def test_a_completion_is_in_the_loss_and_its_prompt_is_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, shard_tokens: int, completion_only: bool | None
) -> None:
    options = {"shard_tokens": shard_tokens, "completion_only_loss": completion_only}
    folder = prepared(tmp_path, ROWS[:18], validation=ROWS[18:], **options)
    shards = open_shards(folder)

    def ids(text: str) -> list[int]:
        return tokenizer(text, split_special_tokens=True)["input_ids"]

    end = [tokenizer.eos_token_id]
    documents = [
        [(ids(row["prompt"]), completion_only is False), (ids(row["completion"]) + end, True)] for row in ROWS
    ]
    assert content(shards.train) == expected(documents[:18])
    assert content(shards.validation) == expected(documents[18:])
    split = shards.manifest["splits"]["train"]
    assert split["targets"] == sum(mark & IN_LOSS for mark in content(shards.train)[1])
    assert split["documents"] == 18


def test_a_conversation_is_written_by_the_chat_template_and_its_answers_are_in_the_loss(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    question, answer = {"role": "user", "content": "What is 2?"}, {"role": "assistant", "content": "Two <|im_end|>?"}
    more = {"role": "assistant", "content": "Three"}
    rows = [
        {"messages": [question, answer, question, more]},
        {"prompt": [question], "completion": [answer]},
        {"prompt": [question, answer, question], "completion": [more]},
    ]
    folder = prepared(tmp_path, rows, validation=rows[1:2])

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    question_ids = ids("<|im_start|>user\nWhat is 2?<|im_end|>\n<|im_start|>assistant\n")
    answer_ids, more_ids = ids("Two <|im_end|>?<|im_end|>\n"), ids("Three<|im_end|>\n")
    end = [tokenizer.eos_token_id]
    documents = [
        [
            (question_ids, False),
            (answer_ids, True),
            (question_ids, False),
            (more_ids + end, True),
        ],
        [(question_ids, False), (answer_ids + end, True)],
        [(question_ids + answer_ids + question_ids, False), (more_ids + end, True)],
    ]
    assert content(open_shards(folder).train) == expected(documents)


def test_a_prompt_has_the_same_ids_as_without_its_completion(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"prompt": "Answer:", "completion": " 2"}, {"prompt": "Answer: ", "completion": "2"}]
    ids, marks = content(open_shards(prepared(tmp_path, rows, validation=rows[:1])).train)
    for row in rows:
        length = marks.index(IN_LOSS)
        assert ids[:length] == tokenizer(row["prompt"])["input_ids"]
        end = next(position for position, mark in enumerate(marks) if mark & ENDS_DOCUMENT) + 1
        ids, marks = ids[end:], marks[end:]


def test_verify_checks_the_marks_and_inspect_counts_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(tmp_path, ROWS, shard_tokens=100)
    fingerprint = open_shards(folder).fingerprint
    assert "intact" in verify_folder(folder)
    main(["data", "inspect", str(folder)])
    printed = capsys.readouterr().out
    assert "in the loss: " in printed
    assert "documents: 18, " in printed
    marks = folder / "train-00001.marks"
    whole = marks.read_bytes()
    marks.write_bytes(whole[:5] + bytes([whole[5] ^ IN_LOSS]) + whole[6:])
    with pytest.raises(ValueError, match=r"train-00001.marks is not what was written.*targets"):
        verify_folder(folder)
    marks.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"train-00001.marks has 99 bytes where the manifest says 100"):
        open_shards(folder)
    everything = prepared(tmp_path, ROWS, "everything", shard_tokens=100, completion_only_loss=False)
    assert open_shards(everything).fingerprint != fingerprint


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([ROWS[0], {"prompt": "a"}], {}, r"line 2: no 'completion', which other rows have \(its fields: prompt\)"),
        (
            [{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}] * 2,
            {},
            "line 1: .* must both be strings",
        ),
        ([{"messages": "hello"}] * 2, {}, "line 1: 'messages' is a string, not a list of {role, content}"),
        ([{"text": "a"}] * 3, {"completion_only_loss": True}, "completion_only_loss=True needs rows .* holds text"),
        (ROWS, {"chat_template": "chatml"}, "chat_template=chatml needs conversations, but .* are texts"),
        ([ROWS[0]], {}, "line 1: the only example; give more"),
    ],
)
def test_rows_that_are_not_examples_are_refused_in_one_line_and_leave_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, rows: list[dict], options: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        prepared(tmp_path, rows, **options)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "tokenizer"}


def test_a_resumed_preparation_of_examples_gives_the_bytes_of_an_uninterrupted_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content_of(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    whole = content_of(prepared(tmp_path, ROWS, "whole", shard_tokens=50))
    finish_shard = SplitWriter._finish_shard
    finished: list[None] = []

    def finish_four_shards(writer: SplitWriter) -> None:
        if len(finished) == 4:
            raise KeyboardInterrupt
        finished.append(finish_shard(writer))

    monkeypatch.setattr(SplitWriter, "_finish_shard", finish_four_shards)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, ROWS, shard_tokens=50)
    monkeypatch.setattr(SplitWriter, "_finish_shard", finish_shard)
    assert len(list((tmp_path / ".out.partial").glob("*.marks"))) == 4
    assert content_of(prepared(tmp_path, ROWS, shard_tokens=50)) == whole


REWRITING = TEMPLATE.replace("message.content", "(message.content if loop.last else '...')")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REWRITING, r"rows\.jsonl line 1: the chat template writes a message differently when others follow it"),
        ("{{ raise_exception('roles must alternate') }}", r"rows\.jsonl line 1: the chat template fails: roles must"),
    ],
)
def test_an_unusable_chat_template_is_refused_and_the_row_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, template: str, message: str
) -> None:
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    with pytest.raises(UserError, match=message) as error:
        prepared(tmp_path, [row], validation=[row])
    assert "\n" not in str(error.value)


def test_a_tokenizer_can_be_trained_on_examples(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    folder = prepare(DataArguments(train_file=[str(tmp_path / "rows.jsonl")], tokenizer="char"), tmp_path / "out")
    shards = open_shards(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert tokenizer.decode(shards.train.read(0, 20).tolist()).startswith(ROWS[0]["prompt"][:20])
