"""Laws of deduplication: what repeats is dropped and nothing else, between the splits too, and the bytes are fixed."""

import json
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from minigpt.config.arguments import DataArguments
from minigpt.data.corpora import Documents
from minigpt.data.deduplication import DROPPED_FILE, KeptDocuments, NearRepeats, read_dropped
from minigpt.data.prepare import prepare
from minigpt.data.readers import Pieces
from minigpt.data.shards import open_shards
from minigpt.data.tokenizer import load_tokenizer
from support import fork_server
from support.runs import ROOT

VOCABULARY = [f"word{number}" for number in range(3000)]


def text(generator: random.Random, words: int = 300) -> str:
    weights = [1 / rank for rank in range(1, len(VOCABULARY) + 1)]  # Zipf's law: documents share common words
    return " ".join(generator.choices(VOCABULARY, weights, k=words))


def edited(generator: random.Random, original: str, share: float) -> str:
    words = original.split()
    for place in generator.sample(range(len(words)), round(share * len(words))):
        words[place] = generator.choice(VOCABULARY)
    return " ".join(words)


def jaccard(first: str, second: str) -> float:
    """Of the sequences of five words, computed here with sets of tuples."""
    sets = []
    for document in (first, second):
        words = re.findall(r"\w+", document.lower())
        sets.append({tuple(words[start : start + 5]) for start in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_planted_near_copies_are_found_and_nothing_else() -> None:
    generator = random.Random(0)
    repeats, originals = NearRepeats(0.7), [text(generator) for _ in range(400)]
    for number, document in enumerate(originals):
        assert repeats.find_or_add(document, f"train {number}") is None
    found = planted = right = 0
    for number in range(400):
        share = generator.choice([0.01, 0.02, 0.08, 0.2, 0.5])
        copy = edited(generator, originals[number], share)
        similarity = jaccard(copy, originals[number])
        name = repeats.find_or_add(copy, f"copy {number}")
        if 0.66 < similarity < 0.74:
            continue  # within the accuracy of the estimate
        planted += similarity > 0.7
        found += name is not None
        right += name == f"train {number}" and similarity > 0.7
    assert planted > 100
    assert right / planted >= 0.95  # recall
    assert right / found >= 0.95  # precision


class Numbered(Documents):
    """Documents "0", "1", …, each in two pieces."""

    def pieces(self, start: int = 0) -> Pieces:
        for number in range(start, 12):
            yield f"{number}", False
            yield ".", True


@pytest.mark.parametrize("dropped", [[], [0], [11], [0, 1, 2], [3, 5, 6, 10], list(range(12))])
def test_documents_that_are_kept_can_be_read_from_any_number(dropped: list[int]) -> None:
    kept = KeptDocuments(Numbered(), dropped)
    expected = [f"{number}" for number in range(12) if number not in dropped]
    for start in range(len(expected) + 1):
        found = "".join(str(piece) for piece, _ in kept.pieces(start)).split(".")[:-1]
        assert found == expected[start:]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Training and validation documents with exact and near copies within and between them, and a test item."""
    generator = random.Random(1)
    documents = [text(generator) for _ in range(60)]
    validation = [text(generator) for _ in range(10)]
    documents[20] = documents[3]  # exact, within the training split
    documents[30] = edited(generator, documents[4], 0.01)  # near
    documents[40] = validation[2] + "\n"  # exact, between the splits
    documents[41] = edited(generator, validation[5], 0.01)  # near
    validation[7] = validation[1]
    item = {"ctx": text(generator, 20), "endings": [text(generator, 20)], "label": 0}
    documents[50] = f"{text(generator, 50)} {item['ctx'].upper()}, {text(generator, 50)}"
    validation[8] += f" {item['ctx']}"
    for name, rows in (("train", documents), ("validation", validation)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "items.jsonl").write_text(json.dumps(item) + "\n")
    words = f"--train_file {tmp_path}/train.jsonl --validation_file {tmp_path}/validation.jsonl --tokenizer bpe"
    return f"{words} --tokenizer_vocab_size 300 --shard_tokens 2000 --preprocessing_num_workers 1".split()


def run(words: list[str], output_dir: Path) -> fork_server.Process:
    command = [sys.executable, "-m", "minigpt", "prepare", *words, "--output_dir", str(output_dir)]
    return fork_server.start(command, cwd=ROOT)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        (
            ["--dedup", "exact"],
            {("train", 20): "train 3", ("train", 40): "validation 2", ("validation", 7): "validation 1"},
        ),
        (
            ["--dedup", "near"],
            {
                ("train", 20): "train 3",
                ("train", 30): "train 4",
                ("train", 40): "validation 2",
                ("train", 41): "validation 5",
                ("validation", 7): "validation 1",
            },
        ),
        (["--decontaminate", "items.jsonl"], {("train", 50): "items.jsonl line 1"}),
    ],
)
def test_copies_leaks_and_test_items_are_dropped_listed_and_told(
    files: list[str], tmp_path: Path, options: list[str], dropped: dict[tuple[str, int], str]
) -> None:
    options = [str(tmp_path / word) if word.endswith(".jsonl") else word for word in options]
    process = run([*files, *options], tmp_path / "out")
    assert process.wait(60) == 0, process.stderr()
    found = {(entry.split, entry.document): entry.repeats for entry in read_dropped(tmp_path / "out")}
    assert found == dropped
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sum(entry["documents"] for entry in manifest["dropped"]["documents"]) == len(dropped)
    leaked = sum(split == "train" and name.startswith("validation") for (split, _), name in dropped.items())
    assert manifest["dropped"]["training_documents_in_validation"] == leaked
    assert (f"{leaked} of them validation documents" in process.stderr()) == (leaked > 0)

    kept = {}
    shards = open_shards(tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    for split, tokens in shards.splits.items():
        rows = (tmp_path / f"{split}.jsonl").read_text().splitlines()
        kept[split] = [json.loads(row)["text"] for number, row in enumerate(rows) if (split, number) not in dropped]
        assert tokens.documents == len(kept[split])
        assert tokenizer.decode(tokens.read(0, len(tokens))).split("<|endoftext|>")[:-1] == kept[split]


def test_a_kill_at_any_time_changes_no_byte(files: list[str], tmp_path: Path) -> None:
    words = [*files, "--dedup", "near"]
    assert run(words, tmp_path / "expected").wait(60) == 0
    partial = tmp_path / ".out.partial"
    for ready in (partial.is_dir, (partial / DROPPED_FILE).is_file, (partial / "train-00003.bin").is_file):
        process = run(words, tmp_path / "out")
        while process.poll() is None and not ready():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert run(words, tmp_path / "out").wait(60) == 0
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_files_that_hold_no_items_are_refused(files: list[str], tmp_path: Path) -> None:
    for name, lines, message in (
        ("words", '{"a": "too few"}\n', "eight words"),
        ("json", "x\n", "line 1 is not JSON"),
    ):
        (tmp_path / name).write_text(lines)
        process = run([*files, "--decontaminate", str(tmp_path / name)], tmp_path / "out")
        assert process.wait(60) == 2
        assert message in process.stderr().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_without_the_options_nothing_is_dropped(files: list[str], tmp_path: Path) -> None:
    args = DataArguments(train_file=[files[1]], validation_file=[files[3]], tokenizer="char")
    folder = prepare(args, tmp_path / "out")
    assert not (folder / DROPPED_FILE).exists()
    assert open_shards(folder).train.documents == 60
