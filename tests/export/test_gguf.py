"""A GGUF file in llama.cpp gives the tokens, the log-probabilities and the texts of the model that was exported."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minigpt.benchmarks.engine_drivers import LlamaCpp, MiniGPTEngine
from minigpt.cli import main
from minigpt.data.chat import render_messages, template_variables
from minigpt.data.chat_template import read_chat_template, set_chat_template
from minigpt.data.tokenizer import train_bpe, train_characters
from minigpt.export.gguf import export_gguf
from minigpt.export.source import portable_chat_template
from minigpt.generation.conversation import Conversation
from minigpt.generation.sampling import Sampling, end_of_text_ids
from minigpt.utils.errors import UserError
from modeling_minigpt import MiniGPTForCausalLM
from support.tiny import CONTEXT, byte_tokenizer, letter_tokenizer, tiny_model

# spaces of all kinds, line ends, digits, contractions, several scripts, joined emoji, control characters, lookalikes
HOSTILE = (
    "Hi  \n\n\t don't I'LL 12345 3.14 ½² \u00a0\u2003x\u3000\u200b\ufeff \r\n Ünïcödé "
    "e\u0301 日本語 ﷺ नमस्ते 🤷🏽‍♀️\x00\x7f "
    "<|im_start|> <|im_end <|im_end|><|im_end|> < |endoftext|> <|endoftext|>\n <s> [UNUSED3] </s>   "
)
TEXTS = [Path(__file__).read_text(encoding="utf-8")]
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": " Who?\n"},
    {"role": "assistant", "content": "{{ Me }} "},
    {"role": "user", "content": "Why?"},
]


def chat_tokenizer(template: str = "chatml") -> PreTrainedTokenizerFast:
    tokenizer = train_bpe(TEXTS, 300)
    set_chat_template(tokenizer, read_chat_template(template))
    return tokenizer


def save(folder: Path, tokenizer: PreTrainedTokenizerFast, padding: int = 0, **config: object) -> MiniGPTForCausalLM:
    """A tiny model whose biases and norms differ from their start, so that an exchange or a loss of them shows."""
    model = tiny_model(len(tokenizer) + padding, **config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
def log_probabilities(model: MiniGPTForCausalLM, ids: list[int], vocabulary: int) -> np.ndarray:
    return model(torch.tensor([ids])).logits[0, :, :vocabulary].log_softmax(-1).numpy()


UNTIED = {"tie_word_embeddings": False, "qkv_bias": False}
OTHER_SIZES = {"intermediate_size": 40, "layer_norm_epsilon": 1e-2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("outtype", "config", "padding", "tolerance"),
    [
        ("f32", {}, 0, 2e-2),
        ("f32", UNTIED, 5, 2e-2),
        ("f32", OTHER_SIZES, 3, 2e-2),
        ("f16", UNTIED, 0, 2e-2),
        ("bf16", {}, 0, 0.1),
        ("q8_0", OTHER_SIZES, 0, 0.4),  # with rows of 40 numbers, which Q8_0 cannot hold
    ],
    ids=["gpt2", "untied", "other_sizes", "f16", "bf16", "q8_0"],
)
def test_llama_cpp_gives_the_models_log_probabilities(
    tmp_path: Path, outtype: str, config: dict, padding: int, tolerance: float
) -> None:
    tokenizer = chat_tokenizer()
    model = save(tmp_path / "model", tokenizer, padding, hidden_size=32, **config)
    engine = LlamaCpp(export_gguf(tmp_path / "model", tmp_path / "out", outtype).model, CONTEXT, threads=1)
    ids = list(range(100, 99 + CONTEXT))
    ours, theirs = log_probabilities(model, ids, len(tokenizer)), engine.log_probabilities(ids)
    # tolerance: llama.cpp rounds to float16 inside of GELU and attention, and to fewer bits for other types
    np.testing.assert_allclose(theirs, ours, atol=tolerance, rtol=0)


def test_llama_cpp_continues_prompts_as_the_model_does(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    model = save(tmp_path, tokenizer)
    ours = MiniGPTEngine(model, end_of_text_ids(model, tokenizer))
    theirs = LlamaCpp(export_gguf(tmp_path, tmp_path, "f32").model, CONTEXT, threads=1)
    compared = 0
    for start in range(20, 220, 20):
        prompt = list(range(start, start + 10))
        expected = ours.greedy(prompt, 20)
        second, first = np.sort(ours.log_probabilities(prompt + expected[:-1])[-20:], axis=1)[:, -2:].T
        close = first - second < 0.05  # either may win, and then the texts differ
        clear = int(close.argmax()) if close.any() else 20
        assert theirs.greedy(prompt, 20)[:clear] == expected[:clear]
        compared += clear
    assert compared > 50


def test_llama_cpp_gives_the_ids_of_the_tokenizer_for_a_hostile_text(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["Ünï"])  # added, but not special
    save(tmp_path, tokenizer)
    engine = LlamaCpp(export_gguf(tmp_path, tmp_path).model, CONTEXT, threads=1)
    assert engine.tokenize(HOSTILE) == tokenizer(HOSTILE)["input_ids"]


def test_characters_are_carried_with_their_ids(tmp_path: Path) -> None:
    text = HOSTILE.replace("<|endoftext|>", "")
    tokenizer = train_characters([text])
    save(tmp_path / "unicode", tokenizer)
    engine = LlamaCpp(export_gguf(tmp_path / "unicode", tmp_path).model, CONTEXT, threads=1)
    ids = tokenizer(text + "<|endoftext|>")["input_ids"]
    assert engine.tokenize(text + "<|endoftext|>") == ids
    assert engine.post("/detokenize", {"tokens": ids[:-1]})["content"] == text
    save(tmp_path / "ascii", train_characters(["to be\n"]))  # without any merge
    engine = LlamaCpp(export_gguf(tmp_path / "ascii", tmp_path).model, CONTEXT, threads=1)
    assert engine.tokenize("be to\n") == train_characters(["to be\n"])("be to\n")["input_ids"]


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_llama_cpp_renders_a_conversation_as_the_tokenizer_does(tmp_path: Path, name: str) -> None:
    tokenizer = chat_tokenizer(name)
    save(tmp_path, tokenizer)
    engine = LlamaCpp(export_gguf(tmp_path, tmp_path).model, CONTEXT, threads=1)
    rendered = engine.post("/apply-template", {"messages": MESSAGES})["prompt"]
    assert rendered == tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["chatml", "plain"])
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_the_portable_template_writes_the_same_text(name: str, generation_prompt: bool) -> None:
    marked = chat_tokenizer(name)
    marked.chat_template += "{% generation -%}  x \n{%+ endgeneration %}  {%- generation%}\ny{%endgeneration-%} \n z"
    portable = portable_chat_template(marked)
    assert portable is not None
    assert not re.search("generation *[-+]?%}", portable)
    texts = [
        render_messages(template, template_variables(marked), MESSAGES, "test", generation_prompt)[0]
        for template in (marked.chat_template, portable)
    ]
    assert texts[0] == texts[1]


def test_a_turn_ends_with_the_token_that_the_template_writes(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 300)
    set_chat_template(
        tokenizer, read_chat_template("chatml").replace("im_end", "over")
    )  # unknown to llama.cpp by name
    model = save(tmp_path, tokenizer, tie_word_embeddings=False)
    end = tokenizer.convert_tokens_to_ids("<|over|>")
    with torch.no_grad():  # always predicts the end of the turn
        model.transformer.norm.weight.zero_()
        model.transformer.norm.bias.fill_(1)
        model.lm_head.weight[end] = 9
    model.save_pretrained(tmp_path)
    engine = LlamaCpp(export_gguf(tmp_path, tmp_path).model, CONTEXT, threads=1)
    answer = engine.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5})
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 1


@pytest.mark.slow
def test_a_trained_conversation_is_answered_with_the_same_words(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    model = save(tmp_path, tokenizer, hidden_size=64, max_position_embeddings=128)
    pairs = [("Name?", "Only me, and no one else."), ("Why not?", "Because 2 + 2 is 4.")]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    ids = [
        tokenizer(tokenizer.apply_chat_template(row, tokenize=False), return_tensors="pt")["input_ids"] for row in rows
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = sum(model(row, labels=row).loss for row in ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.eval().save_pretrained(tmp_path)
    engine = LlamaCpp(export_gguf(tmp_path, tmp_path).model, 128, threads=1)
    for question, expected in pairs:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 60}
        assert engine.post("/v1/chat/completions", body)["choices"][0]["message"]["content"] == expected
        assert Conversation(model, tokenizer).ask(question, Sampling(60, temperature=0), 0).continuation == expected


def test_existing_files_are_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "run", chat_tokenizer())
    main(["export", "gguf", str(tmp_path / "run"), str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run-F16.Modelfile", "run-F16.gguf"]
    assert "llama-cli -m" in capsys.readouterr().out
    before = (tmp_path / "out" / "run-F16.gguf").read_bytes()
    with pytest.raises(UserError, match=r"run-F16\.gguf exists"):
        export_gguf(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "run-F16.gguf").read_bytes() == before
    (tmp_path / "mine.Modelfile").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.Modelfile exists"):
        export_gguf(tmp_path / "run", tmp_path / "mine.gguf")
    assert not (tmp_path / "mine.gguf").exists()


def changed(tokenizer: PreTrainedTokenizerFast, **parts: object) -> PreTrainedTokenizerFast:
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def words() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"to": 0, "be": 1, "<|endoftext|>": 2}))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")


EOS = {"eos_token": "<|endoftext|>"}


@pytest.mark.parametrize(
    ("tokenizer", "config", "reason"),
    [
        (words, {}, "is a WordLevel"),
        (lambda: letter_tokenizer("ab"), {}, "no eos_token"),
        (lambda: changed(byte_tokenizer(**EOS), normalizer=normalizers.NFC()), {}, "normalizer NFC"),
        (
            lambda: changed(byte_tokenizer(**EOS), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
            {},
            "add_prefix_space",
        ),
        (lambda: byte_tokenizer(**EOS), {"hidden_act": "gelu"}, "hidden_act=gelu"),
    ],
    ids=["words", "no_end", "normalizer", "prefix_space", "activation"],
)
def test_what_the_format_cannot_carry_is_refused_by_name(
    tmp_path: Path, tokenizer: object, config: dict, reason: str
) -> None:
    assert callable(tokenizer)
    save(tmp_path / "run", tokenizer(), **config)
    with pytest.raises(UserError, match=reason):
        export_gguf(tmp_path / "run", tmp_path / "new" / "out.gguf")
    assert not (tmp_path / "new").exists()


def test_weights_beyond_float16_are_refused_where_they_would_overflow(tmp_path: Path) -> None:
    model = save(tmp_path / "run", byte_tokenizer(**EOS))
    with torch.no_grad():
        model.transformer.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.weight .* try --outtype bf16"):
        export_gguf(tmp_path / "run", tmp_path)
    assert export_gguf(tmp_path / "run", tmp_path, "bf16").model.exists()


def test_the_modelfile_ends_turns_and_has_the_context_of_the_model(tmp_path: Path) -> None:
    save(tmp_path / "run", chat_tokenizer())
    text = export_gguf(tmp_path / "run", tmp_path).modelfile.read_text(encoding="utf-8")
    assert text.startswith("FROM ./run-F16.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert f"PARAMETER num_ctx {CONTEXT}\n" in text
    tokenizer = chat_tokenizer("plain")
    tokenizer.chat_template += " "
    save(tmp_path / "other", tokenizer)
    files = export_gguf(tmp_path / "other", tmp_path)
    assert "TEMPLATE" not in files.modelfile.read_text(encoding="utf-8")
    assert any("TEMPLATE" in note for note in files.notes)
