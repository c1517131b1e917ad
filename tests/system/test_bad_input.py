"""Laws of bad input: one line that names the value, the rule and the way out; exit code 2; no file is changed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from system.fuzz.cases import Case as FuzzCase
from system.fuzz.cases import all_cases
from system.fuzz.judge import run_case
from system.fuzz.materials import make_materials
from transformers import GPT2Config, GPT2LMHeadModel

from configuration_minigpt import MiniGPTConfig
from minigpt.cli import main as minigpt
from minigpt.data.tokenizer import train_characters
from modeling_minigpt import MiniGPTForCausalLM
from support.runs import ROOT, command, finish

Case = tuple[list[str], str]
TINY = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--block_size", "16"]
TINY += ["--max_steps", "2", "--use_cpu"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def empty_file(folder: Path) -> Case:
    (folder / "empty.txt").touch()
    return [*TINY, "--train_file", str(folder / "empty.txt")], r"empty\.txt.*empty"


def missing_file(folder: Path) -> Case:
    return [*TINY, "--train_file", str(folder / "none.txt")], r"none\.txt"


def not_utf8(folder: Path) -> Case:
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    return [*TINY, "--train_file", str(folder / "latin.txt")], r"latin\.txt.*UTF-8.*3"


def jsonl_without_the_field(folder: Path) -> Case:
    lines = [json.dumps({"text": "a good line " * 20}), json.dumps({"body": "no text"})]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return [*TINY, "--train_file", str(folder / "a.jsonl")], r"a\.jsonl.*2.*text"


def shorter_than_one_block(folder: Path) -> Case:
    (folder / "short.txt").write_text("fewer characters than a block")
    return [*TINY, "--train_file", str(folder / "short.txt"), "--tokenizer", "char", "--block_size", "64"], (
        r"fewer than one sample of block_size=64.*try block_size="
    )


def bf16_gradient_reduction_on_a_cpu(folder: Path) -> Case:
    return [*TINY, "--train_file", text_of(folder), "--ddp_comm_hook", "bf16"], r"ddp_comm_hook=bf16 .* use fp16 or no"


def block_longer_than_the_position_table(folder: Path) -> Case:
    text = text_of(folder)
    return [*TINY, "--train_file", text, "--tokenizer", "char", "--max_position_embeddings", "8"], (
        r"block_size=16 is longer than the position table.*try .*block_size=8"
    )


def vocabulary_smaller_than_the_tokenizer(folder: Path) -> Case:
    return [*TINY, "--train_file", text_of(folder), "--tokenizer", "char", "--vocab_size", "5"], (
        r"tokenizer has \d+ ids but the new model has vocab_size=5"
    )


def tokenizer_larger_than_the_model(folder: Path) -> Case:
    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        folder / "gpt2"
    )
    words = ["--block_size", "16", "--max_steps", "2", "--use_cpu", "--tokenizer", "char"]
    return [*words, "--train_file", text_of(folder), "--model_name_or_path", str(folder / "gpt2")], (
        r"tokenizer has \d+ ids but .*gpt2 has vocab_size=8"
    )


def tokenizer_that_differs_from_the_models_own(folder: Path) -> Case:
    GPT2LMHeadModel(GPT2Config(vocab_size=90, n_positions=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        folder / "gpt2"
    )
    train_characters(["another alphabet, 0123456789"]).save_pretrained(folder / "gpt2")
    words = ["--block_size", "16", "--max_steps", "2", "--use_cpu", "--tokenizer", "char"]
    return [*words, "--train_file", text_of(folder), "--model_name_or_path", str(folder / "gpt2")], (
        r"ids of another tokenizer than model_name_or_path=.*gpt2"
    )


def tokenizer_that_differs_from_that_of_the_shards(folder: Path) -> Case:
    shards = str(folder / "shards")
    minigpt(["prepare", "--train_file", text_of(folder), "--tokenizer", "char", "--output_dir", shards])
    train_characters(["another alphabet, 0123456789"]).save_pretrained(folder / "other")
    return [*TINY, "--data", shards, "--tokenizer", str(folder / "other")], r"made with another tokenizer than .*other"


def ids_outside_the_vocabulary(folder: Path) -> Case:
    np.arange(3000, dtype="<u2").tofile(folder / "train.bin")
    train_characters(["abc"]).save_pretrained(folder / "tokenizer")
    return [
        *TINY,
        "--data",
        str(folder),
        "--tokenizer",
        str(folder / "tokenizer"),
    ], r"holds token id 2999 but the model has vocab_size=4"


def sample_prompt_of_unknown_characters(folder: Path) -> Case:
    return [*TINY, "--train_file", text_of(folder), "--tokenizer", "char", "--sample_prompts", "It", "ζ"], (
        r"the prompt 'ζ' has characters that the tokenizer does not know"
    )


def unknown_key_in_a_yaml_file(folder: Path) -> Case:
    (folder / "a.yaml").write_text("learning_rat: 1e-3\ncorpus: python-docs\n")
    return [str(folder / "a.yaml")], r"unknown option --learning_rat; did you mean --learning_rate\?"


def batch_size_of_zero(folder: Path) -> Case:
    return [*TINY, "--train_file", text_of(folder), "--per_device_train_batch_size", "0"], (
        r"per_device_train_batch_size=0 must be a number of at least 1"
    )


def folder_without_a_checkpoint(folder: Path) -> Case:
    return [
        *TINY,
        "--train_file",
        text_of(folder),
        "--resume_from_checkpoint",
        str(folder),
    ], r"not a checkpoint of MiniGPT"


def output_dir_with_other_files(folder: Path) -> Case:
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter1.tex").write_text("...")
    return [
        *TINY,
        "--train_file",
        text_of(folder),
        "--output_dir",
        str(folder / "thesis"),
        "--overwrite_output_dir",
    ], (r"thesis is not empty and holds no run")


def tracker_that_is_not_installed(folder: Path) -> Case:
    if shutil.which("wandb"):
        pytest.skip("wandb is installed")
    return [
        *TINY,
        "--train_file",
        text_of(folder),
        "--report_to",
        "wandb",
    ], r"wandb is not installed.*pip install wandb"


def missing_model(folder: Path) -> Case:
    words = ["--block_size", "16", "--max_steps", "2", "--use_cpu", "--model_name_or_path", str(folder / "nothing")]
    return [*words, "--train_file", text_of(folder)], r"nothing"


def text_of(folder: Path) -> str:
    (folder / "text.txt").write_text("It was a dark and stormy night. " * 60)
    return str(folder / "text.txt")


CASES = [
    empty_file,
    missing_file,
    not_utf8,
    jsonl_without_the_field,
    shorter_than_one_block,
    bf16_gradient_reduction_on_a_cpu,
    block_longer_than_the_position_table,
    vocabulary_smaller_than_the_tokenizer,
    tokenizer_larger_than_the_model,
    tokenizer_that_differs_from_the_models_own,
    tokenizer_that_differs_from_that_of_the_shards,
    ids_outside_the_vocabulary,
    sample_prompt_of_unknown_characters,
    unknown_key_in_a_yaml_file,
    batch_size_of_zero,
    folder_without_a_checkpoint,
    output_dir_with_other_files,
    tracker_that_is_not_installed,
    missing_model,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bad_input_is_one_line_and_no_file_is_changed(
    case: Callable[[Path], Case],
    tmp_path: Path,
    train_here: Callable[[list[str]], int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import train_accelerate

    words, message = case(tmp_path)
    if "--output_dir" not in words:
        words += ["--output_dir", str(tmp_path / "run")]
    words += ["--cache_dir", str(tmp_path.parent / f"{tmp_path.name}-cache")]
    if "--report_to" not in words:
        words += ["--report_to", "none"]
    files_before = files(tmp_path)
    monkeypatch.setattr("sys.argv", ["train_accelerate.py", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        train_accelerate.main()
    errors = capsys.readouterr().err.splitlines()
    lines = [line for line in errors if line.startswith("train_accelerate.py: ")]
    assert exit_info.value.code == 2
    assert len(lines) == 1, errors
    assert lines == errors[-1:]
    assert re.search(message, lines[0]), lines[0]
    assert files(tmp_path) == files_before


def test_a_run_is_neither_overwritten_nor_resumed_with_another_model_or_other_data(
    tiny_run: list[str], tmp_path: Path, train_here: Callable[[list[str]], int], text_file: Path
) -> None:
    assert train_here(tiny_run) == 0
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"already holds a run; resume it with --resume_from_checkpoint latest"):
        train_here(tiny_run)
    with pytest.raises(ValueError, match=r"is another model: its hidden_size is 16, not 32"):
        train_here([*tiny_run, "--resume_from_checkpoint", "latest", "--hidden_size", "32"])
    with pytest.raises(ValueError, match=r"was trained on other data"):
        train_here([*tiny_run, "--resume_from_checkpoint", "latest", "--validation_split_percentage", "20"])
    with pytest.raises(ValueError, match=r"block_size=8, but .* was trained with 16: the resumed run would see other"):
        train_here([*tiny_run, "--resume_from_checkpoint", "latest", "--block_size", "8"])
    assert files(tmp_path) == before


def test_the_trainer_prints_one_line_and_exits_with_2(tmp_path: Path) -> None:
    words, _ = empty_file(tmp_path)
    run = finish(command(*words))
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("train_accelerate.py: ")
    assert not (tmp_path / "runs").exists()


TRAINING_VERBS = (
    "train", "compare", "sweep", "bench train", "bench generate", "bench scaling", "verify-resume", "audit",
)  # fmt: skip


def test_a_sample_of_the_fuzzed_cases_is_one_line_or_rightly_accepted(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """`make fuzz` runs all of them; here, the same few of every verb and kind that do not train or measure."""
    root = tmp_path_factory.mktemp("fuzz")
    make_materials(root / "materials")
    by_place: dict[tuple[str, str], list[FuzzCase]] = {}
    for case in all_cases(root / "materials", read_only=None):
        if case.accepted is None and case.verb not in TRAINING_VERBS:
            by_place.setdefault((case.verb, case.kind), []).append(case)
    sample = [cases[len(cases) * part // 9] for cases in by_place.values() for part in (2, 7)][:60]
    verdicts = [
        run_case(case, root / "materials", root / str(number), root / "cache") for number, case in enumerate(sample)
    ]
    assert len(verdicts) == 60
    assert not [f"{verdict.case.name}: {verdict.verdict}" for verdict in verdicts if verdict.is_fault]


def test_an_option_is_named_once_and_as_the_user_wrote_it(capsys: pytest.CaptureFixture[str]) -> None:
    for written in ("--top_k", "--top-k"):
        with pytest.raises(SystemExit):
            minigpt(["generate", "--model", "m", written, "many"])
        assert capsys.readouterr().err == f"minigpt generate: {written}: invalid int value: 'many'\n"


@pytest.mark.parametrize(
    ("script", "library"), [("train_accelerate.py", "torch"), ("hub_upload.py", "huggingface_hub")]
)
def test_ctrl_c_while_libraries_are_imported_is_one_line(script: str, library: str, tmp_path: Path) -> None:
    (tmp_path / f"{library}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    words, pipe = [sys.executable, str(ROOT / script)], subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == f"{script}: interrupted\n"


def test_a_prompt_longer_than_the_context_is_refused_in_one_line(tmp_path: Path) -> None:
    tokenizer = train_characters(["abc"])
    config = MiniGPTConfig(
        vocab_size=len(tokenizer), max_position_embeddings=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    MiniGPTForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = finish([sys.executable, "-m", "minigpt", "generate", "--model", str(tmp_path), "--prompt", "abcabcabc"])
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert re.search(r"\b9\b.*\b[78]\b", run.stderr), run.stderr
