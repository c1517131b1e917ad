"""`minigpt hellaswag` against a plain scorer: each ending by itself after its context, no cache, no padding."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minigpt.cli import main
from minigpt.data.tokenizer import load_tokenizer, train_bpe
from minigpt.evaluation.hellaswag_items import cleaned, encode_item, load_rows
from minigpt.training.checkpoint_files import find_damage
from minigpt.utils.errors import UserError
from minigpt.utils.run_files import find_checkpoints
from modeling_minigpt import MiniGPTForCausalLM
from support.runs import command, finish, launch, metrics
from support.tensors import different_tensors
from support.tiny import tiny_model

POSITIONS = 36
WORDS = ["roof", "café", "canoe", "lifts", "the", "a", "bar", "slowly", "and", "then", "water", "naïve", "he"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, and items.jsonl: some items are longer than the context of the model, some have accents."""
    folder = tmp_path_factory.mktemp("hellaswag")
    words = random.Random(0)

    def text(longest: int) -> str:
        return " ".join(words.choice(WORDS) for _ in range(words.randint(1, longest)))

    rows = [
        {
            "activity_label": text(2),
            "ctx_a": text(25),
            "ctx_b": text(3) if number % 3 else "",
            "endings": [text(8) + (" [title] end." if number % 5 == 0 else ".") for _ in range(4)],
            "label": str(words.randrange(4)),
        }
        for number in range(40)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = train_bpe((text(30) for _ in range(200)), 300)
    model = tiny_model(len(tokenizer), max_position_embeddings=POSITIONS, initializer_range=0.5)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def answers(folder: Path, path: Path, *words: str) -> list[dict]:
    options = ["--data_file", str(folder / "items.jsonl"), "--items", str(path), "--use_cpu", *words]
    main(["hellaswag", "--model", str(folder / "model"), *options])
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def test_every_answer_equals_that_of_a_plain_loop_over_the_endings(folder: Path, tmp_path: Path) -> None:
    model = MiniGPTForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = load_tokenizer(folder / "model")
    rows = load_rows(folder / "items.jsonl", None)
    truncated = 0
    for row, answer in zip(rows, answers(folder, tmp_path / "a.jsonl", "--batch_size", "8"), strict=True):
        context = cleaned(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        scores, texts = [], [cleaned(ending) for ending in row["endings"]]
        for text in texts:
            context_ids = tokenizer.encode(context.rstrip(), add_special_tokens=False)
            full_ids = tokenizer.encode(f"{context.rstrip()} {text}", add_special_tokens=False)
            ending = len(full_ids) - len(context_ids)
            truncated += len(full_ids) > POSITIONS + 1
            ids = torch.tensor(full_ids[-(POSITIONS + 1) :])
            with torch.no_grad():
                logprobs = model(ids[None, :-1]).logits[0].log_softmax(-1)
            target_logprobs = logprobs.gather(1, ids[1:, None])[-ending:]
            scores.append((target_logprobs.sum().item(), len(text.encode()), ending))
        # left padding and the cache change the order of float32 sums
        assert answer["loglikelihoods"] == pytest.approx([score for score, _, _ in scores], abs=1e-3)
        label = int(row["label"])
        assert answer["acc"] == (max(range(4), key=lambda n: scores[n][0]) == label)
        assert answer["acc_norm"] == (max(range(4), key=lambda n: scores[n][0] / scores[n][1]) == label)
        assert answer["acc_norm_tokens"] == (max(range(4), key=lambda n: scores[n][0] / scores[n][2]) == label)
    assert truncated > 4, "no item was longer than the model's context"


def test_answers_do_not_depend_on_batches_and_processes(folder: Path, tmp_path: Path) -> None:
    one = answers(folder, tmp_path / "one.jsonl", "--batch_size", "64")
    other = answers(folder, tmp_path / "other.jsonl", "--batch_size", "3")
    words = ["--model", folder / "model", "--data_file", folder / "items.jsonl", "--items", tmp_path / "two.jsonl"]
    run = finish(launch("-m", "minigpt", "hellaswag", *words, "--use_cpu", processes=2))
    assert run.returncode == 0, run.stderr
    two = list(map(json.loads, (tmp_path / "two.jsonl").read_text(encoding="utf-8").splitlines()))
    for first, second, third in zip(one, other, two, strict=True):
        for answer in (second, third):
            assert answer["loglikelihoods"] == pytest.approx(first["loglikelihoods"], abs=1e-3)
            assert {**answer, "loglikelihoods": 0} == {**first, "loglikelihoods": 0}


def test_a_trailing_space_of_the_context_belongs_to_the_ending(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "model")
    row = {"activity_label": "a", "ctx_a": "the bar", "ctx_b": "", "endings": ["he lifts"] * 4, "label": 0}
    item = encode_item(0, row, tokenizer)
    assert tokenizer.decode(item.context) == "a: the bar"
    assert tokenizer.decode(item.context + item.endings[0]) == "a: the bar he lifts"


ITEM = {"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c", "d", "e", "f"], "label": "0"}


@pytest.mark.parametrize(
    "line",
    [
        "{}", "no json", "[]", "null", "",
        *(
            json.dumps(ITEM | wrong)
            for wrong in (
                {"activity_label": None}, {"ctx_a": 5}, {"ctx_b": None}, {"label": 4}, {"label": "x"}, {"label": True},
                {"label": None}, {"label": 1.5}, {"endings": "abcd"}, {"endings": ["c"] * 3}, {"endings": None},
                {"endings": ["c", "d", "e", None]}, {"endings": ["c", "d", "e", " "]},
            )
        ),
    ],
)  # fmt: skip
def test_a_line_that_is_not_an_item_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(ITEM)}\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jsonl line 2: not a HellaSwag item"):
        load_rows(tmp_path / "bad.jsonl", None)
    assert load_rows(tmp_path / "bad.jsonl", 1) == [ITEM]


