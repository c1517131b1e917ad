"""Laws of the scaling study: every run has a folder of its own, and the law of the runs is found again."""

import math
import re
from typing import Any

import pytest

from minigpt.benchmarks.scaling import StudyRun, best_rate, fitted_law, rate_tables, study_runs
from minigpt.planning.scaling_law import STARTS, ModelSize, ScalingLaw

# four constants are where the fit starts: no model has few embeddings, so the runs do not tell the offset, and those
# that are not the longest hardly repeat their text, so they do not tell the last three
LAW = ScalingLaw(0.07, 0.4, 0.04, 0.4, STARTS[4], 0.7, 0.2, 0.5, *STARTS[-3:])
TEXTS = ["code", "bible", "docs"]


def rows() -> list[dict[str, Any]]:
    """The rows of a study of which every run follows `LAW`; texts of three megabytes."""
    found = []
    for run in study_runs(TEXTS):
        text_bytes = 3 * run.steps * run.batch * 128
        size, text = ModelSize.of(run.hidden_size, run.layers, run.vocabulary), TEXTS.index(run.text)
        slope = (0.85 + 0.15 * text) * (2048 / run.vocabulary) ** 0.13
        loss = LAW.relative_loss(size, text_bytes, text_bytes / 3e6, slope) * (1 + text)
        row = vars(run) | {"text_bytes": text_bytes, "epochs": text_bytes / 3e6}
        row |= {"layer_parameters": size.layers, "parameters": size.layers + size.embeddings}
        found.append(row | {"bits_per_byte": loss})
    return found


def test_runs_that_differ_have_different_folders() -> None:
    runs = set(study_runs(TEXTS))
    same = {(*(value for name, value in vars(run).items() if name != "question"),) for run in runs}
    assert len({run.name for run in runs}) == len(same)


def test_the_command_line_of_a_run_has_what_its_name_says() -> None:
    run = StudyRun("law", "code", 2048, 96, 3, 250, dropout=0.1, weight_decay=0.2)
    words = run.words(["--train_file", "code.txt"])
    for word in (
        "--hidden_size=96",
        "--num_attention_heads=3",
        "--max_steps=250",
        "--dropout=0.1",
        "--weight_decay=0.2",
    ):
        assert word in words


def test_the_law_is_found_and_predicts_runs_that_it_was_not_fitted_to() -> None:
    lines = fitted_law(rows())
    errors = [float(number) for number in re.findall(r"largest ([+-][\d.]+)%", "\n".join(lines))]
    assert len(errors) == 2 + len(TEXTS)
    assert max(map(abs, errors)) < 0.5


@pytest.mark.parametrize("count", [0, 11])
def test_too_few_runs_are_said_to_be_too_few(count: int) -> None:
    assert fitted_law(rows()[:count]) == [f"{count} runs are too few for the law; give more texts"]


@pytest.mark.parametrize("best", [0.011, 0.02, 0.033, 0.056])
def test_the_best_rate_of_a_parabola_lies_between_the_rates_that_were_tried(best: float) -> None:
    losses = {rate: 2 + 0.1 * math.log(rate / best) ** 2 for rate in (0.005, 0.01, 0.02, 0.04, 0.08)}
    assert best_rate(losses) == pytest.approx(best)


def test_the_best_rate_is_never_one_outside_of_those_that_were_tried() -> None:
    assert best_rate({0.01: 3.0, 0.02: 2.0, 0.04: 1.0}) == 0.04
    assert best_rate({0.01: 1.0, 0.02: 2.0, 0.04: 3.0}) == 0.01


def test_the_table_of_rates_has_a_line_for_each_shape() -> None:
    for table in rate_tables(rows()):
        shapes = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
        assert shapes == ["128 x 2", "128 x 4", "128 x 8", "256 x 4", "512 x 4"]
    assert len(rate_tables(rows())) == 2
