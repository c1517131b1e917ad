"""Laws of `minigpt generate` and of the trainer's samples."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minigpt.commands import generate
from minigpt.generation.interactive import _Printer
from minigpt.generation.sampling import Sampling, complete, prompt_ids, sample_text
from modeling_minigpt import MiniGPTForCausalLM
from support.tiny import CONTEXT, byte_tokenizer, tiny_model

GREEDY = {"max_new_tokens": 8, "temperature": 0.0}


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


def test_sample_depends_on_the_seed_alone(model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        texts.append(sample_text(model, tokenizer, ["a", "bc"], max_new_tokens=12, seed=7))
    assert texts[0] == texts[1]
    assert sample_text(model, tokenizer, ["bc"], max_new_tokens=12, seed=7) == texts[0][1:]
    assert sample_text(model, tokenizer, ["a", "bc"], max_new_tokens=12, seed=8) != texts[0]


def test_sampling_leaves_random_state_and_modes_as_they_were(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model().train()
    model.transformer.layers[1].eval()
    before, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    sample_text(model, tokenizer, ["a"], max_new_tokens=4, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes


def test_greedy_sample_is_the_likeliest_token_each_time(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = prompt_ids(model, tokenizer, "hello")
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    (completion,) = complete(model, tokenizer, ids[:5], Sampling(max_new_tokens=8, temperature=0), seed=0)
    assert completion.continuation == tokenizer.decode(ids[5:])


def test_empty_prompt_begins_a_text(model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert prompt_ids(model, tokenizer, "") == [tokenizer.eos_token_id]
    assert len(sample_text(model, tokenizer, [""], **GREEDY)) == 1
    bare = byte_tokenizer()  # no special token at all: a text begins as a line does
    assert bare.decode(prompt_ids(model, bare, "")) == "\n"


def test_several_sequences_come_in_order_of_prompts(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = sample_text(model, tokenizer, ["x", "y"], max_new_tokens=6, num_return_sequences=3)
    assert [text[0] for text in texts] == list("xxxyyy")
    assert len(set(texts[:3])) > 1


def test_a_full_context_goes_on_with_its_latter_half(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampling = Sampling(max_new_tokens=3 * CONTEXT, temperature=0)
    forever = byte_tokenizer()  # nothing ends a text
    (completion,) = complete(model, forever, prompt_ids(model, forever, "abc"), sampling, seed=0)
    assert completion.new_tokens == 3 * CONTEXT
    assert completion.finish_reason == "length"
    # 32 - 3 tokens fit at first, then 16 with each refill: 29 + 5 * 16 >= 96
    assert completion.refills == 5


def test_stop_text_ends_each_sequence_by_itself(model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = prompt_ids(model, tokenizer, "abc")
    free = complete(model, tokenizer, ids, Sampling(max_new_tokens=16, num_return_sequences=4), seed=1)
    stop = free[2].continuation[3]
    stopped = complete(model, tokenizer, ids, Sampling(16, num_return_sequences=4, stop=(stop,)), seed=1)
    assert [one.continuation for one in stopped] == [one.continuation.partition(stop)[0] for one in free]
    assert stopped[2].finish_reason == "stop"


def test_end_of_text_ends_a_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    with torch.no_grad():  # the last norm says one constant vector, whose likeliest token is the end
        model.transformer.norm.weight.zero_()
        model.transformer.norm.bias.copy_(10 * model.transformer.embed_tokens.weight[0])
    (completion,) = complete(model, tokenizer, [5], Sampling(8, temperature=0), seed=0)
    assert (completion.finish_reason, completion.new_tokens, completion.continuation) == ("end", 1, "")


def test_rows_beyond_the_tokenizer_are_never_chosen(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(vocab_size=1024)  # three rows of four are no token
    printer = _Printer(tokenizer, ())
    complete(model, tokenizer, [5], Sampling(CONTEXT - 2), seed=0, streamer=printer)
    assert 0 < len(printer.new_ids) < CONTEXT
    assert max(printer.new_ids) < len(tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"top_k": -5}, "top_k=-5 must not be negative"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"num_return_sequences": 0}, "num_return_sequences=0 must be at least 1"),
        ({"temperature": 0.0, "num_return_sequences": 2}, "always gives the same text"),
        ({"stop": ("",)}, "must not be empty"),
    ],
)
def test_impossible_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_prompt_longer_than_the_context_is_refused_with_both_numbers(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=r"the prompt has 40 tokens, but the context holds 32"):
        sample_text(model, tokenizer, ["x" * 40], max_new_tokens=1)


def test_command_prints_the_prompt_and_what_follows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--model", str(folder), "--prompt", "abc", "--max_new_tokens", "5", "--temperature", "0")
    once = capsys.readouterr().out
    assert once.startswith("abc")
    run("--model", str(folder), "--prompt", "abc", "--max_new_tokens", "5", "--temperature", "0")
    assert capsys.readouterr().out == once


def test_json_has_a_line_a_sequence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_bad_sources_are_one_clear_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_bytes(b"")
    latin.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="is empty"):
        run("--model", str(folder), "--prompt_file", str(empty))
    with pytest.raises(ValueError, match="is not UTF-8 text: byte 3"):
        run("--model", str(folder), "--prompt_file", str(latin))
    with pytest.raises(ValueError, match="is not a file"):
        run("--model", str(folder), "--prompt_file", str(tmp_path / "none.txt"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(ValueError, match="no prompt"):
        run("--model", str(folder))


def test_missing_models_are_one_clear_line(
    folder: Path, tmp_path: Path, model: MiniGPTForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        run("--model", str(tmp_path / "nowhere"), "--prompt", "a")
    with pytest.raises(ValueError, match=r"neither config\.json nor a checkpoint"):
        run("--model", str(tmp_path), "--prompt", "a")
    model.save_pretrained(tmp_path / "mute")
    with pytest.raises(ValueError, match="tokenizer"):
        run("--model", str(tmp_path / "mute"), "--prompt", "a")
    with pytest.raises(ValueError, match="device=fax cannot be used"):
        run("--model", str(folder), "--prompt", "a", "--device", "fax")


def test_run_without_a_final_model_uses_its_latest_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").symlink_to(folder)
    run("--model", str(tmp_path), "--prompt", "a", "--max_new_tokens", "1")
    assert "checkpoint-10" in capsys.readouterr().err


def test_conversation_streams_what_a_single_call_says(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--model", str(folder), "--prompt", "abc", "--max_new_tokens", "5", "--temperature", "0")
    alone = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n" + "x" * 50 + "\n" + "d\n"))
    run("--model", str(folder), "--interactive", "--max_new_tokens", "5", "--temperature", "0")
    heard = capsys.readouterr()
    assert heard.out.removeprefix("> ").startswith(alone.removeprefix("abc"))
    assert "the prompt has 50 tokens" in heard.err  # said, and the conversation goes on
    assert heard.out.count("> ") >= 4


def test_conversation_forgets_its_oldest_part_when_the_context_is_full(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("0123456789\n" * 5))
    run("--model", str(folder), "--interactive", "--max_new_tokens", "4", "--temperature", "0")
    assert "its oldest part is forgotten" in capsys.readouterr().err


def test_saved_tokenizer_gives_back_every_character(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    text = "naïve café — 10 € \n\ttabs"
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_a_turn_can_be_undone_and_asked_again(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(*lines: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        run("--model", str(folder), "--interactive", "--max_new_tokens", "6", "--temperature", "1.5", "--seed", "3")
        said = capsys.readouterr()
        return said.out.split("> ")[1:-1] if "nothing before this" not in said.err else ["nothing"]

    first, second = talk("the cat", "the dog")
    assert talk("the cat", "the bird", "/undo", "the dog")[-1] == second
    again = talk("the cat", "/again")
    assert again[0] == first
    assert again[1] != first
    assert talk("/undo") == ["nothing"]
