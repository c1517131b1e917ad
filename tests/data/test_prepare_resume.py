"""An interrupted preparation resumes and writes the same bytes, whatever interrupted it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from minigpt.config.arguments import DataArguments
from minigpt.data import prepare as prepare_module
from minigpt.data.prepare import prepare
from minigpt.data.shard_writer import JOURNAL
from minigpt.data.tokenizer import train_bpe
from minigpt.utils.errors import UserError

WORDS = [
    "the",
    "king",
    "of",
    "all",
    "that",
    "was",
    "said",
    "in",
    "time",
    "and",
    "with",
    "great",
    "care",
    "over",
    "hills",
]
SHARD_TOKENS = 4_000


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The options of a preparation of many shards, and the folder that it writes without an interruption."""
    folder = tmp_path_factory.mktemp("job")
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randrange(400))) for _ in range(1_200)]
    texts[600] = " ".join(generator.choices(WORDS, k=60_000))  # one document of several parts and shards
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_bpe(texts[:100], 300).save_pretrained(folder / "tokenizer")
    words = ["--train_file", str(file), "--tokenizer", str(folder / "tokenizer")]
    words += ["--shard_tokens", str(SHARD_TOKENS)]
    assert run(words, folder / "expected", 1).wait() == 0
    return words, folder / "expected"


def run(words: list[str], output_dir: Path, workers: int, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "minigpt", "prepare", *words, "--output_dir", str(output_dir)]
    command += ["--preprocessing_num_workers", str(workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def complete_shards(output_dir: Path) -> int:
    return len(list((output_dir.parent / f".{output_dir.name}.partial").glob("train-*.bin")))


def kill_when(process: subprocess.Popen[str], ready) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and not ready():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()


def test_the_job_has_many_shards_that_cut_documents(job) -> None:
    manifest = json.loads((job[1] / "manifest.json").read_text())
    shards = manifest["splits"]["train"]["shards"]
    assert len(shards) > 20
    assert all(shard["tokens"] == SHARD_TOKENS for shard in shards[:-1])


def test_a_killed_preparation_resumes_after_the_last_complete_shard(job, tmp_path: Path) -> None:
    words, expected = job
    output_dir = tmp_path / "out"
    for workers, shards in [(1, 3), (2, 9)]:
        kill_when(run(words, output_dir, workers), lambda count=shards: complete_shards(output_dir) >= count)
        assert not output_dir.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("train-*.bin")}
    assert len(kept) >= 9
    last = run(words, output_dir, 1)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert "resuming after" in errors
    assert content(output_dir) == content(expected)
    # no shard is written twice, except the last one if the kill came between its rename and the journal
    rewritten = [name for name, written in kept.items() if (output_dir / name).stat().st_mtime_ns != written]
    assert rewritten in ([], [max(kept)])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("suffix", ["bin", "marks"])
def test_a_shard_that_was_cut_since_the_journal_recorded_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    rows = [{"prompt": f"{index} + 1 = ", "completion": str(index + 1)} for index in range(500)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = DataArguments(train_file=[str(tmp_path / "rows.jsonl")], tokenizer="char", shard_tokens=1_000)
    with monkeypatch.context() as killed:
        killed.setattr(prepare_module, "write_manifest", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            prepare(args, tmp_path / "out")
    partial = tmp_path / ".out.partial"
    whole = (partial / f"train-00002.{suffix}").read_bytes()
    (partial / f"train-00002.{suffix}").write_bytes(whole[:-2])
    for _ in range(2):  # the complete shards are still there after the error
        with pytest.raises(UserError, match=rf"train-00002\.{suffix} has {len(whole) - 2} bytes where {len(whole)} "):
            prepare(args, tmp_path / "out")
    (partial / f"train-00002.{suffix}").write_bytes(whole)
    assert content(prepare(args, tmp_path / "out")) == content(prepare(args, tmp_path / "uninterrupted"))


@pytest.mark.slow
def test_twenty_kills_at_random_moments_leave_the_same_bytes(job, tmp_path: Path) -> None:
    words, expected = job
    started = time.monotonic()
    run(words, tmp_path / "timed", 1).wait()
    duration = time.monotonic() - started
    generator = random.Random(os.getpid())
    for trial in range(20):
        output_dir = tmp_path / f"out{trial}"
        moment = time.monotonic() + generator.uniform(0.2, 1.0) * duration
        kill_when(run(words, output_dir, 1 + trial % 2), lambda deadline=moment: time.monotonic() > deadline)
        if not output_dir.exists() or (output_dir / JOURNAL).exists():
            assert run(words, output_dir, 1 + trial % 3).wait() == 0
        assert content(output_dir) == content(expected)
        shutil.rmtree(output_dir)


def test_shards_do_not_depend_on_the_number_of_processes(job, tmp_path: Path) -> None:
    words, expected = job
    assert run(words, tmp_path / "out", 3).wait() == 0
    assert content(tmp_path / "out") == content(expected)


def test_a_full_disk_is_reported_and_the_same_command_resumes_after_space_is_made(job, small_disk) -> None:
    words, expected = job
    disk, _ = small_disk
    full = run(words, disk / "out", 1)
    while complete_shards(disk / "out") < 2:
        assert full.poll() is None
        time.sleep(0.002)
    full.send_signal(signal.SIGSTOP)
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    full.send_signal(signal.SIGCONT)
    _, errors = full.communicate(timeout=60)
    assert full.returncode == 2
    assert "the disk is full; make space and run the same command again to resume" in errors
    assert "Traceback" not in errors
    (disk / "ballast").unlink()
    assert run(words, disk / "out", 1).wait() == 0
    assert content(disk / "out") == content(expected)


def test_too_little_disk_space_is_reported_before_anything_is_written(job, tmp_path: Path, monkeypatch) -> None:
    words, _ = job
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"the tokens need about \S+ GB but 0\.00 GB are free"):
        prepare(DataArguments(train_file=[words[1]], tokenizer=words[3]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_another_text_or_option_does_not_resume(job, tmp_path: Path) -> None:
    words, expected = job
    output_dir = tmp_path / "out"
    other = [*words[:-1], str(SHARD_TOKENS // 2)]
    kill_when(run(other, output_dir, 1), lambda: complete_shards(output_dir) >= 2)
    assert run(words, output_dir, 1).wait() == 0
    assert content(output_dir) == content(expected)


def test_a_kill_after_the_last_rename_loses_nothing(job, tmp_path: Path) -> None:
    words, expected = job
    shutil.copytree(expected, tmp_path / "out")
    kill_when(run(words, tmp_path / "other", 1), lambda: complete_shards(tmp_path / "other") >= 1)
    shutil.move(tmp_path / ".other.partial" / JOURNAL, tmp_path / "out" / JOURNAL)
    before = (tmp_path / "out" / "train-00000.bin").stat().st_mtime_ns
    assert run(words, tmp_path / "out", 1).wait() == 0
    assert content(tmp_path / "out") == content(expected)
    assert (tmp_path / "out" / "train-00000.bin").stat().st_mtime_ns == before
