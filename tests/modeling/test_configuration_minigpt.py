"""Laws of the configuration: GPT-2's names are aliases, GPT-2's files load, and impossible values are refused."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, GPT2Config

from configuration_minigpt import MiniGPTConfig

TINY = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}


def test_gpt2_names_are_aliases() -> None:
    config = MiniGPTConfig(n_embd=24, n_layer=2, n_head=3, n_positions=16, n_inner=50, activation_function="relu")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 2, 3)
    assert (config.max_position_embeddings, config.intermediate_size, config.hidden_act) == (16, 50, "relu")
    config.n_embd = 48
    assert config.hidden_size == config.n_embd == 48


def test_intermediate_size_is_four_times_the_width_unless_given() -> None:
    assert MiniGPTConfig(**TINY).intermediate_size == 96
    assert MiniGPTConfig(**TINY, intermediate_size=7).intermediate_size == 7
    assert MiniGPTConfig(n_embd=24, n_head=3, n_inner=None).intermediate_size == 96


def test_defaults_are_gpt2_124m() -> None:
    minigpt, gpt2 = MiniGPTConfig(), GPT2Config()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        assert getattr(minigpt, name) == getattr(gpt2, name)
    for name in ("layer_norm_epsilon", "initializer_range", "embd_pdrop", "attn_pdrop", "resid_pdrop"):
        assert getattr(minigpt, name) == getattr(gpt2, name)
    assert minigpt.intermediate_size == 3072


def test_config_round_trip_changes_nothing(tmp_path: Path) -> None:
    config = MiniGPTConfig(**TINY, qkv_bias=False, tie_word_embeddings=False, attn_pdrop=0, eos_token_id=[1, 2])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MiniGPTConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert set(TINY) <= set(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))


def test_a_gpt2_config_file_loads_as_a_minigpt_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    GPT2Config(n_embd=24, n_head=3, n_layer=2, n_positions=16, vocab_size=60000, resid_pdrop=0.3).save_pretrained(
        tmp_path
    )
    config = MiniGPTConfig.from_pretrained(tmp_path)
    assert not caplog.records  # transformers warns if the model types differ
    assert type(config) is MiniGPTConfig
    assert config.model_type == "minigpt"
    assert (config.hidden_size, config.max_position_embeddings, config.resid_pdrop) == (24, 16, 0.3)
    assert (config.bos_token_id, config.eos_token_id) == (50256, 50256)
    saved = config.to_dict()
    assert not [key for key in saved if key.startswith(("summary_", "scale_", "reorder_", "n_", "add_cross"))]


@pytest.mark.parametrize(
    "option",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_gpt2_options_that_are_not_implemented_are_refused_by_name(tmp_path: Path, option: dict) -> None:
    GPT2Config(**option).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{next(iter(option))}={next(iter(option.values()))} is a GPT-2 option"):
        MiniGPTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 65, "num_attention_heads": 4}, "hidden_size=65 is not divisible by num_attention_heads=4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"vocab_size": -3}, "vocab_size=-3 must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"attn_pdrop": 1.0}, "attn_pdrop=1.0 must be at least 0 and below 1"),
        ({"embd_pdrop": -0.1}, "embd_pdrop=-0.1 must be at least 0"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon=0.0 must be above 0"),
        ({"hidden_act": "gelo"}, "hidden_act='gelo' is not one of"),
    ],
)
def test_impossible_values_are_refused_by_name_and_value(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiniGPTConfig(**options)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ValueError, match=r"num_hidden_layers=0 .*; .*resid_pdrop=2 "):
        MiniGPTConfig(num_hidden_layers=0, resid_pdrop=2)
