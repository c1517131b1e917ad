"""Laws of the `evaluate` metrics: the same result with one process or two, and as in our commands, offline."""

import math
import multiprocessing
from pathlib import Path

import pytest

from minigpt.evaluation.evaluate_metrics import BitsPerByte, NormalizedAccuracy

LOGLIKELIHOODS = [
    [-9.0, -4.0, -12.0, -7.0],
    [-3.0, -8.0, -8.0, -2.5],
    [-6.0, -6.5, -2.0, -30.0],
    [-1.0, -2.0, -3.0, -4.0],
]
BYTES = [[9, 3, 20, 9], [3, 10, 7, 2], [12, 9, 2, 90], [1, 1, 1, 1]]
LABELS = [2, 0, 3, 0]


def test_bits_per_byte_of_texts_are_those_of_the_whole(tmp_path: Path) -> None:
    metric = BitsPerByte(cache_dir=str(tmp_path))
    metric.add_batch(predictions=[8 * math.log(2), 4 * math.log(2)], references=[4, 2])
    metric.add(prediction=18 * math.log(2), reference=4)
    assert metric.compute()["bits_per_byte"] == pytest.approx(30 / 10)
    with pytest.raises(ValueError, match="0 bytes of text"):
        metric.compute(predictions=[1.0], references=[0])


@pytest.mark.parametrize(("lengths", "name"), [(BYTES, "acc_norm"), ([[1] * 4] * 4, "acc")])
def test_normalized_accuracy_is_that_of_the_hellaswag_command(
    lengths: list[list[int]], name: str, tmp_path: Path
) -> None:
    from minigpt.evaluation.hellaswag import Answer  # here, since the spawned processes do not need torch
    from minigpt.evaluation.hellaswag_items import Item

    items = [Item(n, [1], [[1]] * 4, BYTES[n], LABELS[n]) for n in range(4)]
    answers = [Answer.from_loglikelihoods(item, nats) for item, nats in zip(items, LOGLIKELIHOODS, strict=True)]
    metric = NormalizedAccuracy(cache_dir=str(tmp_path))
    result = metric.compute(predictions=LOGLIKELIHOODS, lengths=lengths, references=LABELS)
    assert result == {"acc_norm": sum(getattr(answer, name) for answer in answers) / 4}


def share(process: int, folder: str, results: "multiprocessing.Queue[object]") -> None:
    metric = NormalizedAccuracy(num_process=2, process_id=process, experiment_id="two", cache_dir=folder)
    metric.add_batch(predictions=LOGLIKELIHOODS[process::2], lengths=BYTES[process::2], references=LABELS[process::2])
    results.put((process, metric.compute()))


@pytest.mark.slow
def test_two_processes_compute_what_one_computes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=share, args=(process, str(tmp_path), results)) for process in range(2)]
    for worker in workers:
        worker.start()
    computed = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(30)
    single = NormalizedAccuracy(cache_dir=str(tmp_path / "single")).compute(
        predictions=LOGLIKELIHOODS, lengths=BYTES, references=LABELS
    )
    assert computed == {0: single, 1: None}
