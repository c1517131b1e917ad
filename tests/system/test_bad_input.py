"""Bad input: one line that names the value, the rule and the way out; exit code 2; nothing on disk changed."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from configuration_minigpt import MiniGPTConfig
from minigpt.cli import main as minigpt
from minigpt.data.tokenizer import train_characters
from modeling_minigpt import MiniGPTForCausalLM
from support.runs import command, finish

Case = tuple[list[str], str]
TINY = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--block_size", "16"]
TINY += ["--max_steps", "2", "--use_cpu"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def empty_file(tmp: Path) -> Case:
    (tmp / "empty.txt").touch()
    return [*TINY, "--train_file", str(tmp / "empty.txt")], r"empty\.txt.*empty"


def missing_file(tmp: Path) -> Case:
    return [*TINY, "--train_file", str(tmp / "none.txt")], r"none\.txt"


def not_utf8(tmp: Path) -> Case:
    (tmp / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    return [*TINY, "--train_file", str(tmp / "latin.txt")], r"latin\.txt.*UTF-8.*3"


def jsonl_without_the_field(tmp: Path) -> Case:
    lines = [json.dumps({"text": "a good line " * 20}), json.dumps({"body": "no text"})]
    (tmp / "a.jsonl").write_text("\n".join(lines))
    return [*TINY, "--train_file", str(tmp / "a.jsonl")], r"a\.jsonl.*2.*text"


def shorter_than_one_block(tmp: Path) -> Case:
    (tmp / "short.txt").write_text("a few words, and no more than that")
    return [*TINY, "--train_file", str(tmp / "short.txt"), "--tokenizer", "char", "--block_size", "64"], (
        r"fewer than one sample of block_size=64.*try block_size="
    )


def gradients_in_bf16_on_a_cpu(tmp: Path) -> Case:
    return [*TINY, "--train_file", text_of(tmp), "--ddp_comm_hook", "bf16"], r"ddp_comm_hook=bf16 .* use fp16 or no"


def block_longer_than_the_position_table(tmp: Path) -> Case:
    text = text_of(tmp)
    return [*TINY, "--train_file", text, "--tokenizer", "char", "--max_position_embeddings", "8"], (
        r"block_size=16 is longer than the position table.*try .*block_size=8"
    )


def vocabulary_smaller_than_the_tokenizer(tmp: Path) -> Case:
    return [*TINY, "--train_file", text_of(tmp), "--tokenizer", "char", "--vocab_size", "5"], (
        r"tokenizer has \d+ ids but the new model has vocab_size=5"
    )


def tokenizer_unlike_the_models(tmp: Path) -> Case:
    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp / "g"
    )
    words = ["--block_size", "16", "--max_steps", "2", "--use_cpu", "--tokenizer", "char"]
    return [*words, "--train_file", text_of(tmp), "--model_name_or_path", str(tmp / "g")], (
        r"tokenizer has \d+ ids but .*g has vocab_size=8"
    )


def tokenizer_unlike_the_models_own(tmp: Path) -> Case:
    GPT2LMHeadModel(GPT2Config(vocab_size=90, n_positions=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp / "g"
    )
    train_characters(["another alphabet, 0123456789"]).save_pretrained(tmp / "g")
    words = ["--block_size", "16", "--max_steps", "2", "--use_cpu", "--tokenizer", "char"]
    return [*words, "--train_file", text_of(tmp), "--model_name_or_path", str(tmp / "g")], (
        r"ids of another tokenizer than model_name_or_path=.*g"
    )


def tokenizer_unlike_the_shards(tmp: Path) -> Case:
    shards = str(tmp / "shards")
    minigpt(["prepare", "--train_file", text_of(tmp), "--tokenizer", "char", "--output_dir", shards])
    train_characters(["another alphabet, 0123456789"]).save_pretrained(tmp / "other")
    return [*TINY, "--data", shards, "--tokenizer", str(tmp / "other")], r"made with another tokenizer than .*other"


def ids_beyond_the_vocabulary(tmp: Path) -> Case:
    np.arange(3000, dtype="<u2").tofile(tmp / "train.bin")
    train_characters(["abc"]).save_pretrained(tmp / "tokenizer")
    return [
        *TINY,
        "--data",
        str(tmp),
        "--tokenizer",
        str(tmp / "tokenizer"),
    ], r"holds token id 2999 but the model has vocab_size=4"


def sample_prompt_of_unknown_characters(tmp: Path) -> Case:
    return [*TINY, "--train_file", text_of(tmp), "--tokenizer", "char", "--sample_prompts", "It", "ζ"], (
        r"the prompt 'ζ' has characters that the tokenizer does not know"
    )


def unknown_key(tmp: Path) -> Case:
    (tmp / "a.yaml").write_text("learning_rat: 1e-3\ncorpus: python-docs\n")
    return [str(tmp / "a.yaml")], r"unknown option --learning_rat; did you mean --learning_rate\?"


def impossible_batch(tmp: Path) -> Case:
    return [*TINY, "--train_file", text_of(tmp), "--per_device_train_batch_size", "0"], (
        r"per_device_train_batch_size=0 must be a number of at least 1"
    )


def no_checkpoint(tmp: Path) -> Case:
    return [*TINY, "--train_file", text_of(tmp), "--resume_from_checkpoint", str(tmp)], r"not a checkpoint of MiniGPT"


def output_dir_of_something_else(tmp: Path) -> Case:
    (tmp / "thesis").mkdir()
    (tmp / "thesis" / "chapter1.tex").write_text("...")
    return [*TINY, "--train_file", text_of(tmp), "--output_dir", str(tmp / "thesis"), "--overwrite_output_dir"], (
        r"thesis is not empty and holds no run"
    )


def missing_tracker(tmp: Path) -> Case:
    if shutil.which("wandb"):
        pytest.skip("wandb is installed")
    return [*TINY, "--train_file", text_of(tmp), "--report_to", "wandb"], r"wandb is not installed.*pip install wandb"


def missing_model(tmp: Path) -> Case:
    words = ["--block_size", "16", "--max_steps", "2", "--use_cpu", "--model_name_or_path", str(tmp / "nothing")]
    return [*words, "--train_file", text_of(tmp)], r"nothing"


def text_of(tmp: Path) -> str:
    (tmp / "text.txt").write_text("It was a dark and stormy night. " * 60)
    return str(tmp / "text.txt")


CASES = [
    empty_file,
    missing_file,
    not_utf8,
    jsonl_without_the_field,
    shorter_than_one_block,
    gradients_in_bf16_on_a_cpu,
    block_longer_than_the_position_table,
    vocabulary_smaller_than_the_tokenizer,
    tokenizer_unlike_the_models,
    tokenizer_unlike_the_models_own,
    tokenizer_unlike_the_shards,
    ids_beyond_the_vocabulary,
    sample_prompt_of_unknown_characters,
    unknown_key,
    impossible_batch,
    no_checkpoint,
    output_dir_of_something_else,
    missing_tracker,
    missing_model,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_one_line_and_nothing_changed(
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
    before = files(tmp_path)
    monkeypatch.setattr("sys.argv", ["train_accelerate.py", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_accelerate.main()
    errors = capsys.readouterr().err.splitlines()
    lines = [line for line in errors if line.startswith("train_accelerate.py: ")]
    assert stop.value.code == 2
    assert len(lines) == 1, errors
    assert lines == errors[-1:]
    assert re.search(message, lines[0]), lines[0]
    assert files(tmp_path) == before


def test_a_run_is_not_overwritten_and_another_model_is_not_resumed(
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


def test_the_process_itself_says_one_line_and_exits_with_2(tmp_path: Path) -> None:
    words, _ = empty_file(tmp_path)
    run = finish(command(*words))
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("train_accelerate.py: ")
    assert not (tmp_path / "runs").exists()


def test_a_prompt_longer_than_the_context_is_one_line(tmp_path: Path) -> None:
    tokenizer = train_characters(["abc"])
    config = MiniGPTConfig(
        vocab_size=len(tokenizer), max_position_embeddings=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    MiniGPTForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = finish([sys.executable, "-m", "minigpt", "generate", "--model", str(tmp_path), "--prompt", "abcabcabc"])
    assert run.returncode == 2
    assert "9" in run.stderr.splitlines()[-1]
    assert "8" in run.stderr.splitlines()[-1]
