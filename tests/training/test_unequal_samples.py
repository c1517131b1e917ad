"""Laws of training on samples with unequal numbers of targets: the loss is always the mean over real targets."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_seed

from minigpt.cli import main
from minigpt.config.parser import parse_arguments
from minigpt.data.datamodule import DataModule, load_data, open_data_module
from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS, Tokens
from minigpt.modeling.loss import IGNORE_INDEX
from minigpt.training.setup import build_model
from modeling_minigpt import MiniGPTForCausalLM
from support.runs import command, finish, metrics

Train = Callable[[list[str]], int]
STRATEGIES = ["wrapped", "bfd", "none"]


@pytest.fixture
def run_on_examples(tmp_path: Path, cache_dir: Path) -> list[str]:
    """Options for twelve steps of eight samples (at least 1.6 epochs) on sums, half of them with an explanation."""
    generator = random.Random(1)
    rows = []
    for _ in range(66):
        terms = [generator.randrange(100) for _ in range(generator.choice([2, 2, 3, 9]))]
        explanation = " and then ".join(map(str, terms)) if generator.random() < 0.5 else ""
        rows.append({"prompt": f"{'+'.join(map(str, terms))}=", "completion": f"{explanation} {sum(terms)}"})
    rows[3]["completion"] *= 9  # longer than a row
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return (
        f"--train_file {tmp_path / 'rows.jsonl'} --tokenizer char --cache_dir {cache_dir} --hidden_size 16 "
        f"--num_hidden_layers 2 --num_attention_heads 2 --block_size 96 --dropout 0 --max_steps 12 --warmup_steps 2 "
        f"--per_device_train_batch_size 8 --learning_rate 1e-2 --logging_steps 1 --eval_steps 6 --save_steps 5 "
        f"--save_total_limit 10 --sample_max_new_tokens 5 --report_to none --use_cpu --output_dir {tmp_path / 'run'}"
    ).split()


def with_option(words: list[str], **options: object) -> list[str]:
    return [*words, *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


def open_data(words: list[str]) -> tuple[DataModule, Tokens, Tokens]:
    args = parse_arguments(words, "")
    shards, tokenizer = load_data(args)
    return open_data_module(args, shards, tokenizer.eos_token_id), shards.train, shards.validation


def documents(tokens: Tokens) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels [T] of every document, read from the shards without the classes that make samples."""
    ids = torch.from_numpy(tokens.read(0, len(tokens)).astype("int64"))
    marks = torch.from_numpy(tokens.marks(0, len(tokens)))
    labels = torch.where(marks & IN_LOSS > 0, ids, IGNORE_INDEX)
    lengths = torch.diff(torch.nonzero(marks & ENDS_DOCUMENT).flatten() + 1, prepend=torch.tensor([0])).tolist()
    return list(zip(ids.split(lengths), labels.split(lengths), strict=True))


