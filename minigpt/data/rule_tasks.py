"""Create questions whose answers follow from a rule: sums, words, dates, lists and given facts.

A question can be answered only by applying its rule, because no two questions ask for the same thing: not in other
words, and sums not in the other order. So the share of exact answers to questions that were held out from training
shows whether the model has learned the rules.
"""

import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import date, timedelta

FIRST_DAY, LAST_DAY = date(1950, 1, 1), date(2049, 12, 31)
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
NAMES = (
    *("Ada", "Alan", "Ann", "Ben", "Carl", "Dan", "Emma", "Eric", "Eva", "Finn", "Grace", "Hans", "Ida", "Ines"),
    *("Jack", "Kim", "Lena", "Mark", "Nina", "Omar", "Paul", "Rosa", "Sam", "Tom"),
)
WORDS = (
    *("apple", "ball", "bird", "boat", "bread", "city", "coin", "cup", "desk", "dog", "door", "farm", "fire", "game"),
    *("glass", "gold", "hand", "hat", "horse", "ice", "island", "key", "lake", "lion", "map", "milk", "moon", "night"),
    *("ocean", "paper", "pen", "queen", "rain", "river", "salt", "ship", "star", "summer", "table", "tree", "water"),
    *("wind",),
)
THINGS = ("ball", "boat", "coin", "cup", "desk", "dog", "game", "hat", "horse", "key", "map", "pen", "ship", "table")


@dataclass(frozen=True)
class RuleTask:
    """A question with its only right answer. `kind` names the rule."""

    kind: str
    question: str
    answer: str


Draft = tuple[Hashable, str, str]  # what is asked for, the question, and the answer


def rule_tasks(count: int, seed: int = 0) -> list[RuleTask]:
    """`count` different tasks in random order, equally many of each kind (or one more).

    The list depends on `count` and `seed` alone. Raises ValueError if there are not so many different questions.
    """
    choice = random.Random(seed)
    tasks: list[RuleTask] = []
    for number, (kind, draft) in enumerate(KINDS.items()):
        wanted = count // len(KINDS) + (number < count % len(KINDS))
        asked: set[Hashable] = set()
        for _ in range(20 * wanted + 1000):
            if len(asked) == wanted:
                break
            subject, question, answer = draft(choice)
            if subject not in asked:
                asked.add(subject)
                tasks.append(RuleTask(kind, question, answer))
        else:
            raise ValueError(f"there are hardly {wanted} different questions of the kind {kind}; ask for fewer")
    choice.shuffle(tasks)
    return tasks


def _addition(choice: random.Random) -> Draft:
    """A number below 1,000 and a digit, without a carry: 27 + 5 is not asked."""
    ones = choice.randint(0, 8)
    a, b = 10 * choice.randint(1, 99) + ones, choice.randint(1, 9 - ones)
    return (a, b), f"What is {a} + {b}?", f"It is {a + b}."


def _repeat(choice: random.Random) -> Draft:
    words = " ".join(choice.sample(WORDS, choice.randint(2, 4)))
    request = choice.choice(("Repeat", "Say this"))
    return words, f"{request}: {words}", words


def _reverse(choice: random.Random) -> Draft:
    words = choice.sample(WORDS, choice.randint(2, 3))
    text = " ".join(words)
    request = choice.choice(("Reverse the order of the words", "Say backwards"))
    return text, f"{request}: {text}", " ".join(reversed(words))


def _first_or_last_word(choice: random.Random) -> Draft:
    words = choice.sample(WORDS, choice.randint(2, 4))
    text = " ".join(words)
    place, answer = choice.choice((("first", words[0]), ("last", words[-1])))
    return (text, place), f"What is the {place} word of: {text}", answer


def _list_item(choice: random.Random) -> Draft:
    words = choice.sample(WORDS, choice.randint(2, 4))
    index = choice.randrange(len(words))
    return (*words, index), f"x = {words}. What is x[{index}]?", words[index]


def _day(choice: random.Random) -> date:
    return FIRST_DAY + timedelta(days=choice.randrange((LAST_DAY - FIRST_DAY).days + 1))


def _date_to_iso(choice: random.Random) -> Draft:
    day = _day(choice)
    text = f"{day.day} {MONTHS[day.month - 1]} {day.year}"
    question = choice.choice((f"Write {text} as YYYY-MM-DD.", f"What is {text} in ISO format?"))
    return day, question, day.isoformat()


def _iso_to_date(choice: random.Random) -> Draft:
    day = _day(choice)
    text = f"{day.day} {MONTHS[day.month - 1]} {day.year}"
    question = choice.choice((f"Write the date {day.isoformat()} in words.", f"Which day is {day.isoformat()}?"))
    return day, question, text


def _possession(choice: random.Random) -> Draft:
    name, things = choice.choice(NAMES), choice.sample(THINGS, 3)
    has, asked = things[:2], choice.choice(things[:2]) if choice.random() < 0.5 else things[2]
    question = f"{name} has a {has[0]} and a {has[1]}. Does {name} have a {asked}?"
    return (name, frozenset(has), asked), question, "Yes." if asked in has else "No."


KINDS: dict[str, Callable[[random.Random], Draft]] = {
    "addition": _addition,
    "repeat": _repeat,
    "reverse": _reverse,
    "first_or_last_word": _first_or_last_word,
    "list_item": _list_item,
    "date_to_iso": _date_to_iso,
    "iso_to_date": _iso_to_date,
    "possession": _possession,
}
