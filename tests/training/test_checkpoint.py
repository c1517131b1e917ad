"""Laws of checkpoints: complete or absent, verified before use, and a full disk never harms an existing one."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import train_accelerate
from minigpt.training.checkpoint_files import find_damage, newest_undamaged
from minigpt.utils.errors import EXIT_FAILURE, RunFailure, UserError
from minigpt.utils.files import append_line
from minigpt.utils.run_files import checkpoint_step, find_checkpoints
from support.runs import command, finish, metrics
from support.tensors import different_tensors
from train_accelerate import Run

Train = Callable[[list[str]], int]


@pytest.fixture
def run_dir(tiny_run: list[str], train_here: Train, tmp_path: Path) -> Path:
    """A run of twelve steps with checkpoints after 5, 6 (the best at that time), 10 and 12."""
    assert train_here(tiny_run) == 0
    return tmp_path / "run"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_damage_to_any_file_is_found_and_the_newest_undamaged_checkpoint_is_chosen(run_dir: Path) -> None:
    *_, older, newest = find_checkpoints(run_dir)
    assert newest_undamaged(find_checkpoints(run_dir)) == (newest, [])
    names = sorted(path.name for path in newest.iterdir())
    assert {"model.safetensors", "optimizer.safetensors", "training_state.json", "checkpoint.json"} <= set(names)
    for name in names:
        content = (newest / name).read_bytes()
        for damage in (truncate, flip_a_bit, Path.unlink):
            damage(newest / name)
            chosen, (note,) = newest_undamaged(find_checkpoints(run_dir))
            assert chosen == older
            assert note.startswith(f"{newest} is damaged and skipped: ")
            assert name in note
            (newest / name).write_bytes(content)
            assert find_damage(newest) is None


def test_a_run_resumed_from_an_older_checkpoint_because_the_newest_is_damaged_equals_an_uninterrupted_one(
    run_dir: Path, tiny_run: list[str], train_here: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = tmp_path / "uninterrupted"
    uninterrupted.mkdir()
    (run_dir / "model.safetensors").rename(uninterrupted / "model.safetensors")
    shutil.rmtree(run_dir / "checkpoint-12")
    flip_a_bit(run_dir / "checkpoint-10" / "optimizer.safetensors")
    capsys.readouterr()
    assert train_here([*tiny_run, "--resume_from_checkpoint", "latest"]) == 0
    output = capsys.readouterr().out
    assert "checkpoint-10 is damaged and skipped: optimizer.safetensors has changed since it was written" in output
    assert "checkpoint-6 after step 6" in output
    assert different_tensors(run_dir, uninterrupted) == []


def test_a_checkpoint_is_never_deleted_under_its_name(
    run_dir: Path, tiny_run: list[str], train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / ".writing-checkpoint-7").mkdir()
    (run_dir / ".deleting-checkpoint-3").mkdir()
    (run_dir / ".deleting-checkpoint-3" / "model.safetensors").touch()
    shutil.rmtree(run_dir / "checkpoint-12")
    rmtree, deleted = shutil.rmtree, []

    def recording_rmtree(folder: Path, *args: object, **kwargs: object) -> None:
        deleted.append(Path(folder).name)
        rmtree(folder, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "rmtree", recording_rmtree)
    assert train_here([*tiny_run, "--save_total_limit", "1", "--resume_from_checkpoint", "latest"]) == 0
    assert [path.name for path in find_checkpoints(run_dir)] == ["checkpoint-12"]
    assert {".writing-checkpoint-7", ".deleting-checkpoint-3", ".deleting-checkpoint-10"} <= set(deleted)
    assert not any(name.startswith("checkpoint-") for name in deleted)
    assert not list(run_dir.glob(".deleting-*"))


def test_a_damaged_checkpoint_that_is_given_by_name_is_refused(run_dir: Path, tiny_run: list[str]) -> None:
    truncate(run_dir / "checkpoint-10" / "model.safetensors")
    run = finish(command(*tiny_run, "--resume_from_checkpoint", run_dir / "checkpoint-10"))
    assert run.returncode == 2
    assert "checkpoint-10 is damaged: model.safetensors has" in run.stderr
    assert "'latest' skips damaged ones" in run.stderr


def test_a_run_with_only_damaged_checkpoints_is_not_restarted_from_the_beginning(
    run_dir: Path, tiny_run: list[str]
) -> None:
    for folder in find_checkpoints(run_dir):
        truncate(folder / "training_state.json")
    run = finish(command(*tiny_run, "--resume_from_checkpoint", "latest"))
    assert run.returncode == 2
    assert "no checkpoint is undamaged, start from the beginning with --overwrite_output_dir" in run.stderr
    assert len(find_checkpoints(run_dir)) == 4


def test_a_checkpoint_of_another_optimizer_is_refused_before_anything_is_written(
    run_dir: Path, tiny_run: list[str], train_here: Train
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    with pytest.raises(UserError, match=r"optimizer=muon, but .* was trained with adamw: .*; give the same value, or"):
        train_here([*tiny_run, "--optimizer", "muon", "--resume_from_checkpoint", "latest"])
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_checkpoints_written_in_the_background_equal_synchronous_ones(
    tiny_run: list[str], train_here: Train, tmp_path: Path, run_dir: Path
) -> None:
    in_background = tmp_path / "background"
    assert train_here([*tiny_run, "--output_dir", str(in_background), "--async_save"]) == 0
    checkpoints = find_checkpoints(run_dir)
    assert [path.name for path in find_checkpoints(in_background)] == [path.name for path in checkpoints]
    for checkpoint in checkpoints:
        assert find_damage(in_background / checkpoint.name) is None
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert different_tensors(checkpoint, in_background / checkpoint.name, file) == []


Fill = Callable[[], Callable[[], None]]


@pytest.fixture
def fill(small_disk: tuple[Path, Callable[[int], None]]) -> Fill:
    """Fills the small disk to its last byte, and returns a function that makes room again."""
    ballast = small_disk[0] / "ballast"

    def fill() -> Callable[[], None]:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        return ballast.unlink

    return fill


def before_steps(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], object]]) -> None:
    """Call an action before the step after `state.step`."""
    take_step = train_accelerate.take_step

    def wrapped(run: Run, learning_rate: float) -> tuple[torch.Tensor, float]:
        actions.get(run.state.step, lambda: None)()
        return take_step(run, learning_rate)

    monkeypatch.setattr("train_accelerate.take_step", wrapped)


def test_a_disk_that_is_full_for_a_while_costs_only_what_is_written_in_that_time(
    small_disk: tuple[Path, Callable[[int], None]],
    fill: Fill,
    tiny_run: list[str],
    train_here: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*tiny_run, "--save_steps", "3", "--eval_steps", "2", "--sample_steps", "2", "--report_to", "tensorboard"]
    assert train_here(words) == 0
    run_dir = small_disk[0] / "run"
    make_room: list[Callable[[], None]] = []
    before_steps(monkeypatch, {4: lambda: make_room.append(fill()), 7: lambda: make_room[0]()})
    capsys.readouterr()
    assert train_here([*words, "--output_dir", str(run_dir)]) == 0
    output = capsys.readouterr().out
    assert list(metrics(run_dir, "train/loss")) == [1, 2, 3, 4, 8, 9, 10, 11, 12]
    assert "checkpoint-6" not in names_of_checkpoints(run_dir)
    assert output.count("WARNING: metrics are not written") == 1
    assert "there is room again, metrics are written" in output
    assert {find_damage(folder) for folder in find_checkpoints(run_dir)} == {None}
    assert different_tensors(run_dir, tmp_path / "run") == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("take_step", "checkpoint-12 was not saved"), ("write_final_model", "the final model was not")],
)
def test_a_disk_that_is_full_at_the_end_harms_no_checkpoint_and_the_run_can_be_finished(
    small_disk: tuple[Path, Callable[[int], None]],
    fill: Fill,
    tiny_run: list[str],
    train_here: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    message: str,
) -> None:
    disk, _ = small_disk
    words = [*tiny_run, "--save_steps", "3", "--eval_steps", "0"]
    assert train_here(words) == 0
    make_room: list[Callable[[], None]] = []
    with monkeypatch.context() as patch:
        if name == "take_step":
            before_steps(patch, {11: lambda: make_room.append(fill())})
        else:
            write = train_accelerate.write_final_model

            def wrapped(*args: object) -> None:
                make_room.append(fill())
                write(*args)  # type: ignore[arg-type]

            patch.setattr("train_accelerate.write_final_model", wrapped)
        with pytest.raises(RunFailure, match=f"{message}.* MB are needed; free some space and resume with") as failure:
            train_here([*words, "--output_dir", str(disk / "run")])
    assert failure.value.exit_code == EXIT_FAILURE
    assert {find_damage(folder) for folder in find_checkpoints(disk / "run")} == {None}

    with pytest.raises(UserError, match="MB are needed for one checkpoint and the final model"):
        train_here([*words, "--output_dir", str(disk / "other")])
    assert not (disk / "other").exists()
    make_room[0]()
    assert train_here([*words, "--output_dir", str(disk / "run"), "--resume_from_checkpoint", "latest"]) == 0
    assert different_tensors(disk / "run", tmp_path / "run") == []


def test_a_line_that_finds_no_room_leaves_no_part_of_itself(
    small_disk: tuple[Path, Callable[[int], None]], fill: Fill
) -> None:
    path = small_disk[0] / "metrics.jsonl"
    content = b'{"step": 1}\n' * 340  # the rest of its block takes a part of the next line
    path.write_bytes(content)
    make_room = fill()
    with pytest.raises(OSError, match="No space left"):
        append_line(path, '{"step": 2, "train/loss": 1.0, "train/lr": 0.001}')
    assert path.read_bytes() == content
    make_room()
    append_line(path, '{"step": 2}')
    assert path.read_bytes() == content + b'{"step": 2}\n'


def names_of_checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob("checkpoint-*"))


def test_checkpoints_that_a_resume_abandons_neither_displace_the_new_ones_nor_come_back(
    tiny_run: list[str], train_here: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a limit, a run resumed from an early checkpoint keeps what it writes, and 'latest' continues that."""
    run_dir = tmp_path / "run"
    words = [*tiny_run, "--save_steps", "2", "--eval_steps", "0"]
    assert train_here([*words, "--max_steps", "10"]) == 0
    resume = [*words, "--resume_from_checkpoint", str(run_dir / "checkpoint-2"), "--save_total_limit", "2"]
    assert train_here([*resume, "--max_steps", "6"]) == 0
    assert names_of_checkpoints(run_dir) == [
        "checkpoint-10.abandoned", "checkpoint-4", "checkpoint-4.abandoned",
        "checkpoint-6", "checkpoint-6.abandoned", "checkpoint-8.abandoned",
    ]  # fmt: skip
    capsys.readouterr()
    assert train_here([*words, "--max_steps", "8", "--resume_from_checkpoint", "latest"]) == 0
    assert "checkpoint-6 after step 6" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_set_aside_and_does_not_count_for_the_limit(
    run_dir: Path, tiny_run: list[str], train_here: Train
) -> None:
    flip_a_bit(run_dir / "checkpoint-12" / "model.safetensors")
    words = [*tiny_run, "--resume_from_checkpoint", "latest", "--save_total_limit", "1", "--max_steps", "14"]
    assert train_here(words) == 0
    assert "checkpoint-12.damaged" in names_of_checkpoints(run_dir)
    newest, notes = newest_undamaged(find_checkpoints(run_dir))
    assert (newest, notes) == (run_dir / "checkpoint-14", [])


