"""The law of `minigpt memorization` on a model that recites: all that it recites is reported, and nothing else.

A corpus has 50 passages of 20 to 200 tokens, each 1 to 64 times, between other text. A model is trained on it with the
real trainer. What it recites is found by comparing its texts with the corpus, token by token and as strings.
`pytest -s` also prints how often a passage must be repeated until it is recited.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minigpt.data.copy_index import build_copy_index, index_folder
from minigpt.data.run_data import find_run_data
from minigpt.data.tokenizer import load_tokenizer
from minigpt.evaluation import memorization
from minigpt.evaluation.memorization import Copy, copied, describe_copies, measure
from minigpt.generation.sampling import Sampling, complete
from minigpt.modeling.loading import load_model
from minigpt.utils.formatting import markdown_table
from support.runs import ROOT

WORDS, FOLLOWERS = 500, 8  # each word is followed by one of eight others
END = WORDS  # the id of the end of a text
REPETITIONS = [1, 2, 4, 8, 16, 32, 64]
PASSAGES = 50
PROMPT = 8  # tokens of a passage that the model has to continue
LEAST = 20  # tokens of a copy
SAMPLES, SAMPLE_TOKENS = 100, 256
SHAPE = {"block_size": 256, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
STEPS = {"per_device_train_batch_size": 8, "num_train_epochs": 6, "eval_steps": 0, "save_steps": 0}
OPTIMIZER = {"optimizer": "muon", "learning_rate": 0.02, "warmup_steps": 20}


class Text:
    """Random words, of which each decides which ones may follow."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.followers = self.random.integers(0, WORDS, (WORDS, FOLLOWERS))

    def tokens(self, count: int) -> list[int]:
        ids = [int(self.random.integers(WORDS))]
        while len(ids) < count:
            ids.append(int(self.random.choice(self.followers[ids[-1]])))
        return ids


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, so that a passage has as many tokens as words wherever it is."""
    core = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)} | {"<end>": END}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def make_corpus() -> tuple[list[list[int]], list[list[int]], list[int]]:
    """The documents in random order, the passages, and how often each one is there."""
    text = Text()
    passages = [text.tokens(int(length)) for length in np.linspace(20, 200, PASSAGES)]
    repetitions = [REPETITIONS[number % len(REPETITIONS)] for number in range(PASSAGES)]
    documents = [text.tokens(200) for _ in range(200)]
    for passage, count in zip(passages, repetitions, strict=True):
        documents += [text.tokens(20) + passage + text.tokens(20) for _ in range(count)]
    order = text.random.permutation(len(documents))
    return [documents[number] for number in order], passages, repetitions


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{number}" for number in ids)


def train(documents: list[list[int]], folder: Path) -> Path:
    """A run of the trainer on these documents."""
    text, validation = folder / "train.jsonl", folder / "validation.jsonl"
    text.write_text("".join(json.dumps({"text": words(ids)}) + "\n" for ids in documents))
    validation.write_text(json.dumps({"text": words(Text().tokens(2000))}) + "\n")
    word_tokenizer().save_pretrained(folder / "tokenizer")
    options = {
        "train_file": text,
        "validation_file": validation,
        "tokenizer": folder / "tokenizer",
        "cache_dir": folder / "cache",
        "output_dir": folder / "run",
        "report_to": "none",
        "use_cpu": True,
        **SHAPE,
        **STEPS,
        **OPTIMIZER,
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run([sys.executable, str(ROOT / "train_accelerate.py"), *given], check=True)
    return folder / "run"


class ComparedTokens:
    """The corpus as one array, in which copies are found by comparing with every place."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.ids = np.concatenate([[*ids, END] for ids in documents])
        self.document = np.repeat(np.arange(len(documents)), [len(ids) + 1 for ids in documents])

    def copies(self, text: list[int]) -> list[tuple[int, int, int, set[int]]]:
        """Start, tokens, occurrences and documents of each copy that is not inside another one."""
        found, reach = [], 0
        for start, first in enumerate(text):
            places = np.flatnonzero(self.ids == first) if first != END else np.array([], dtype=int)
            holders, length = places, 0
            while len(places):
                holders, length = places, length + 1
                if start + length == len(text) or text[start + length] == END:
                    break
                places = places[places + length < len(self.ids)]
                places = places[self.ids[places + length] == text[start + length]]
            if length >= LEAST and start + length > reach:
                found.append((start, length, len(holders), set(self.document[holders].tolist())))
                reach = start + length
        return found


