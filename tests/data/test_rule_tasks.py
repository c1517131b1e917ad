"""Laws of rule-made questions: every answer is right, nothing is asked twice, and the seed decides all of it."""

import ast
import re
from collections import Counter
from collections.abc import Callable
from datetime import datetime

import pytest

from minigpt.data.rule_tasks import KINDS, RuleTask, rule_tasks

TASKS = rule_tasks(6000)


def numbers(question: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", question)]


def words_after_colon(question: str) -> list[str]:
    return question.split(": ")[1].split(" ")


def calculation(question: str) -> int:
    expression = question.removeprefix("What is ").rstrip("?").replace("plus", "+")
    return int(eval(expression))


def chosen_word(question: str) -> str:
    words = words_after_colon(question)
    return words[0] if " first " in question else words[-1]


def list_item(question: str) -> str:
    assignment, asked = question.split(". What is ")
    return str(eval(asked.rstrip("?"), {"x": ast.literal_eval(assignment.removeprefix("x = "))}))


def written_day(question: str) -> datetime:
    found = re.search(r"\d+ [A-Z][a-z]+ \d{4}", question)
    assert found
    return datetime.strptime(found.group(), "%d %B %Y")


def day_in_words(question: str) -> str:
    found = re.search(r"\d{4}-\d\d-\d\d", question)
    assert found
    return datetime.fromisoformat(found.group()).strftime("%d %B %Y").lstrip("0")


def has_it(question: str) -> str:
    facts, asked = question.split(". ")
    thing = asked.rstrip("?").split()[-1]
    return "Yes." if f" a {thing} " in f"{facts} " else "No."


RULES: dict[str, Callable[[str], str]] = {
    "addition": lambda question: f"It is {calculation(question)}.",
    "repeat": lambda question: " ".join(words_after_colon(question)),
    "reverse": lambda question: " ".join(words_after_colon(question)[::-1]),
    "first_or_last_word": chosen_word,
    "list_item": list_item,
    "date_to_iso": lambda question: written_day(question).date().isoformat(),
    "iso_to_date": day_in_words,
    "possession": has_it,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_follows_from_the_question_by_an_independent_rule(kind: str) -> None:
    tasks = [task for task in TASKS if task.kind == kind]
    assert [task.answer for task in tasks] == [RULES[kind](task.question) for task in tasks]


def test_the_kinds_share_the_count_equally() -> None:
    counts = Counter(task.kind for task in TASKS)
    assert sum(counts.values()) == len(TASKS) == 6000
    assert max(counts.values()) - min(counts.values()) == 0


def meaning(task: RuleTask) -> tuple[object, ...]:
    """What a question asks for, without the words that it is asked with."""
    if task.kind == "addition":
        return task.kind, tuple(numbers(task.question))
    if task.kind in ("repeat", "reverse"):
        return task.kind, tuple(words_after_colon(task.question))
    if task.kind in ("date_to_iso", "iso_to_date"):
        return task.kind, task.answer
    if task.kind == "possession":
        words = [word.strip(".?") for word in task.question.split()]
        return task.kind, words[0], frozenset((words[3], words[6])), words[-1]
    return task.kind, task.question


def test_no_two_questions_ask_for_the_same_in_other_words() -> None:
    assert len({meaning(task) for task in TASKS}) == len(TASKS)


def test_seed_and_count_decide_the_tasks() -> None:
    assert rule_tasks(100, seed=3) == rule_tasks(100, seed=3)
    assert rule_tasks(100, seed=3) != rule_tasks(100, seed=4)


def test_more_questions_than_there_are_is_an_error_that_names_the_kind() -> None:
    with pytest.raises(ValueError, match="of the kind addition"):
        rule_tasks(80_000)
