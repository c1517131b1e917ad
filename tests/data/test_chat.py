"""Laws of examples: prompts are read, completions are learned, and both are the tokenizer's ids."""

import json
from pathlib import Path

import numpy as np
import pytest

from minigpt.cli import main
from minigpt.config.arguments import DataArguments
from minigpt.data.inspect import verify_folder
from minigpt.data.prepare import prepare
from minigpt.data.shard_writer import SplitWriter
from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS, Tokens, open_shards
from minigpt.data.tokenizer import load_tokenizer, train_bpe

ROWS = [
    {"prompt": f"Question {n}: what is {n} and {n}?\n" * (1 + n % 3), "completion": f"Answer: {2 * n} <|endoftext|>"}
    for n in range(20)
]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path):
    made = train_bpe([str(row) for row in ROWS], 300, ["<|im_start|>", "<|im_end|>"])
    made.chat_template = TEMPLATE
    made.save_pretrained(tmp_path / "tokenizer")
    return made


def prepared(tmp_path: Path, rows: list[dict], name: str = "out", **options) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    args = DataArguments(train_file=[str(tmp_path / "rows.jsonl")], tokenizer=str(tmp_path / "tokenizer"), **options)
    return prepare(args, tmp_path / name)


def content(tokens: Tokens) -> tuple[list[int], list[int]]:
    return tokens.read(0, len(tokens)).tolist(), tokens.marks(0, len(tokens)).tolist()


def expected(documents: list[list[tuple[list[int], bool]]]) -> tuple[list[int], list[int]]:
    ids = [token for document in documents for part, _ in document for token in part]
    marks = [IN_LOSS * learned for document in documents for part, learned in document for _ in part]
    for end in np.cumsum([sum(len(part) for part, _ in document) for document in documents]):
        marks[end - 1] |= ENDS_DOCUMENT
    return ids, marks


@pytest.mark.parametrize("shard_tokens", [7, 100_000])
@pytest.mark.parametrize("completion_only", [None, False])
def test_a_completion_is_learned_and_its_prompt_is_not(
    tmp_path: Path, tokenizer, shard_tokens: int, completion_only: bool | None
) -> None:
    folder = prepared(tmp_path, ROWS, shard_tokens=shard_tokens, completion_only_loss=completion_only)
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


def test_a_conversation_goes_through_the_chat_template_and_its_answers_are_learned(tmp_path: Path, tokenizer) -> None:
    question, answer = {"role": "user", "content": "What is 2?"}, {"role": "assistant", "content": "Two <|im_end|>?"}
    more, thanks = {"role": "assistant", "content": "Three"}, {"role": "user", "content": "Thanks"}
    rows = [
        {"messages": [question, answer, question, more, thanks]},
        {"prompt": [question], "completion": [answer]},
        {"prompt": [question, answer, question], "completion": [more]},
    ]
    folder = prepared(tmp_path, [*rows, rows[1]], validation_split_percentage=25)

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    asked = ids("<|im_start|>user\nWhat is 2?<|im_end|>\n<|im_start|>assistant\n")
    two, three = ids("Two <|im_end|>?<|im_end|>\n"), ids("Three<|im_end|>\n")
    end = [tokenizer.eos_token_id]
    documents = [
        [
            (asked, False),
            (two, True),
            (asked, False),
            (three, True),
            (ids("<|im_start|>user\nThanks<|im_end|>\n") + end, False),
        ],
        [(asked, False), (two + end, True)],
        [(asked + two + asked, False), (three + end, True)],
    ]
    assert content(open_shards(folder).train) == expected(documents)


def test_the_prompt_has_the_ids_that_it_has_when_the_model_is_asked(tmp_path: Path, tokenizer) -> None:
    rows = [{"prompt": "Answer:", "completion": " 2"}, {"prompt": "Answer: ", "completion": "2"}]
    ids, marks = content(open_shards(prepared(tmp_path, [*rows, rows[0]], validation_split_percentage=1)).train)
    for row in rows:
        length = marks.index(IN_LOSS)
        assert ids[:length] == tokenizer(row["prompt"])["input_ids"]
        end = next(at for at, mark in enumerate(marks) if mark & ENDS_DOCUMENT) + 1
        ids, marks = ids[end:], marks[end:]


def test_verify_and_inspect_know_the_marks(tmp_path: Path, tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepared(tmp_path, ROWS, shard_tokens=100)
    fingerprint = open_shards(folder).fingerprint
    assert "whole" in verify_folder(folder)
    main(["data", "inspect", str(folder)])
    said = capsys.readouterr().out
    assert "in the loss: " in said
    assert "documents: 18, " in said
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
        ([ROWS[0], {"prompt": "a"}], {}, r"line 2: neither 'prompt' and 'completion' nor 'messages'"),
        ([{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}] * 2, {}, "line 1: .* must both be texts"),
        ([{"messages": "hello"}] * 2, {}, "must both be texts, or lists"),
        ([{"text": "a"}] * 3, {"completion_only_loss": True}, "completion_only_loss goes with JSON lines"),
        ([ROWS[0]], {}, "line 1: the only example; give more"),
    ],
)
def test_what_cannot_be_marked_is_refused_in_one_line_and_leaves_nothing(
    tmp_path: Path, tokenizer, rows: list[dict], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        prepared(tmp_path, rows, **options)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "tokenizer"}


def test_an_interrupted_preparation_of_examples_goes_on_to_the_same_bytes(
    tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content_of(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    whole = content_of(prepared(tmp_path, ROWS, "whole", shard_tokens=50))
    finish, done = SplitWriter._finish_shard, []

    def interrupted(writer: SplitWriter) -> None:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(finish(writer))

    monkeypatch.setattr(SplitWriter, "_finish_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, ROWS, shard_tokens=50)
    monkeypatch.setattr(SplitWriter, "_finish_shard", finish)
    assert len(list((tmp_path / ".out.partial").glob("*.marks"))) == 4
    assert content_of(prepared(tmp_path, ROWS, shard_tokens=50)) == whole


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    train_bpe([str(row) for row in ROWS], 300).save_pretrained(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path / "tokenizer").chat_template is None
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match="no chat_template"):
        prepared(tmp_path, [row, row])


def test_a_tokenizer_can_be_trained_on_examples(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    folder = prepare(DataArguments(train_file=[str(tmp_path / "rows.jsonl")], tokenizer="char"), tmp_path / "out")
    shards = open_shards(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert tokenizer.decode(shards.train.read(0, 20).tolist()).startswith(ROWS[0]["prompt"][:20])
