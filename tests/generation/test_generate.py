"""Laws of `minigpt generate`: the sources of prompts, the models, and the interactive session."""

import io
import json
import sys
from pathlib import Path

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from minigpt.commands import generate
from minigpt.generation.sampling import sample_text
from minigpt.utils.errors import UserError
from modeling_minigpt import MiniGPTForCausalLM
from support.tiny import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def model() -> MiniGPTForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def folder(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(*options: str) -> None:
    generate.run(generate.parse(options))


def test_command_prints_the_prompt_and_the_sample_of_the_library(
    folder: Path, model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--model", str(folder), "--prompt", "abc", "--max-new-tokens", "5", "--temperature=0")
    (text,) = sample_text(model, tokenizer, ["abc"], max_new_tokens=5, temperature=0)
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), ByT5Tokenizer()], ids=["without eos", "slow"])
def test_tokenizers_without_an_end_or_a_fast_version_generate(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(vocab_size=384).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run("--model", str(tmp_path), "--prompt", "abc", "--max_new_tokens", "5")
    assert capsys.readouterr().out.startswith("abc")


def test_text_ends_before_the_stop_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", str(folder), "--prompt", "", "--max_new_tokens", "20", "--seed", "2")
    run(*options)
    free = capsys.readouterr().out
    stop = free[6:9]
    run(*options, "--stop", stop)
    assert capsys.readouterr().out == free.partition(stop)[0] + "\n"


def test_json_has_a_line_per_sequence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ("--prompt", "a", "--prompt", "b")
    run("--model", str(folder), *prompts, "--seed", "1", "2", "--num_return_sequences", "2", "--json")
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["prompt"], one["seed"], one["sequence"]) for one in records] == [
        (prompt, seed, number) for prompt in "ab" for seed in (1, 2) for number in (0, 1)
    ]
    assert {one["finish_reason"] for one in records} <= {"end", "length"}


def test_prompt_comes_from_a_file_or_a_pipe(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("from a file\n", encoding="utf-8")
    run("--model", str(folder), "--prompt_file", str(tmp_path / "prompt.txt"), "--max_new_tokens", "1")
    assert capsys.readouterr().out.startswith("from a file")
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    run("--model", str(folder), "--max_new_tokens", "1")
    assert capsys.readouterr().out.startswith("from a pipe")


def test_bad_sources_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_bytes(b"")
    latin.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="is empty"):
        run("--model", str(folder), "--prompt_file", str(empty))
    with pytest.raises(UserError, match="is not UTF-8 text: byte 3"):
        run("--model", str(folder), "--prompt_file", str(latin))
    with pytest.raises(UserError, match="is not a file"):
        run("--model", str(folder), "--prompt_file", str(tmp_path / "none.txt"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(UserError, match="no prompt"):
        run("--model", str(folder))


def test_a_missing_tokenizer_or_device_is_named(folder: Path, tmp_path: Path, model: MiniGPTForCausalLM) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"tokenizer={tmp_path}: no tokenizer"):
        run("--model", str(tmp_path), "--prompt", "a")
    with pytest.raises(UserError, match="device=fax cannot be used"):
        run("--model", str(folder), "--prompt", "a", "--device", "fax")


def test_run_without_a_final_model_uses_its_latest_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint-10").symlink_to(folder)
    run("--model", str(tmp_path), "--prompt", "a", "--max_new_tokens", "1")
    printed = capsys.readouterr()
    assert printed.out.startswith("a")
    assert "checkpoint-10" in printed.err


def test_session_prints_what_a_single_call_prints(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--model", str(folder), "--prompt", "abc", "--max_new_tokens", "5", "--temperature", "0")
    single = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n" + "x" * 50 + "\n" + "d\n"))
    run("--model", str(folder), "--interactive", "--max_new_tokens", "5", "--temperature", "0")
    printed = capsys.readouterr()
    assert printed.out.removeprefix("> ").startswith(single.removeprefix("abc"))
    assert "the prompt has 50 tokens" in printed.err
    assert printed.out.count("> ") >= 4  # the session continues after an error


def test_session_drops_its_oldest_part_when_the_context_is_full(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("0123456789\n" * 5))
    run("--model", str(folder), "--interactive", "--max_new_tokens", "4", "--temperature", "0")
    assert "its oldest part is dropped" in capsys.readouterr().err


def test_a_turn_can_be_undone_and_repeated(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(*lines: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        run("--model", str(folder), "--interactive", "--max_new_tokens", "6", "--temperature", "1.5", "--seed", "3")
        printed = capsys.readouterr()
        return printed.out.split("> ")[1:-1] if "no turn before" not in printed.err else ["none"]

    first, second = answers("the cat", "the dog")
    assert answers("the cat", "the bird", "/undo", "the dog")[-1] == second
    repeated = answers("the cat", "/again")
    assert repeated[0] == first
    assert repeated[1] != first
    assert answers("/undo") == ["none"]
