"""Laws of checkpoints: whole or not there, never trusted blindly, and a full disk costs nothing that is safe."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigpt.training.checkpoint_files import damage, newest_sound
from minigpt.utils.run_files import find_checkpoints
from support.runs import command, finish

Train = Callable[[list[str]], int]


@pytest.fixture
def run_dir(tiny_run: list[str], train_here: Train, tmp_path: Path) -> Path:
    """A run of twelve steps with checkpoints after 5, 6 (the best then), 10 and 12."""
    assert train_here(tiny_run) == 0
    return tmp_path / "run"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_every_damage_to_every_file_is_named_and_the_newest_whole_checkpoint_is_taken(run_dir: Path) -> None:
    *_, older, newest = find_checkpoints(run_dir)
    assert newest_sound(run_dir) == (newest, [])
    names = sorted(path.name for path in newest.iterdir())
    assert {"model.safetensors", "optimizer.safetensors", "training_state.json", "checkpoint.json"} <= set(names)
    for name in names:
        content = (newest / name).read_bytes()
        for harm in (truncate, flip_a_byte, Path.unlink):
            harm(newest / name)
            found, (note,) = newest_sound(run_dir)
            assert found == older
            assert note.startswith(f"{newest} is damaged and left out: ")
            assert name in note
            (newest / name).write_bytes(content)
            assert damage(newest) is None


def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_if_nothing_had_happened(
    run_dir: Path, tiny_run: list[str], train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = load_file(run_dir / "model.safetensors")
    shutil.rmtree(run_dir / "checkpoint-12")
    flip_a_byte(run_dir / "checkpoint-10" / "optimizer.safetensors")
    (run_dir / "model.safetensors").unlink()
    capsys.readouterr()
    assert train_here([*tiny_run, "--resume_from_checkpoint", "latest"]) == 0
    said = capsys.readouterr().out
    assert "checkpoint-10 is damaged and left out: optimizer.safetensors is not what was written" in said
    assert "checkpoint-6 after step 6" in said
    resumed = load_file(run_dir / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())


def test_a_checkpoint_that_goes_is_never_seen_in_part(
    run_dir: Path, tiny_run: list[str], train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / ".writing-checkpoint-7").mkdir()
    (run_dir / ".deleting-checkpoint-3").mkdir()
    (run_dir / ".deleting-checkpoint-3" / "model.safetensors").touch()
    real, seen = shutil.rmtree, []

    def look_and_remove(folder: Path, *args: object, **kwargs: object) -> None:
        seen.append(Path(folder).name)
        real(folder, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "rmtree", look_and_remove)
    shutil.rmtree(run_dir / "checkpoint-12")
    seen.clear()
    assert train_here([*tiny_run, "--save_total_limit", "1", "--resume_from_checkpoint", "latest"]) == 0
    assert [path.name for path in find_checkpoints(run_dir)] == ["checkpoint-12"]
    assert {".writing-checkpoint-7", ".deleting-checkpoint-3", ".deleting-checkpoint-10"} <= set(seen)
    assert not any(name.startswith("checkpoint-") for name in seen)
    assert not list(run_dir.glob(".deleting-*"))


def test_a_damaged_checkpoint_that_was_asked_for_by_name_is_refused(run_dir: Path, tiny_run: list[str]) -> None:
    truncate(run_dir / "checkpoint-10" / "model.safetensors")
    run = finish(command(*tiny_run, "--resume_from_checkpoint", run_dir / "checkpoint-10"))
    assert run.returncode == 2
    assert "checkpoint-10 is damaged: model.safetensors has" in run.stderr
    assert "'latest' takes the newest whole one" in run.stderr


def test_where_no_checkpoint_is_whole_nothing_is_trained_over_them(run_dir: Path, tiny_run: list[str]) -> None:
    for folder in find_checkpoints(run_dir):
        truncate(folder / "training_state.json")
    run = finish(command(*tiny_run, "--resume_from_checkpoint", "latest"))
    assert run.returncode == 2
    assert "no checkpoint is whole, start anew with --overwrite_output_dir" in run.stderr
    assert len(find_checkpoints(run_dir)) == 4


def test_saving_while_training_saves_the_same(
    tiny_run: list[str], train_here: Train, tmp_path: Path, run_dir: Path
) -> None:
    others = [str(tmp_path / "async") if word == str(run_dir) else word for word in tiny_run]
    assert train_here([*others, "--async_save"]) == 0
    for folder in find_checkpoints(run_dir):
        twin = tmp_path / "async" / folder.name
        assert damage(twin) is None
        for name in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = load_file(folder / name), load_file(twin / name)
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_full_disk_is_told_in_time_and_costs_nothing_that_is_safe(
    small_disk: tuple[Path, Callable[[int], None]], tiny_run: list[str], tmp_path: Path
) -> None:
    disk, resize = small_disk
    larger = ["--hidden_size", "128", "--save_steps", "3", "--eval_steps", "0", "--save_total_limit", "10"]
    words = [*tiny_run, *larger, "--output_dir"]
    full = finish(command(*words, disk / "run"))
    assert full.returncode == 2, full.stdout + full.stderr
    assert "NOT SAVED, the run goes on: checkpoint-9: " in full.stdout
    assert "checkpoint-12 was not saved: " in full.stderr
    assert "MB are needed" in full.stderr
    assert [damage(folder) for folder in find_checkpoints(disk / "run")] == [None, None]

    refused = finish(command(*words, disk / "other"))
    assert refused.returncode == 2
    assert "MB are needed for one checkpoint and the final model" in refused.stderr
    assert not (disk / "other").exists()

    resize(64)
    resumed = finish(command(*words, disk / "run", "--resume_from_checkpoint", "latest"))
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 6" in resumed.stdout
    straight = finish(command(*words, tmp_path / "straight"))
    assert straight.returncode == 0, straight.stderr
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (disk / "run", tmp_path / "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
