"""Laws of evaluating conversations: the loss and the answers are those that transformers computes one by one."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from minigpt.cli import main
from minigpt.data.chat_template import read_chat_template, set_chat_template
from minigpt.data.rows import MESSAGES
from minigpt.evaluation.conversations import answer_questions, exact_match, read_conversations
from minigpt.generation.conversation import Conversation
from minigpt.generation.sampling import Sampling
from support.tiny import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer(eos_token="<|endoftext|>")
set_chat_template(TOKENIZER, read_chat_template("plain"))
MODEL = tiny_model(len(TOKENIZER), max_position_embeddings=128)
QUESTIONS = ["Hi", "What is it?", "Why?", "a much longer question than the others", "No"]


def row(question: str, answer: str, kind: str) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kind": kind}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """The expected answers of the kind "own" are those that the model gives, asked one by one."""
    answered = []
    for question in QUESTIONS:
        conversation = Conversation(MODEL, TOKENIZER)
        conversation.ask(question, Sampling(max_new_tokens=12, temperature=0), seed=0)
        own = conversation.messages[-1]["content"] or "nothing"
        answered += [row(question, own, "own"), row(question, own + "!", "other")]
    return answered


def test_answers_in_padded_batches_are_those_of_questions_asked_one_by_one(rows: list[dict]) -> None:
    examples = [MESSAGES.parse(item, "row") for item in rows]
    for batch_size in (1, 4, 64):
        answers = answer_questions(MODEL, TOKENIZER, examples, batch_size, Accelerator(cpu=True))
        assert [answer.item for answer in answers] == list(range(len(rows)))
        for answer, item in zip(answers, rows, strict=True):
            if item["kind"] == "own":  # the batch allows a few more tokens than the expected answer has
                assert answer.answer.startswith(answer.expected)
    cut = [answer for answer in answers if answer.kind == "other"]
    assert exact_match(cut) == {"exact_match/other": 0.0, "exact_match": 0.0}


def test_the_loss_is_that_of_the_tokens_that_transformers_marks(
    rows: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MODEL.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    capsys.readouterr()
    options = ["--conversations", str(tmp_path / "rows.jsonl"), "--items", str(tmp_path / "items.jsonl")]
    main(["eval", "--model", str(tmp_path / "model"), *options, "--use_cpu", "--json"])
    (measured,) = json.loads(capsys.readouterr().out).values()
    total = count = 0.0
    for item in rows:
        encoded = TOKENIZER.apply_chat_template(
            item["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        targets = encoded["input_ids"][0].masked_fill(encoded["assistant_masks"][0] == 0, -100)
        with torch.no_grad():
            logits = MODEL(encoded["input_ids"]).logits[0]
        total += nn.functional.cross_entropy(logits[:-1], targets[1:], reduction="sum").item()
        count += int((targets != -100).sum())
    assert measured["tokens"] == count
    assert measured["loss"] == pytest.approx(total / count, abs=1e-5)
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [item["question"] for item in items] == [question for question in QUESTIONS for _ in range(2)]
    assert measured["exact_match"] == sum(item["exact"] for item in items) / len(items)


def test_a_base_model_is_asked_with_the_plain_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MODEL.save_pretrained(tmp_path / "model")
    byte_tokenizer(eos_token="<|endoftext|>").save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("Hi", "Hello", "greeting")), encoding="utf-8")
    main(["eval", "--model", str(tmp_path / "model"), "--conversations", str(tmp_path / "rows.jsonl"), "--use_cpu"])
    printed = capsys.readouterr()
    assert "has no chat template; using plain" in printed.err
    assert "greeting" in printed.out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "is not a file"),
        ("rows.jsonl", '{"text": "a"}', "its first row holds no conversation"),
        ("rows.jsonl", json.dumps(row("Hi", " ", "")), r"rows.jsonl line 1: message 2 \(assistant\) is empty"),
        ("rows.jsonl", "", "holds no conversation"),
    ],
)
def test_rows_that_are_no_conversations_are_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_conversations(str(tmp_path / name))