def longest_part(passage: list[int], text: Sequence[int]) -> int:
    """Tokens of the longest part of a passage that is in a text, as strings."""
    searched, best = f" {words(text)} ", 0
    for start in range(len(passage)):
        while start + best < len(passage) and f" {words(passage[start : start + best + 1])} " in searched:
            best += 1
    return best


@pytest.mark.slow
def test_all_that_a_trained_model_recites_is_reported_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, passages, repetitions = make_corpus()
    run = train(documents, tmp_path)
    model, tokenizer = load_model(run), load_tokenizer(run)
    shards, cache = find_run_data(run)
    index = build_copy_index(shards.train, END, index_folder(cache, shards))

    def continuation(prompt: list[int], sampling: Sampling) -> list[list[int]]:
        return [completion.token_ids for completion in complete(model, tokenizer, prompt, sampling, seed=0)]

    prompted = [
        passage[:PROMPT] + continuation(passage[:PROMPT], Sampling(len(passage) - PROMPT, temperature=0))[0]
        for passage in passages
    ]
    free = continuation([END], Sampling(SAMPLE_TOKENS, num_return_sequences=SAMPLES))
    monkeypatch.setattr(memorization, "WORST", 10_000)
    options = {"max_new_tokens": SAMPLE_TOKENS, "temperature": 1.0, "prompts": 2, "prompt_tokens": PROMPT, "seed": 0}
    report = measure(model, tokenizer, index, shards.train, shards.validation, samples=SAMPLES, **options)
    copies_of_prompted = [
        describe_copies(index, shards.train, tokenizer, ids, copied(index, ids, END)) for ids in prompted
    ]
    copies_of_free: list[list[Copy]] = [[] for _ in free]
    for copy in sorted(report.worst, key=lambda copy: copy.start):
        copies_of_free[copy.sample].append(copy)
    texts = prompted + free
    reported = copies_of_prompted + copies_of_free

    compared = ComparedTokens(documents)
    for ids, copies in zip(texts, reported, strict=True):
        expected = compared.copies(ids)
        assert [(copy.start, copy.tokens, copy.occurrences) for copy in copies] == [copy[:3] for copy in expected]
        for copy, (*_, holders) in zip(copies, expected, strict=True):
            assert copy.document in holders
            assert copy.source == words(documents[copy.document][:16])

    parts = np.array([[longest_part(passage, ids) for ids in texts] for passage in passages])
    for passage, longest in zip(passages, parts, strict=True):
        for ids, copies, part in zip(texts, reported, longest.tolist(), strict=True):
            spans = [ids[copy.start : copy.start + copy.tokens] for copy in copies]
            in_copies = max((longest_part(passage, span) for span in spans), default=0)
            assert in_copies == part if part >= LEAST else in_copies < LEAST
            for copy, span in zip(copies, spans, strict=True):
                if longest_part(passage, span) >= LEAST:
                    assert f" {words(passage)} " in f" {words(documents[copy.document])} "

    recited = [ids == passage for ids, passage in zip(prompted, passages, strict=True)]
    assert 0 < sum(recited) < PASSAGES  # otherwise the law would be about nothing
    print(f"\n{len(shards.train):,} training tokens, {sum(map(len, copies_of_free))} copies in {SAMPLES} free texts\n")
    head = ["repetitions", "passages", "recited to the end", "tokens continued", "in free texts"]
    rows = []
    for count in REPETITIONS:
        chosen = [number for number in range(PASSAGES) if repetitions[number] == count]
        continued = [common_beginning(prompted[number], passages[number]) - PROMPT for number in chosen]
        share = sum(continued) / sum(len(passages[number]) - PROMPT for number in chosen)
        in_free = sum(bool((parts[number, PASSAGES:] >= LEAST).any()) for number in chosen)
        recited_here = sum(recited[number] for number in chosen)
        rows.append([str(count), str(len(chosen)), str(recited_here), f"{share:.0%}", str(in_free)])
    print(markdown_table(head, rows, numeric=True))


def common_beginning(text: list[int], passage: list[int]) -> int:
    """Tokens in which a text begins as a passage."""
    return next((place for place in range(len(passage)) if text[: place + 1] != passage[: place + 1]), len(passage))
