"""Laws of `minigpt sweep`: every combination is trained once, and successive halving keeps the best."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from minigpt.cli import main
from minigpt.experiments.sweep import rounds


def trials(output_dir: Path) -> list[dict[str, object]]:
    """The rows of a sweep's table, the best first."""
    rows: list[dict[str, object]] = json.loads((output_dir / "sweep.json").read_text())["trials"]
    return rows


def test_every_combination_is_trained_and_ranked(
    tiny_config: Path, tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = tmp_path / "sweep"
    words = ["sweep", str(tiny_config), "--output_dir", str(output_dir), "--parallel", "2", "--option"]
    main([*words, "learning_rate=1e-3,1e-2", "--option", "hidden_size=16,32"])
    rows = trials(output_dir)
    assert {(row["learning_rate"], row["hidden_size"]) for row in rows} == {
        (rate, size) for rate in ("1e-3", "1e-2") for size in ("16", "32")
    }
    losses = [row["val/loss"] for row in rows]
    assert losses == sorted(losses)  # type: ignore[type-var]
    for row in rows:  # the run is what the table says
        arguments = (Path(str(row["run_dir"])) / "arguments.yaml").read_text()
        assert f"learning_rate: {float(str(row['learning_rate']))}\n" in arguments
    assert (output_dir / "sweep.png").stat().st_size > 0
    assert "| learning_rate | hidden_size | length   | val/loss |" in capsys.readouterr().out
    main([*words, "learning_rate=1e-3,1e-2,3e-2", "--option", "hidden_size=16,32"])
    assert len(started) == 6  # only the new value was trained


def test_runs_with_different_tokenizers_are_ranked_by_bits_per_byte(
    tiny_config: Path, tmp_path: Path, started: list[list[str]]
) -> None:
    output_dir = tmp_path / "sweep"
    main(["sweep", str(tiny_config), "--option", "tokenizer=char,bpe", "--output_dir", str(output_dir)])
    rows = trials(output_dir)
    bits = [row["val/bits_per_byte"] for row in rows]
    assert bits == sorted(bits)  # type: ignore[type-var]
    losses = {row["tokenizer"]: row["val/loss"] for row in rows}
    assert losses["bpe"] > losses["char"]  # type: ignore[operator]  # a token of bpe stands for more text


@pytest.mark.slow
def test_successive_halving_trains_the_best_longest(
    tiny_config: Path, tmp_path: Path, started: list[list[str]]
) -> None:
    output_dir = tmp_path / "sweep"
    rates = "learning_rate=1e-5,1e-4,1e-3,1e-2"
    main(["sweep", str(tiny_config), "--option", rates, "--halving", "2", "--output_dir", str(output_dir)])
    assert [(row["learning_rate"], row["length"]) for row in trials(output_dir)] == [
        ("1e-2", "12 steps"), ("1e-3", "12 steps"), ("1e-4", "6 steps"), ("1e-5", "6 steps"),
    ]  # fmt: skip
    assert len(started) == 6
    shorter = output_dir / "1_of_2" / "learning_rate=1e-4" / "arguments.yaml"
    assert "max_steps: 6\n" in shorter.read_text()  # a whole schedule, not half of a longer one


@pytest.mark.parametrize(("points", "halving"), [(2, 2), (6, 2), (27, 3), (5, 4), (1, 2)])
def test_rounds_keep_a_share_and_end_with_the_whole_training(points: int, halving: int) -> None:
    counts, divisors = zip(*rounds(points, halving), strict=True)
    assert counts[0] == points
    assert divisors[-1] == 1
    assert all(earlier == halving * later for earlier, later in pairwise(divisors))
    assert all(later == -(-earlier // halving) for earlier, later in pairwise(counts))
    assert points == 1 or counts[-1] > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--option", "learning_rte=1"], "did you mean --learning_rate"),
        (["--option", "learning_rate"], "expected NAME=VALUE,VALUE"),
        (["--option", "learning_rate=1e-3,1e-3"], "a value is repeated"),
        (["--option", "learning_rate=1e-3", "--option", "learning_rate=1e-2"], "learning_rate is given twice"),
        (["--option", "learning_rate=1e-3,-1"], "learning_rate=-1.0"),
        (["--option", "learning_rate=1e-3", "--halving", "1"], "halving=1 must be at least 2"),
        (["--option", "output_dir=a,b"], "unknown option --output_dir"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_trained(
    words: list[str],
    message: str,
    tiny_config: Path,
    tmp_path: Path,
    started: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(tiny_config), *words, "--output_dir", str(tmp_path / "sweep")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not started
