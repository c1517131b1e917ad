"""Laws of the output folder: one trainer at a time, and an earlier run is only deleted once the new one works."""

import json
import re
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import transformers
from transformers import AutoTokenizer

from minigpt.config.arguments import Arguments
from minigpt.data.chat_template import read_chat_template
from minigpt.training.run_dir import OutputDir
from minigpt.utils.errors import UserError
from minigpt.utils.run_files import LOCK_FILE, REPLACED_DIR
from support.runs import command
from support.tiny import byte_tokenizer

Train = Callable[[list[str]], int]


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(LOCK_FILE)
    }


def endless(tiny_run: list[str]) -> subprocess.Popen[str]:
    """A training without end that has made its first step."""
    words = command(*tiny_run, "--max_steps", "1000000", "--save_steps", "0", "--eval_steps", "0")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            return process
    raise AssertionError(process.communicate()[1])


def test_a_second_training_is_refused_and_told_who_has_the_folder(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    first = endless(tiny_run)
    try:
        holder = json.loads((tmp_path / "run" / f"{LOCK_FILE}.json").read_text(encoding="utf-8"))
        message = f"is in use by process {first.pid} on {holder['host']} (since {holder['since']})"
        for option in ("--overwrite_output_dir", "--resume_from_checkpoint=latest"):
            with pytest.raises(UserError, match=re.escape(message)):
                train_here([*tiny_run, option])
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert train_here([*tiny_run, "--overwrite_output_dir"]) == 0  # a killed process holds nothing


def test_a_folder_that_is_deleted_while_its_run_trains_is_one_line(tiny_run: list[str], tmp_path: Path) -> None:
    words = command(*tiny_run, "--max_steps", "1000000", "--save_steps", "200", "--eval_steps", "0")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert any(line.startswith("step ") for line in process.stdout)
        (tmp_path / "run").rename(tmp_path / "gone")  # at once: rmtree would race with the files it writes
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()  # a training that does not notice would never end
    assert process.returncode == 2
    assert errors.splitlines()[-1].endswith("run was deleted while this run wrote into it; train again")
    assert "Traceback" not in errors


def test_a_start_that_fails_brings_the_earlier_run_back(
    tiny_run: list[str], train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_here(tiny_run) == 0
    before = content(tmp_path / "run")

    def fail(*args: object) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr("train_accelerate.take_step", fail)
    with pytest.raises(RuntimeError, match="no kernel"):
        train_here([*tiny_run, "--overwrite_output_dir", "--seed", "7"])
    assert content(tmp_path / "run") == before


def test_a_start_killed_before_its_first_step_loses_nothing(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert train_here(tiny_run) == 0
    before = content(run_dir)
    (run_dir / REPLACED_DIR).mkdir()  # as a kill leaves it
    for path in [path for path in run_dir.iterdir() if path.name not in (REPLACED_DIR, LOCK_FILE)]:
        path.rename(run_dir / REPLACED_DIR / path.name)
    (run_dir / "arguments.yaml").write_text("seed: 7\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds the run that an interrupted start was replacing"):
        train_here([*tiny_run, "--resume_from_checkpoint", "latest"])
    assert content(run_dir / REPLACED_DIR) == before
    assert train_here([*tiny_run, "--overwrite_output_dir"]) == 0
    assert not (run_dir / REPLACED_DIR).exists()
    assert content(run_dir).keys() == before.keys()


def test_a_start_killed_while_it_wrote_its_options_is_started_again(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in (LOCK_FILE, "arguments.yaml.partial"):  # as a kill leaves it
        (run_dir / name).touch()
    assert train_here(tiny_run) == 0


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert train_here(tiny_run) == 0
    (run_dir / "notes.txt").write_text("mine", encoding="utf-8")
    (run_dir / "data").mkdir()
    (run_dir / "data" / "text.txt").write_text("mine, too", encoding="utf-8")
    (run_dir / "README.md").write_text("an edited card", encoding="utf-8")
    words = [*tiny_run, "--max_steps", "4", "--overwrite_output_dir"]
    assert train_here(words) == 0
    assert (run_dir / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (run_dir / "data" / "text.txt").read_text(encoding="utf-8") == "mine, too"
    assert (run_dir / "README.md").read_text(encoding="utf-8") == "an edited card"
    assert sorted(path.name for path in run_dir.glob("checkpoint-*")) == ["checkpoint-4"]


def test_an_input_of_the_new_run_is_not_overwritten(tiny_run: list[str], train_here: Train, tmp_path: Path) -> None:
    assert train_here(tiny_run) == 0
    before = content(tmp_path / "run")
    shape = {"--hidden_size", "--num_hidden_layers", "--num_attention_heads"}
    words = [word for place, word in enumerate(tiny_run) if not {word, tiny_run[place - 1]} & shape]
    for model in (tmp_path / "run", tmp_path / "run" / "checkpoint-5"):
        with pytest.raises(UserError, match=f"model_name_or_path={model} is part of the run in output_dir"):
            train_here([*words, "--overwrite_output_dir", "--model_name_or_path", str(model)])
    assert content(tmp_path / "run") == before


def test_a_linked_output_folder_stays_a_link(tiny_run: list[str], train_here: Train, tmp_path: Path) -> None:
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "large_disk")
    for option in ([], ["--overwrite_output_dir"]):
        assert train_here([*tiny_run, *option]) == 0
        assert (tmp_path / "run").is_symlink()
        assert (tmp_path / "large_disk" / "model.safetensors").is_file()


def test_bad_input_leaves_no_folder_behind(tiny_run: list[str], train_here: Train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hidden_size=15"):
        train_here([*tiny_run, "--hidden_size", "15", "--output_dir", str(tmp_path / "a" / "b" / "run")])
    assert not (tmp_path / "a").exists()


def test_a_training_whose_output_nobody_reads_continues_to_its_end(tiny_run: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(command(*tiny_run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    assert process.wait(60) == 0, process.stderr.read()
    process.stderr.close()
    assert (tmp_path / "run" / "checkpoint-12").is_dir()
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_training_whose_output_goes_to_a_full_disk_continues_to_its_end(
    tiny_run: list[str], train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115  # closing it fails, too
    transformers.utils.logging.disable_progress_bar()  # as the program does; a bar would flush the log
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", log)
        assert train_here([*tiny_run, "--max_steps", "3"]) == 0
    with suppress(OSError):
        log.close()
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


def test_damaged_metrics_are_reported_before_a_resume_changes_anything(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    assert train_here(tiny_run) == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    metrics.write_text("".join([*lines[:3], "garbage\n", *lines[3:]]), encoding="utf-8")
    before = content(tmp_path / "run")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 4 is not a line of metrics"):
        train_here([*tiny_run, "--resume_from_checkpoint", "latest", "--max_steps", "14"])
    assert content(tmp_path / "run") == before


def test_what_a_run_could_not_write_over_is_refused_before_anything_changes(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert train_here(tiny_run) == 0
    obstacles: dict[str, Callable[[Path], object]] = {
        "checkpoint-7": Path.touch,
        "checkpoint-8": Path.mkdir,
        "checkpoint-9": lambda path: path.symlink_to(tmp_path / "nowhere"),
        "model-00001-of-00002.safetensors": Path.mkdir,
        "README.md": Path.mkdir,
        "loss.png": lambda path: path.symlink_to(tmp_path / "nowhere"),
        "metrics.jsonl": Path.mkdir,
        "skipped_steps": Path.touch,
        "tensorboard": Path.touch,
    }
    for name, make in obstacles.items():
        path, saved = run_dir / name, tmp_path / "saved"
        if path.exists():
            path.rename(saved)
        make(path)
        before = content(run_dir)
        for option in ("--overwrite_output_dir", "--resume_from_checkpoint=latest"):
            with pytest.raises(UserError, match=f"{name} (is no|has the name of).*; move it away, or give another"):
                train_here([*tiny_run, option, "--max_steps", "14"])
        assert content(run_dir) == before
        path.rmdir() if path.is_dir() else path.unlink()
        if saved.exists():
            saved.rename(path)
    assert train_here([*tiny_run, "--resume_from_checkpoint", "latest", "--max_steps", "14"]) == 0


def test_names_like_that_of_a_checkpoint_are_left_alone(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert train_here(tiny_run) == 0
    (run_dir / "checkpoint-007").mkdir()
    (run_dir / "checkpoint-007" / "notes.txt").write_text("mine", encoding="utf-8")
    strays = ("checkpoint-x", "checkpoint-\N{SUPERSCRIPT TWO}", "checkpoint-5.txt", "checkpoint-")
    for name in strays:
        (run_dir / name).write_text("mine", encoding="utf-8")
    resume = ["--resume_from_checkpoint", "latest", "--save_total_limit", "1", "--max_steps", "14"]
    for option in (resume, ["--overwrite_output_dir"]):
        assert train_here([*tiny_run, *option]) == 0
        for name in ("checkpoint-007/notes.txt", *strays):
            assert (run_dir / name).read_text(encoding="utf-8") == "mine"


def test_a_tokenizer_with_several_chat_templates_is_written_whole_every_time(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    tokenizer.chat_template = {"default": read_chat_template("plain"), "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A long answer to many questions"}]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 30, encoding="utf-8")
    words = [*tiny_run, "--tokenizer", str(tmp_path / "tokenizer"), "--train_file", str(tmp_path / "rows.jsonl")]
    resume = ["--resume_from_checkpoint", "latest", "--max_steps", "14"]
    for option in ([], ["--overwrite_output_dir"], [*resume, "--load_best_model_at_end"]):
        assert train_here([*words, *option]) == 0
        written = AutoTokenizer.from_pretrained(tmp_path / "run")
        assert written.chat_template == tokenizer.chat_template
        assert not list((tmp_path / "run").glob(".writing*"))


def test_a_host_that_does_not_see_what_the_main_process_has_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt.training.run_dir.SHARED_AFTER_S", 0.3)
    output_dir = OutputDir(Arguments(train_file=["x"], output_dir=str(tmp_path / "run")))
    with pytest.raises(UserError, match="is not that of the main process; all hosts save a sharded model"):
        output_dir.check_shared("options: 1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "arguments.yaml").write_text("options: 0")  # of an earlier run on this host
    with pytest.raises(UserError, match="give a folder that they share"):
        output_dir.check_shared("options: 1")
    (tmp_path / "run" / "arguments.yaml").write_text("options: 1")
    output_dir.check_shared("options: 1")
