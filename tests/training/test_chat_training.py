"""Laws of a base model that becomes a chat model: it gets new tokens, keeps the old ones, and answers everywhere."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, pipeline

from minigpt.config.parser import parse_arguments
from minigpt.data.chat_template import read_chat_template, set_chat_template
from minigpt.data.tokenizer import load_tokenizer, train_bpe
from minigpt.export.gpt2 import export_gpt2
from minigpt.modeling.loading import load_model
from minigpt.training.setup import build_model
from minigpt.utils.errors import UserError
from support.tiny import tiny_model

ANSWERS = {"Capital of France?": "Paris.", "Two and two?": "Four.", "Color of snow?": "White."}


def messages(question: str, answer: str | None = None) -> list[dict[str, str]]:
    asked = [{"role": "user", "content": question}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock GPT-2 with random weights and a tokenizer of GPT-2's class without a chat template."""
    folder = tmp_path_factory.mktemp("gpt2")
    train_bpe([*ANSWERS, *ANSWERS.values()], 320).save_pretrained(folder)
    tokenizer = GPT2TokenizerFast.from_pretrained(folder, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    end = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**shape, **end)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": messages(*pair)}) + "\n" for pair in ANSWERS.items()) * 8)
    return path


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_a_gpt2_without_a_template_learns_to_answer_and_its_export_chats_in_a_pipeline(
    gpt2_folder: Path,
    rows: Path,
    cache_dir: Path,
    tmp_path: Path,
    train_here: Callable[[list[str]], int],
    template: str,
) -> None:
    words = (
        f"--model_name_or_path {gpt2_folder} --train_file {rows} --cache_dir {cache_dir} --output_dir {tmp_path}/run "
        "--block_size 64 --packing_strategy bfd --per_device_train_batch_size 4 --max_steps 60 --learning_rate 5e-3 "
        "--optimizer muon --warmup_steps 10 --eval_steps 0 --save_steps 0 --report_to none --use_cpu"
    ).split()
    default = [] if template == "chatml" else ["--chat_template", template]
    assert train_here([*words, *default]) == 0
    export_gpt2(tmp_path / "run", tmp_path / "stock")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "stock")
    assert tokenizer.chat_template == read_chat_template(template)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert isinstance(model, GPT2LMHeadModel)
    end_of_turn = {"chatml": "<|im_end|>", "plain": "<|endoftext|>"}[template]
    assert model.generation_config.eos_token_id[0] == tokenizer.convert_tokens_to_ids(end_of_turn)
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
    ours = pipeline("text-generation", model=load_model(tmp_path / "run"), tokenizer=tokenizer)
    for question, answer in ANSWERS.items():
        for generate in (chat, ours):
            result = generate(messages(question), max_new_tokens=12, do_sample=False)
            assert result[0]["generated_text"] == messages(question, answer)


def build(folder: Path, template: str, *options: str):
    tokenizer = load_tokenizer(folder)
    set_chat_template(tokenizer, read_chat_template(template))
    words = ["--model_name_or_path", str(folder), "--train_file", "rows.jsonl", "--block_size", "16", *options]
    return build_model(parse_arguments(words), tokenizer, None), tokenizer


@pytest.mark.parametrize("multiple", [None, 64])
def test_new_rows_are_the_mean_of_the_old_ones_which_keep_their_bits(gpt2_folder: Path, multiple: int | None) -> None:
    before = load_model(gpt2_folder).get_input_embeddings().weight
    known = len(before)
    options = ["--pad_vocab_size_to_multiple_of", str(multiple)] if multiple else []
    model, tokenizer = build(gpt2_folder, "chatml", *options)
    after = model.get_input_embeddings().weight
    assert len(tokenizer) == known + 2
    assert len(after) == model.config.vocab_size == (known + 2 if multiple is None else -(-(known + 2) // 64) * 64)
    assert after[:known].equal(before)
    assert model.lm_head.weight is after
    torch.testing.assert_close(after[known:], before.mean(0).expand(len(after) - known, -1))
    unused = model.generation_config.suppress_tokens
    assert unused == (list(range(known + 2, len(after))) or None)


def test_rows_that_only_rounded_the_vocabulary_up_become_new_tokens_also_in_an_untied_head(tmp_path: Path) -> None:
    tokenizer = train_bpe(list(ANSWERS), 300)
    tokenizer.save_pretrained(tmp_path)
    rounded = len(tokenizer) + 10
    tiny_model(rounded, tie_word_embeddings=False).save_pretrained(tmp_path)
    before = load_model(tmp_path)
    model, _ = build(tmp_path, "chatml")
    known = len(tokenizer)
    for old, new in (
        (before.get_input_embeddings().weight, model.get_input_embeddings().weight),
        (before.lm_head.weight, model.lm_head.weight),
    ):
        assert len(new) == rounded
        assert new[:known].equal(old[:known])
        torch.testing.assert_close(new[known:], old[:known].mean(0).expand(rounded - known, -1))
    assert model.generation_config.suppress_tokens == list(range(known + 2, rounded))


def test_another_tokenizer_than_the_models_is_still_refused(
    gpt2_folder: Path, rows: Path, cache_dir: Path, tmp_path: Path, train_here: Callable[[list[str]], int]
) -> None:
    other = train_bpe(["entirely different words"], 320)
    other.save_pretrained(tmp_path / "other")
    words = f"--model_name_or_path {gpt2_folder} --tokenizer {tmp_path / 'other'} --train_file {rows} --block_size 64"
    with pytest.raises(UserError, match="has the ids of another tokenizer than model_name_or_path="):
        train_here([*words.split(), "--cache_dir", str(cache_dir), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_base_model_does_not_keep_the_chat_template_of_its_tokenizer(
    text_file: Path, cache_dir: Path, tmp_path: Path, tiny_run: list[str], train_here: Callable[[list[str]], int]
) -> None:
    tokenizer = train_bpe([text_file.read_text(encoding="utf-8")], 300)
    set_chat_template(tokenizer, read_chat_template("chatml"))
    tokenizer.save_pretrained(tmp_path / "instruct")
    assert train_here([*tiny_run, "--tokenizer", str(tmp_path / "instruct"), "--max_steps", "2"]) == 0
    saved = load_tokenizer(tmp_path / "run")
    assert saved.chat_template is None
    assert len(saved) == len(tokenizer)
