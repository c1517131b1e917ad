"""Laws of `minigpt compare`: equal configurations are not told apart, different ones are, and nothing runs twice."""

import json
from pathlib import Path

import pytest
import yaml

from minigpt.cli import main
from minigpt.experiments.compare import Comparison, Pair
from minigpt.experiments.runs import Result


def changed(config: Path, name: str, **options: object) -> Path:
    """A copy of `config` with other options."""
    path = config.with_name(name)
    path.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | options), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_configuration_equals_itself_to_the_last_bit(
    tiny_config: Path, tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = tmp_path / "compare"
    words = ["compare", str(tiny_config), str(tiny_config), "--output_dir", str(output_dir)]
    main([*words, "--smallest_difference", "1e-6"])
    comparison = json.loads((output_dir / "comparison.json").read_text())
    assert [pair["a_loss"] - pair["b_loss"] for pair in comparison["pairs"]] == [0.0] * 4
    assert len({pair["a_loss"] for pair in comparison["pairs"]}) == 4  # the seeds differ
    assert comparison["verdict"].startswith("settled, no difference of 1e-06 or more")
    # A and B take turns in going first
    order = [Path(command[command.index("--output_dir") + 1]).parent.name for command in started]
    assert order == ["A", "B", "B", "A", "A", "B", "B", "A"]
    assert "| 1340 |" in capsys.readouterr().out


def test_a_real_difference_is_settled_and_a_second_call_trains_nothing(
    tiny_config: Path, tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    better = changed(tiny_config, "better.yaml", learning_rate=3e-2)
    words = ["compare", str(tiny_config), str(better), "--output_dir", str(tmp_path / "compare"), "--max_pairs", "8"]
    main(words)
    assert "\nB is better: B's loss minus A's is -" in capsys.readouterr().out
    trained = len(started)
    main(words)
    assert len(started) == trained
    assert "\nB is better: B's loss minus A's is -" in capsys.readouterr().out


def test_an_interrupted_run_is_resumed(tiny_config: Path, tmp_path: Path, started: list[list[str]]) -> None:
    config = changed(tiny_config, "saving.yaml", save_steps=6)
    words = ["compare", str(config), str(config), "--output_dir", str(tmp_path / "compare"), "--max_pairs", "1"]
    main(words)
    run_dir = tmp_path / "compare" / "A" / "seed-1337"
    losses = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "config.json").unlink()  # as if the process had been killed before it wrote the model
    for file in (run_dir / "checkpoint-12").iterdir():
        file.unlink()
    (run_dir / "checkpoint-12").rmdir()
    main(words)
    assert started[-1][-2:] == ["--resume_from_checkpoint", "latest"]
    assert len(started) == 3
    assert (run_dir / "metrics.jsonl").read_text().splitlines()[-1].split("elapsed_s")[0] in losses


def test_a_folder_with_other_options_is_left_alone(
    tiny_config: Path, tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(tiny_config), str(tiny_config), "--output_dir", str(tmp_path / "compare")]
    main([*words, "--max_pairs", "1"])
    with pytest.raises(SystemExit) as stop:
        main([*words, "--learning_rate", "1e-2"])
    assert stop.value.code == 2
    assert "seed-1337 holds a run with other options; give another --output_dir" in capsys.readouterr().err
    assert len(started) == 2


def test_a_run_that_fails_names_its_folder_and_the_reason(
    tiny_config: Path, tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    short = changed(tiny_config, "short.yaml", warmup_steps=13)
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(short), str(tiny_config), "--output_dir", str(tmp_path / "compare")])
    assert stop.value.code == 2
    assert "warmup_steps=13 is more than the 12 steps of the run" in capsys.readouterr().err


def result(folder: Path, fingerprint: str, loss: float, bits: float, elapsed_s: float = 1.0) -> Result:
    folder.mkdir()
    (folder / "data.json").write_text(json.dumps({"fingerprint": fingerprint}))
    return Result(folder, loss, bits, elapsed_s)


def test_runs_on_other_tokens_are_compared_in_bits_per_byte(tmp_path: Path) -> None:
    """A larger vocabulary has a higher loss per token, and may still be better."""
    pairs = [
        Pair(
            seed,
            result(tmp_path / f"a{seed}", "x", 3.0, 2.0),
            result(tmp_path / f"b{seed}", "y", 4.0, 1.9 - seed / 1e3),
        )
        for seed in range(5)
    ]
    comparison = Comparison("A", "B", 0.005, 20, pairs)
    assert comparison.unit == "bits per byte"
    assert comparison.verdict().startswith("B is better: B's loss minus A's is -0.1020 bits per byte")


def test_a_run_that_diverges_settles_the_comparison(tmp_path: Path) -> None:
    diverged = Result(result(tmp_path / "b", "x", 3.0, 2.0).run_dir, float("inf"), None, float("nan"))
    comparison = Comparison("A", "B", 0.005, 20, [Pair(0, result(tmp_path / "a", "x", 3.0, 2.0), diverged)])
    assert comparison.is_settled
    assert comparison.verdict() == "B diverged"
    json.dumps(comparison.as_dict(), allow_nan=False)
    assert "diverged" in comparison.as_table()
