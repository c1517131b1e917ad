"""Laws of examples/: the models that the scripts save have the losses that they print, and bad input is one line.

Those that need TRL or lm-evaluation-harness are in test_trl.py and test_ecosystem.py.
"""

import re
import sqlite3
import sys
from pathlib import Path

import pytest
import torch

from minigpt.data.shards import open_shards
from minigpt.data.tokenizer import load_tokenizer
from minigpt.modeling.loading import load_model
from support.runs import ROOT, command, finish, metrics
from support.tiny import CONTEXT, byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights and a tokenizer with one token per byte."""
    folder = tmp_path_factory.mktemp("base")
    byte_tokenizer(eos_token="<|endoftext|>", pad_token="<|endoftext|>").save_pretrained(folder)
    tiny_model(hidden_size=32).save_pretrained(folder)
    return folder


def example(name: str, *words: object) -> str:
    """Run one of the examples to its end; what it prints."""
    finished = finish([sys.executable, str(ROOT / "examples" / name), *map(str, words)])
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def held_out_loss(model: Path, text_file: Path, share: float | None = None) -> float:
    """Nats per token of the last 8 blocks of a text, or of a share of them, computed from the logits."""
    ids = load_tokenizer(model)(text_file.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    blocks = torch.stack(ids.split(CONTEXT)[:-1])
    blocks = blocks[-(8 if share is None else int(len(blocks) * share)) :]
    with torch.no_grad():
        logits = load_model(model, device="cpu")(blocks).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()).item()


def printed(output: str) -> list[float]:
    """The losses in a program's output; they have four decimals."""
    return [float(number) for number in re.findall(r"\b\d\.\d{4}\b", output)]


def test_transformers_trainer_saves_a_model_with_the_lower_loss_that_it_measured(
    base: Path, text_file: Path, tmp_path: Path
) -> None:
    options = f"--model_name_or_path {base} --train_file {text_file} --output_dir {tmp_path / 'run'} --use_cpu"
    output = example("transformers_trainer.py", *options.split(), "--learning_rate", "1e-2", "--num_train_epochs", "1")
    before, after = printed(output.splitlines()[-1])
    assert after < before - 1
    assert held_out_loss(base, text_file, share=0.1) == pytest.approx(before, abs=1e-4)
    assert held_out_loss(tmp_path / "run", text_file, share=0.1) == pytest.approx(after, abs=1e-4)


def test_a_peft_adapter_lowers_the_loss_and_is_the_same_when_loaded_by_peft_or_by_us(
    base: Path, text_file: Path, tmp_path: Path
) -> None:
    before, after, loaded = printed(example("peft_lora.py", base, text_file, tmp_path / "adapter"))
    assert after < before - 0.1
    assert loaded == after
    assert held_out_loss(base, text_file) == pytest.approx(before, abs=1e-4)
    assert held_out_loss(tmp_path / "adapter", text_file) == pytest.approx(after, abs=1e-4)


def test_every_row_of_a_database_becomes_a_document_that_a_run_learns_from(tmp_path: Path) -> None:
    rows = [f"Row {number} of the table\nhas the square {number**2}." for number in range(200)]
    with sqlite3.connect(tmp_path / "rows.db") as database:
        database.execute("CREATE TABLE texts (body TEXT)")
        database.executemany("INSERT INTO texts VALUES (?)", [(row,) for row in rows])
    data = tmp_path / "data"
    words = ["SELECT body FROM texts", "--output_dir", data, "--tokenizer", "char"]
    example("custom_data.py", tmp_path / "rows.db", *words)
    shards, tokenizer = open_shards(data), load_tokenizer(data / "tokenizer")
    text = "".join(tokenizer.decode(split.read(0, len(split))) for split in shards.splits.values())
    assert sorted(text.removesuffix(tokenizer.eos_token).split(tokenizer.eos_token)) == sorted(rows)

    run = tmp_path / "run"
    shape = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --block_size 16 --learning_rate 1e-2"
    options = (
        f"--max_steps 30 --logging_steps 1 --sample_max_new_tokens 1 --report_to none --use_cpu --output_dir {run}"
    )
    trained = finish(command("--data", data, *shape.split(), *options.split()))
    assert trained.returncode == 0, trained.stderr
    losses = metrics(run, "train/loss")
    assert losses[30] < losses[1] - 0.5


def test_a_custom_schedule_sets_the_rate_of_every_step_also_in_a_resumed_run(
    tiny_run: list[str], tmp_path: Path
) -> None:
    names, words = ("train/lr", "train/loss", "val/loss"), [*tiny_run, "--warmup_steps", "4"]
    example("custom_schedule.py", *words)
    uninterrupted = [metrics(tmp_path / "run", name) for name in names]
    rates = [2.5e-3, 5e-3, 7.5e-3, *(1e-2 * (4 / step) ** 0.5 for step in range(4, 13))]
    assert list(uninterrupted[0].values()) == pytest.approx(rates)
    example("custom_schedule.py", *words, "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-5")
    assert [metrics(tmp_path / "run", name) for name in names] == uninterrupted


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("transformers_trainer.py", "--model_name_or_path BASE --train_file none.txt", "'none.txt'"),
        ("transformers_trainer.py", "--model_name_or_path BASE --train_file SHORT", "has only 18 tokens"),
        ("peft_lora.py", "none SHORT OUT", "model=none, "),
        ("peft_lora.py", "BASE SHORT OUT", "has only 18 tokens"),
        ("custom_data.py", "none.db QUERY --output_dir OUT", "none.db: unable to open database file"),
        ("custom_data.py", "SHORT QUERY --output_dir OUT", "file is not a database"),
        ("custom_schedule.py", "quickstart --warmup 5", "custom_schedule.py: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    base: Path, tmp_path: Path, name: str, words: str, message: str
) -> None:
    short, out = tmp_path / "short.txt", tmp_path / "out"
    short.write_text("eighteen letters..", encoding="utf-8")
    places = {"BASE": base, "SHORT": short, "OUT": out, "QUERY": "SELECT body FROM texts"}
    given = [str(places.get(word, word)) for word in words.split()]
    finished = finish([sys.executable, str(ROOT / "examples" / name), *given])
    assert finished.returncode == 2, finished.stderr
    assert message in finished.stderr.splitlines()[-1]
    assert "Traceback" not in finished.stderr
