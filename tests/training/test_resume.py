"""Laws of resuming with other options, and of the best checkpoint of a resumed run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt.config.parser import parse_arguments
from minigpt.utils.errors import UserError
from support.runs import metrics
from support.tensors import different_tensors

Train = Callable[[list[str]], int]
RESUME = ["--resume_from_checkpoint", "latest"]
NOTE = "resumed with other options: "


@pytest.fixture
def run_dir(tiny_run: list[str], train_here: Train, tmp_path: Path) -> Path:
    """A run of four steps with checkpoints after 2 and 4."""
    assert train_here([*tiny_run, "--max_steps", "4", "--save_steps", "2", "--eval_steps", "0"]) == 0
    return tmp_path / "run"


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"], "max_steps 4 -> 6"),
        (
            ["--dropout", "0", "--attn_implementation", "eager", "--per_device_train_batch_size", "8",
             "--learning_rate", "2e-2", "--lr_scheduler_type", "constant", "--weight_decay", "0",
             "--adam_beta1", "0.8", "--mixed_precision", "bf16"],
            "dropout 0.1 -> 0.0, attn_implementation sdpa -> eager, max_steps 4 -> 6, learning_rate 0.01 -> 0.02, "
            "lr_scheduler_type cosine -> constant, weight_decay 0.1 -> 0.0, adam_beta1 0.9 -> 0.8, "
            "mixed_precision no -> bf16, samples per step 4 -> 8",
        ),
    ],
)  # fmt: skip
def test_every_option_that_differs_from_the_checkpoint_is_listed_before_the_first_step(
    run_dir: Path,
    tiny_run: list[str],
    train_here: Train,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    changes: str,
) -> None:
    capsys.readouterr()
    words = [*tiny_run, "--save_steps", "2", "--eval_steps", "0", "--max_steps", "6", *RESUME]
    assert train_here([*words, *options]) == 0
    before_the_first_step, _, _ = capsys.readouterr().out.partition("\nstep 5/6")
    assert f"{NOTE}{changes}\n" in f"{before_the_first_step}\n"
    recorded = parse_arguments([str(run_dir / "arguments.yaml")], "")
    expected = parse_arguments([*words, *options], "")
    assert recorded.as_yaml() == expected.as_yaml()


def test_a_run_resumed_with_the_same_options_lists_none(
    run_dir: Path, tiny_run: list[str], train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run_dir / "checkpoint-4")
    capsys.readouterr()
    words = [*tiny_run, "--max_steps", "4", "--save_steps", "2", "--eval_steps", "0"]
    assert train_here([*words, *RESUME]) == 0
    output = capsys.readouterr().out
    assert "after step 2" in output
    assert NOTE not in output


def test_what_cannot_be_continued_is_refused_before_anything_on_disk_changes(
    run_dir: Path, tiny_run: list[str], train_here: Train
) -> None:
    before = content(run_dir)
    at = tiny_run.index("--max_steps")
    without_length = [*tiny_run[:at], *tiny_run[at + 2 :], "--warmup_steps", "0", *RESUME]
    for options, message in (
        (["--max_steps", "3"], "max_steps=3 is below the 4 steps that .*checkpoint-4 has made; give at least"),
        (["--num_train_epochs", "1e-3"], r"num_train_epochs=0.001 \(max_steps=1\) is below the 4 steps"),
        (["--seed", "7", "--max_steps", "6"], "seed=7, but .* was trained with 1337"),
        (["--stride", "8", "--max_steps", "6"], "stride=8, but .* was trained with None"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            train_here([*without_length, *options])
        assert content(run_dir) == before


def test_a_finished_run_is_finished_again_in_another_folder_without_metrics(
    run_dir: Path, tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    words = [*tiny_run, "--max_steps", "4", "--eval_steps", "0", "--output_dir", str(tmp_path / "other")]
    assert train_here([*words, "--resume_from_checkpoint", str(run_dir / "checkpoint-4")]) == 0
    assert different_tensors(tmp_path / "other", run_dir) == []


def test_a_run_resumed_into_another_folder_ends_with_the_best_model_of_both(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    # with this learning rate the first evaluation has the lowest loss
    words = [*tiny_run, "--max_steps", "4", "--save_steps", "2", "--eval_steps", "1", "--learning_rate", "3"]
    words += ["--load_best_model_at_end", "--lr_scheduler_type", "constant"]
    assert train_here(words) == 0
    run_dir, other = tmp_path / "run", tmp_path / "other"
    validation = metrics(run_dir, "val/loss")
    best = run_dir / f"checkpoint-{min(validation, key=lambda step: validation[step])}"
    assert best.name == "checkpoint-1"
    resume = [*words, "--output_dir", str(other), "--resume_from_checkpoint", str(run_dir / "checkpoint-2")]
    assert train_here(resume) == 0
    assert different_tensors(other, run_dir) == []
    assert different_tensors(other / best.name, best, "optimizer.safetensors") == []

    # one of another run, with the same name, is not taken for it
    shutil.rmtree(other)
    assert (
        train_here([*words, "--output_dir", str(other), "--seed", "7", "--max_steps", "1", "--warmup_steps", "0"]) == 0
    )
    assert train_here(resume) == 0
    assert different_tensors(other, run_dir) == []
    assert (other / "checkpoint-1.abandoned").is_dir()

    shutil.rmtree(other)
    (best / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"validation loss: model\.safetensors is missing; resume from an earlier"):
        train_here(resume)
    shutil.rmtree(best)
    with pytest.raises(UserError, match="needs checkpoint-1, which has the lowest validation loss: it is neither in"):
        train_here(resume)
    assert not other.exists()
