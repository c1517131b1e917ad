"""Laws of the corpus `python-chat`: no question occurs twice, every process makes the same, every kind is held out."""

import hashlib
import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from pydoc import locate
from typing import Any

import pytest
import yaml

from minigpt.config.arguments import DataArguments
from minigpt.data.corpora import open_corpus
from minigpt.data.python_chat import DOCUMENTATION, GREETINGS, HELD_OUT_PERCENTAGE, documents
from minigpt.data.rule_tasks import KINDS
from minigpt.evaluation.conversations import read_conversations
from support.runs import ROOT

Rows = list[dict[str, Any]]
FINGERPRINT = """
import hashlib, json
from minigpt.data.python_chat import documents
print(hashlib.sha256(json.dumps(documents()).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def rows() -> Rows:
    return documents()


def held_out(rows: Rows) -> Rows:
    return rows[-round(HELD_OUT_PERCENTAGE / 100 * len(rows)) :]


def questions(row: dict[str, Any]) -> list[str]:
    """The questions of a conversation, without the small talk around them."""
    texts = [message["content"] for message in row["messages"] if message["role"] == "user"]
    return [text for text in texts if text not in GREETINGS and "y name" not in text]


def test_no_question_occurs_twice(rows: Rows) -> None:
    counts = Counter(question for row in rows for question in questions(row))
    assert [question for question, count in counts.items() if count > 1] == []


def test_turns_alternate_and_end_with_an_answer(rows: Rows) -> None:
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles[roles[0] == "system" :] == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in row["messages"])


def test_another_process_with_another_hash_seed_makes_the_same_conversations(rows: Rows) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", FINGERPRINT], env=environment, check=True, capture_output=True)
    assert other.stdout.decode().strip() == hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def test_every_kind_and_form_of_conversation_is_held_out(rows: Rows) -> None:
    kinds = Counter(row["kind"] for row in held_out(rows))
    assert set(kinds) == {*KINDS, DOCUMENTATION, "name"}
    assert min(kinds[kind] for kind in KINDS) >= 50
    forms = {tuple(message["role"] for message in row["messages"]) for row in held_out(rows)}
    assert {len(form) for form in forms} >= {2, 3, 4, 6}
    assert any(form[0] == "system" for form in forms)


def test_an_answer_about_python_begins_the_docstring_that_python_shows(rows: Rows) -> None:
    """The corpus reads source files and C types; `pydoc` imports."""
    checked = 0
    for row in rows:
        question, answer = row["messages"][-2]["content"], row["messages"][-1]["content"]
        name = question.removeprefix("What does ").removeprefix("What is ").removesuffix(" do?").removesuffix("?")
        if row["kind"] == DOCUMENTATION and name.split(".")[0] in ("os", "str", "math", "shutil", "TypeError", "len"):
            assert answer in " ".join((inspect.getdoc(locate(name)) or "").split())
            checked += 1
    assert checked > 50


def test_a_name_that_was_told_is_remembered(rows: Rows) -> None:
    conversations = [row["messages"] for row in rows if row["kind"] == "name"]
    assert conversations
    for messages in conversations:
        name = messages[0]["content"].removeprefix("My name is ").removesuffix(".")
        assert messages[-1]["content"] == f"Your name is {name}."


def test_the_evaluation_asks_no_question_that_the_preset_trains_on() -> None:
    preset = yaml.safe_load((ROOT / "configs" / "quickstart_chat.yaml").read_text())
    args = DataArguments(corpus=preset["corpus"], validation_split_percentage=preset["validation_split_percentage"])
    trained_on = {json.dumps(document.completion) for document, _ in open_corpus(args).train.pieces()}
    asked = {json.dumps(example.completion) for example in read_conversations("python-chat")}
    assert trained_on
    assert asked.isdisjoint(trained_on)
