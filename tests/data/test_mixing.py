"""Mixtures: every prefix of a run has the exact share of each source, and each source has its own epochs."""

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
from minigpt.data.mixing import MixedOrder, exact_shares, join_shards, source_schedule
from minigpt.data.prepare import prepare
from minigpt.data.samplers import ShuffledOrder, TrainBatchSampler
from minigpt.data.shards import open_shards
from minigpt.data.tokenizer import train_bpe
from minigpt.utils.errors import UserError
from support.runs import metrics

Train = Callable[[list[str]], int]
WEIGHTS = [(0.7, 0.3), (1, 1, 1), (0.5, 0.3, 0.2), (0.97, 0.01, 0.01, 0.01), (3, 1), (0.62, 0.13, 0.11, 0.14)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_prefix_holds_each_source_in_its_share(weights: tuple[float, ...]) -> None:
    orders = [ShuffledOrder(100, 1, 100 * source, source) for source in range(len(weights))]
    mixed, total = MixedOrder(orders, weights), sum(map(Fraction, map(str, weights)))
    contributed = Counter()
    for number in range(1, 1200):
        contributed[mixed[number - 1] // 100] += 1
        for source, weight in enumerate(weights):
            exact = number * Fraction(str(weight)) / total
            assert math.floor(exact) <= contributed[source] <= math.ceil(exact)


def test_shares_are_kept_for_any_weights() -> None:
    generator = np.random.default_rng(0)
    for _ in range(30):
        shares = exact_shares(generator.integers(1, 60, generator.integers(2, 9)).tolist())
        sources, earlier, per_period = source_schedule(shares)
        for source, share in enumerate(shares):
            counts = np.cumsum(sources == source)
            exact = [share * number for number in range(1, len(sources) + 1)]
            assert all(abs(count - number) < 1 for count, number in zip(counts.tolist(), exact, strict=True))
            assert earlier[sources == source].tolist() == list(range(counts[-1]))
            assert per_period[source] == counts[-1] == share * len(sources)


def test_each_source_visits_every_sample_once_per_epoch_of_its_own() -> None:
    mixed = MixedOrder([ShuffledOrder(10, 1, 0, 0), ShuffledOrder(35, 1, 10, 1)], (0.7, 0.3))
    samples = [mixed[position] for position in range(400)]
    for first_id, count in ((0, 10), (10, 35)):
        of_source = [sample for sample in samples if first_id <= sample < first_id + count]
        for epoch in range(len(of_source) // count):
            assert sorted(of_source[epoch * count : (epoch + 1) * count]) == list(range(first_id, first_id + count))
    assert samples[:70] != samples[70:140]
    other = MixedOrder([ShuffledOrder(10, 2, 0, 0), ShuffledOrder(35, 2, 10, 1)], (0.7, 0.3))
    assert samples != [other[position] for position in range(400)]


def test_processes_share_the_samples_of_a_distant_position() -> None:
    def order() -> MixedOrder:
        return MixedOrder([ShuffledOrder(10, 1, 0, 0), ShuffledOrder(35, 1, 10, 1)], (0.7, 0.3))

    expected = [order()[position] for position in range(10**12, 10**12 + 16)]
    first, second = (iter(TrainBatchSampler(order(), 10**12, 4, rank, 2)) for rank in range(2))
    assert [*next(first), *next(second), *next(first), *next(second)] == expected


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
def test_no_sample_holds_two_sources(folders: list[str], strategy: str) -> None:
    sources = [open_shards(folder) for folder in folders]
    args = BatchArguments(block_size=24, packing_strategy=strategy)
    mixed = open_data_module(args, join_shards(sources, (0.7, 0.3)), 299)
    alone = [open_data_module(args, shards, 299) for shards in sources]
    inputs_of_source = [
        {tuple(data_module.train[sample]["input_ids"].tolist()) for sample in data_module.train.full_pass()}
        for data_module in alone
    ]
    first = alone[0].order.samples_per_epoch if strategy == "bfd" else len(sources[0].train)
    contributed = Counter()
    for position in range(200):
        sample = mixed.order[position]
        source = int(sample >= first)
        contributed[source] += 1
        if strategy == "bfd":
            assert tuple(mixed.train[sample]["input_ids"].tolist()) in inputs_of_source[source]
        else:
            assert source or sample + 24 < first
    assert contributed == {0: 140, 1: 60}
    assert mixed.order.samples_per_epoch == sum(data_module.order.samples_per_epoch for data_module in alone)


def command_line(folders: list[str], tmp_path: Path) -> list[str]:
    return (
        f"--data {' '.join(folders)} --data_weights 0.7 0.3 --output_dir {tmp_path / 'run'} --packing_strategy bfd "
        "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --block_size 32 --max_steps 8 --dropout 0.1 "
        "--per_device_train_batch_size 5 --learning_rate 1e-2 --warmup_steps 0 --logging_steps 1 --save_steps 3 "
        "--save_total_limit 9 --eval_steps 0 --sample_max_new_tokens 5 --report_to none --use_cpu"
    ).split()


def test_a_mixed_run_resumes_bit_for_bit_and_another_mixture_is_refused(
    folders: list[str], tmp_path: Path, train_here: Train
) -> None:
    words = command_line(folders, tmp_path)
    assert train_here(words) == 0
    straight, resumed = tmp_path / "run", tmp_path / "resumed"
    shutil.copytree(straight / "checkpoint-3", resumed / "checkpoint-3")
    words += ["--output_dir", str(resumed), "--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError, match="was trained on other data"):
        train_here([*words, "--data_weights", "0.6", "0.4"])
    assert train_here(words) == 0
    assert list(metrics(straight, "train/loss").values())[3:] == list(metrics(resumed, "train/loss").values())
    assert (straight / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    data = json.loads((straight / "data.json").read_text())
    assert data["source"]["mixture"] == "0.7 of texts, 0.3 of examples"
    assert [source["fingerprint"] for source in data["sources"]] == [
        open_shards(folder).fingerprint for folder in folders
    ]


def test_a_mixture_of_one_folder_is_that_folder(folders: list[str], tmp_path: Path) -> None:
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
def test_invalid_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataArguments(data=["a", "b"], data_weights=weights or None)


def test_different_tokenizers_and_long_periods_are_refused(folders: list[str], tmp_path: Path) -> None:
    args = DataArguments(train_file=[str(tmp_path / "texts.jsonl")], tokenizer_vocab_size=280)
    prepare(args, tmp_path / "other")
    words = ["--data", folders[0], str(tmp_path / "other"), "--data_weights", "1", "1"]
    with pytest.raises(UserError, match=r"other was made with another tokenizer than .*texts; prepare it again"):
        load_data(parse_arguments(words, ""))
    with pytest.raises(UserError, match="give weights with fewer digits"):
        exact_shares([0.123456789, 0.876543211])