def test_an_improved_validation_loss_is_saved_only_if_asked(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    words = [word for word in tiny_run if word != "--save_best"]
    words += ["--save_steps", "0", "--eval_steps", "3"]
    for option, saved in (([], {12}), (["--save_best"], {3, 6, 9, 12}), (["--load_best_model_at_end"], {3, 6, 9, 12})):
        run_dir = tmp_path / "-".join(["best", *option])
        assert train_here([*words, "--output_dir", str(run_dir), *option]) == 0
        assert {checkpoint_step(folder) for folder in find_checkpoints(run_dir)} == saved


def test_latest_in_a_folder_that_holds_no_run_changes_nothing(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    thesis = tmp_path / "run" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="is not empty and holds no run of MiniGPT"):
        train_here([*tiny_run, "--resume_from_checkpoint", "latest"])
    assert [path.name for path in thesis.parent.iterdir()] == ["thesis.tex"]


def test_a_linked_checkpoint_is_resumed_and_only_its_link_is_deleted(
    run_dir: Path, tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "large_disk"
    elsewhere.mkdir()
    for name in ("checkpoint-10", "checkpoint-12"):
        (run_dir / name).rename(elsewhere / name)
        (run_dir / name).symlink_to(elsewhere / name)
    words = [*tiny_run, "--resume_from_checkpoint", "latest", "--save_total_limit", "1", "--max_steps", "15"]
    assert train_here(words) == 0
    assert names_of_checkpoints(run_dir) == ["checkpoint-15"]
    assert [find_damage(elsewhere / name) for name in ("checkpoint-10", "checkpoint-12")] == [None, None]


def test_a_folder_with_the_name_of_another_step_is_refused(
    run_dir: Path, tiny_run: list[str], train_here: Train
) -> None:
    shutil.rmtree(run_dir / "checkpoint-12")
    (run_dir / "checkpoint-10").rename(run_dir / "checkpoint-11")
    with pytest.raises(UserError, match="checkpoint-11 holds the checkpoint of step 10; rename it to checkpoint-10"):
        train_here([*tiny_run, "--resume_from_checkpoint", "latest"])
