"""Laws of mixtures: every prefix of a run has each source in its share, and each source has epochs of its own."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from minigpt.config.arguments import BatchArguments, DataArguments
from minigpt.config.parser import parse_arguments
from minigpt.data.datamodule import load_data, open_data_module
from minigpt.data.mixing import MixedOrder, exact_shares, joined, turns
from minigpt.data.prepare import prepare
from minigpt.data.samplers import EpochOrder, TrainBatches
from minigpt.data.shards import open_shards
from minigpt.data.tokenizer import train_bpe
from support.runs import metrics

Train = Callable[[list[str]], int]
WEIGHTS = [(0.7, 0.3), (1, 1, 1), (0.5, 0.3, 0.2), (0.97, 0.01, 0.01, 0.01), (3, 1), (0.62, 0.13, 0.11, 0.14)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_prefix_holds_each_source_in_its_share(weights: tuple[float, ...]) -> None:
    orders = [EpochOrder(100, 1, 100 * source, source) for source in range(len(weights))]
    mixed, total = MixedOrder(orders, weights), sum(map(Fraction, map(str, weights)))
    had = Counter()
    for number in range(1, 1200):
        had[mixed[number - 1] // 100] += 1
        for source, weight in enumerate(weights):
            exact = number * Fraction(str(weight)) / total
            assert math.floor(exact) <= had[source] <= math.ceil(exact)


def test_shares_are_kept_for_any_weights() -> None:
    generator = np.random.default_rng(0)
    for _ in range(30):
        shares = exact_shares(generator.integers(1, 60, generator.integers(2, 9)).tolist())
        source, earlier, _ = turns(shares)
        for of, share in enumerate(shares):
            counts = np.cumsum(source == of)
            exact = [share * number for number in range(1, len(source) + 1)]
            assert all(abs(count - wanted) < 1 for count, wanted in zip(counts.tolist(), exact, strict=True))
            assert earlier[source == of].tolist() == list(range(counts[-1]))


def test_each_source_has_epochs_of_its_own_without_repetition() -> None:
    mixed = MixedOrder([EpochOrder(10, 1, 0, 0), EpochOrder(35, 1, 10, 1)], (0.7, 0.3))
    samples = [mixed[position] for position in range(400)]
    for first, number in ((0, 10), (10, 35)):
        own = [sample for sample in samples if first <= sample < first + number]
        for epoch in range(len(own) // number):
            assert sorted(own[epoch * number : (epoch + 1) * number]) == list(range(first, first + number))
    assert samples[:70] != samples[70:140]
    other = MixedOrder([EpochOrder(10, 2, 0, 0), EpochOrder(35, 2, 10, 1)], (0.7, 0.3))
    assert samples != [other[position] for position in range(400)]


def test_a_position_far_away_is_found_at_once_and_any_process_finds_the_same() -> None:
    def order() -> MixedOrder:
        return MixedOrder([EpochOrder(10, 1, 0, 0), EpochOrder(35, 1, 10, 1)], (0.7, 0.3))

    whole = [order()[position] for position in range(10**12, 10**12 + 16)]
    parts = [iter(TrainBatches(order(), 10**12, 4, rank, 2)) for rank in range(2)]
    assert [*next(parts[0]), *next(parts[1]), *next(parts[0]), *next(parts[1])] == whole


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two prepared folders with one tokenizer, of plain text and of examples."""
    texts = [{"text": f"Number {n} follows number {n - 1}. " * (1 + n % 4)} for n in range(1, 60)]
    examples = [{"prompt": f"What follows {n}? ", "completion": f"{n + 1}"} for n in range(80)]
    tokenizer = train_bpe([str(row) for row in texts], 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, rows in (("texts", texts), ("examples", examples)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        args = DataArguments(train_file=[str(tmp_path / f"{name}.jsonl")], tokenizer=str(tmp_path / "tokenizer"))
        prepare(args, tmp_path / name)
    return [str(tmp_path / "texts"), str(tmp_path / "examples")]


@pytest.mark.parametrize("strategy", ["wrapped", "bfd"])
def test_a_sample_holds_one_source_alone(folders: list[str], strategy: str) -> None:
    parts = [open_shards(folder) for folder in folders]
    args = BatchArguments(block_size=24, packing_strategy=strategy)
    mixed, alone = (
        open_data_module(args, joined(parts, (0.7, 0.3)), 299),
        [open_data_module(args, part, 299) for part in parts],
    )
    inputs = [
        {tuple(data_module.train[s]["input_ids"].tolist()) for s in data_module.train.every()} for data_module in alone
    ]
    first = mixed.order.orders[0].samples if strategy == "bfd" else parts[0].source_tokens or len(parts[0].train)
    had = Counter()
    for position in range(200):
        sample = mixed.order[position]
        source = int(sample >= first)
        had[source] += 1
        if strategy == "bfd":
            assert tuple(mixed.train[sample]["input_ids"].tolist()) in inputs[source]
        else:
            assert source or sample + 24 < first
    assert had == {0: 140, 1: 60}
    assert mixed.order.samples == sum(data_module.order.samples for data_module in alone)


def run_words(folders: list[str], tmp_path: Path) -> list[str]:
    return (
        f"--data {' '.join(folders)} --data_weights 0.7 0.3 --output_dir {tmp_path / 'run'} --packing_strategy bfd "
        "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --block_size 32 --max_steps 8 --dropout 0.1 "
        "--per_device_train_batch_size 5 --learning_rate 1e-2 --warmup_steps 0 --logging_steps 1 --save_steps 3 "
        "--save_total_limit 9 --eval_steps 0 --sample_max_new_tokens 5 --report_to none --use_cpu"
    ).split()


def test_a_mixed_run_resumes_bit_for_bit_and_another_mixture_is_refused(
    folders: list[str], tmp_path: Path, train_here: Train
) -> None:
    words = run_words(folders, tmp_path)
    assert train_here(words) == 0
    straight, resumed = tmp_path / "run", tmp_path / "resumed"
    shutil.copytree(straight / "checkpoint-3", resumed / "checkpoint-3")
    words += ["--output_dir", str(resumed), "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="was trained on other data"):
        train_here([*words, "--data_weights", "0.6", "0.4"])
    assert train_here(words) == 0
    assert list(metrics(straight, "train/loss").values())[3:] == list(metrics(resumed, "train/loss").values())
    assert (straight / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    data = json.loads((straight / "data.json").read_text())
    assert data["source"]["mixture"] == "0.7 of texts, 0.3 of examples"
    assert [source["fingerprint"] for source in data["sources"]] == [open_shards(of).fingerprint for of in folders]


def test_one_folder_is_what_it_is_alone(folders: list[str], tmp_path: Path) -> None:
    shards, _ = load_data(parse_arguments(["--data", folders[1]], ""))
    assert shards.fingerprint == open_shards(folders[1]).fingerprint


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], r"data_weights=\[\]: give one number for each folder"),
        ([1.0], r"data_weights=\[1.0\]: give one number for each folder"),
        ([1.0, 0.0], "must all be above 0"),
        ([1.0, -1.0], "must all be above 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataArguments(data=["a", "b"], data_weights=weights or None)


def test_folders_of_two_tokenizers_and_endless_fractions_are_refused(folders: list[str], tmp_path: Path) -> None:
    args = DataArguments(train_file=[str(tmp_path / "texts.jsonl")], tokenizer_vocab_size=280)
    prepare(args, tmp_path / "other")
    words = ["--data", folders[0], str(tmp_path / "other"), "--data_weights", "1", "1"]
    with pytest.raises(ValueError, match=r"other was made with another tokenizer than .*texts; prepare it again"):
        load_data(parse_arguments(words, ""))
    with pytest.raises(ValueError, match="give weights with fewer digits"):
        exact_shares([0.123456789, 0.876543211])