def test_a_file_without_items_or_with_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(f"{json.dumps(ITEM)}\n".encode() + b'"caf\xe9"\n')
    with pytest.raises(UserError, match="not UTF-8"):
        load_rows(tmp_path / "latin.jsonl", None)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="no HellaSwag items"):
        load_rows(tmp_path / "empty.jsonl", None)


def test_an_item_that_the_tokenizer_cannot_encode_ends_a_run_before_it_writes_anything(
    tiny_run: list[str], train_here: Callable[[list[str]], int], tmp_path: Path
) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps(ITEM), encoding="utf-8")
    items = ["--hellaswag_steps", "5", "--hellaswag_file", str(tmp_path / "items.jsonl")]
    with pytest.raises(
        UserError, match=r"items\.jsonl line 1: the tokenizer cannot encode it"
    ):  # no colon in the text
        train_here([*tiny_run, *items])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("failing", ["summed_loss", "evaluate", "sample_text"])
def test_a_due_checkpoint_is_saved_even_if_the_evaluation_of_its_step_fails(
    tiny_run: list[str],
    train_here: Callable[[list[str]], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps(ITEM), encoding="utf-8")
    words = [*tiny_run, "--tokenizer", "bpe", "--eval_steps", "5", "--sample_steps", "5", "--hellaswag_steps", "5"]
    words += ["--hellaswag_file", str(tmp_path / "items.jsonl"), "--max_steps", "10"]
    assert train_here([*words, "--output_dir", str(tmp_path / "uninterrupted")]) == 0

    def fail(*args: object, **options: object) -> None:
        raise ArithmeticError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(f"minigpt.training.periodic.{failing}", fail)
        with pytest.raises(ArithmeticError, match="broken"):
            train_here(words)
    run_dir = tmp_path / "run"
    assert [(path.name, find_damage(path)) for path in find_checkpoints(run_dir)] == [("checkpoint-5", None)]
    assert train_here([*words, "--resume_from_checkpoint", "latest"]) == 0
    assert different_tensors(run_dir, tmp_path / "uninterrupted") == []
    assert list(metrics(run_dir, "train/loss")) == list(range(1, 11))


def test_training_measures_what_the_command_measures(folder: Path, tmp_path: Path, tiny_run: list[str]) -> None:
    """On two processes; the accuracies reach metrics.jsonl, the card and the plot."""
    items = ["--hellaswag_file", str(folder / "items.jsonl"), "--hellaswag_limit", "10", "--hellaswag_steps", "0"]
    model = ["--model_name_or_path", str(folder / "model"), "--tokenizer", str(folder / "model")]
    shape = ("--hidden_size", "--num_hidden_layers", "--num_attention_heads", "--tokenizer", "--dropout")
    dropped = {index + offset for index, word in enumerate(tiny_run) if word in shape for offset in (0, 1)}
    words = [word for index, word in enumerate(tiny_run) if index not in dropped]
    run = finish(command(*words, *model, *items, processes=2))
    assert run.returncode == 0, run.stderr
    assert "HellaSwag: accuracy" in run.stdout
    answered = answers(folder, tmp_path / "a.jsonl", "--limit", "10", "--model", str(tmp_path / "run"))
    for name in ("acc", "acc_norm", "acc_norm_tokens"):
        [(step, value)] = metrics(tmp_path / "run", f"hellaswag/{name}").items()
        assert step == 12
        assert value == pytest.approx(sum(answer[name] for answer in answered) / 10)
    assert "HellaSwag" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_a_missing_file_of_items_ends_a_run_before_it_writes_anything(tiny_run: list[str], tmp_path: Path) -> None:
    run = finish(command(*tiny_run, "--hellaswag_steps", "5", "--hellaswag_file", str(tmp_path / "none.jsonl")))
    assert run.returncode == 2
    assert f"{tmp_path / 'none.jsonl'}: no such file" in run.stderr
    assert not (tmp_path / "run").exists()