def masked_loss(model: MiniGPTForCausalLM, ids_and_labels: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Nats per target, with every document alone and truncated to 97 tokens."""
    nats, targets = 0.0, 0
    for ids, labels in ids_and_labels:
        logits = model(input_ids=ids[None, :97][:, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, labels[1:97], reduction="sum").item()
        targets += int((labels[1:97] != IGNORE_INDEX).sum())
    return nats / targets


@pytest.mark.parametrize("strategy", ["bfd", "none"])
def test_training_and_validation_loss_equal_those_of_separate_documents(
    run_on_examples: list[str], tmp_path: Path, train_here: Train, strategy: str
) -> None:
    words = with_option(run_on_examples, packing_strategy=strategy, gradient_accumulation_steps=2)
    words = with_option(words, per_device_train_batch_size=50, max_steps=1, warmup_steps=0)
    data_module, train, validation = open_data(words)
    words = with_option(
        words, per_device_train_batch_size=data_module.order.samples_per_epoch, gradient_accumulation_steps=1
    )
    assert train_here(words) == 0
    set_seed(1337)
    args = parse_arguments(words, "")
    initial_model = build_model(args, load_data(args)[1], None).eval()
    train_loss = metrics(tmp_path / "run", "train/loss")[1]  # one step is the whole epoch
    assert train_loss == pytest.approx(masked_loss(initial_model, documents(train)), rel=1e-5)
    trained_model = MiniGPTForCausalLM.from_pretrained(tmp_path / "run").eval()
    validation_loss = metrics(tmp_path / "run", "val/loss")[1]
    assert validation_loss == pytest.approx(masked_loss(trained_model, documents(validation)), rel=1e-5)
    assert not metrics(tmp_path / "run", "val/bits_per_byte")  # truncated documents have no known number of bytes
    packing = json.loads((tmp_path / "run" / "data.json").read_text())["packing"]
    assert packing["strategy"] == strategy
    assert packing["documents"] == len(documents(train))
    assert packing["cut"] == sum(len(ids) > 97 for ids, _ in documents(train)) > 0


def test_minigpt_eval_scores_each_completion_after_its_own_prompt(
    run_on_examples: list[str], tmp_path: Path, train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    words = with_option(run_on_examples, packing_strategy="bfd_split", max_steps=3)
    assert train_here(words) == 0
    _, _, validation = open_data(words)
    folder, run_dir = validation.shards[0].path.parent, tmp_path / "run"
    capsys.readouterr()
    main(["eval", "--model", str(run_dir), "--data", str(folder), "--block_size", "96", "--json", "--use_cpu"])
    (result,) = json.loads(capsys.readouterr().out).values()
    assert result["loss"] == pytest.approx(metrics(run_dir, "val/loss")[3], rel=1e-6)
    targets = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in documents(validation))
    assert result["tokens"] == targets
    text_bytes = targets - len(documents(validation))  # one byte per token, except the end-of-text tokens
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * targets / math.log(2) / text_bytes, rel=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_logged_loss_is_the_mean_over_real_targets_not_a_mean_of_means(
    run_on_examples: list[str], tmp_path: Path, train_here: Train, strategy: str
) -> None:
    words = with_option(run_on_examples, packing_strategy=strategy, max_steps=1, warmup_steps=0)
    words = with_option(words, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert train_here(words) == 0
    data_module, _, _ = open_data(words)
    set_seed(1337)
    args = parse_arguments(words, "")
    model = build_model(args, load_data(args)[1], None).eval()
    nats, targets, means = 0.0, 0, []
    for position in range(8):
        batch = {name: values[None] for name, values in data_module.train[data_module.order[position]].items()}
        labels = batch.pop("shift_labels")
        logits = model(**batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        sample_targets = int((labels != IGNORE_INDEX).sum())
        nats, targets, means = nats + loss, targets + sample_targets, [*means, loss / sample_targets]
    logged = metrics(tmp_path / "run", "train/loss")[1]
    assert logged == pytest.approx(nats / targets, rel=1e-6)
    assert logged != pytest.approx(sum(means) / 8, rel=1e-5)
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "training_state.json").read_text())
    assert state["tokens_seen"] == targets


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unequal_samples_give_the_same_losses_for_every_split_of_the_batch(
    run_on_examples: list[str], tmp_path: Path, train_here: Train, strategy: str
) -> None:
    words = with_option(run_on_examples, packing_strategy=strategy, save_steps=0)
    splits = {"whole": (1, 8, 1), "micro": (1, 1, 8), "processes": (2, 2, 2)}
    for name, (processes, micro_batch, accumulation) in splits.items():
        options = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
        split = with_option(words, **options, output_dir=tmp_path / name)
        if processes == 1:
            assert train_here(split) == 0
        else:
            run = finish(command(*split, processes=processes))
            assert run.returncode == 0, run.stderr
    for name in splits:
        for metric in ("train/loss", "train/grad_norm", "val/loss"):
            whole = list(metrics(tmp_path / "whole", metric).values())
            # float32 sums in another order; the difference grows over twelve steps
            assert list(metrics(tmp_path / name, metric).values()) == pytest.approx(whole, rel=1e-4), (name, metric)
    states = [json.loads((tmp_path / name / "checkpoint-12" / "training_state.json").read_text()) for name in splits]
    assert len({state["tokens_seen"] for state in states}) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_on_examples_resumes_inside_an_epoch_bit_for_bit(
    run_on_examples: list[str], tmp_path: Path, train_here: Train, strategy: str
) -> None:
    words = with_option(run_on_examples, packing_strategy=strategy, dropout=0.1, per_device_train_batch_size=3)
    assert train_here(words) == 0
    uninterrupted, resumed = tmp_path / "run", tmp_path / "resumed"
    shutil.copytree(uninterrupted / "checkpoint-5", resumed / "checkpoint-5")
    assert train_here(with_option(words, output_dir=resumed, resume_from_checkpoint="latest")) == 0
    after = {step: loss for step, loss in metrics(uninterrupted, "train/loss").items() if step > 5}
    assert metrics(resumed, "train/loss") == after
    for name in ("model.safetensors", "training_state.json"):
        expected, actual = (folder / "checkpoint-12" / name for folder in (uninterrupted, resumed))
        if name.endswith("json"):
            assert json.loads(actual.read_text())["tokens_seen"] == json.loads(expected.read_text())["tokens_seen"]
        else:
            assert actual.read_bytes() == expected.read_bytes()


def test_targets_of_equal_samples_are_counted_without_reading_the_data(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data_module, train, _ = open_data(tiny_run)
    monkeypatch.setattr(Tokens, "marks", lambda *_: pytest.fail("the marks were read"))
    monkeypatch.setattr(type(data_module.order), "__getitem__", lambda *_: pytest.fail("the order was read"))
    assert data_module.target_count(5, 8) == 8 * 16
    assert not train.has_loss_mask
