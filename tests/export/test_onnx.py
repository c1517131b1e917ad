"""An exported graph in ONNX Runtime gives the logits and the texts of the model, with and without a cache."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, GPT2Config

from minigpt.benchmarks.engine_drivers import MiniGPTEngine, OnnxRuntime
from minigpt.cli import main
from minigpt.data.chat_template import read_chat_template, set_chat_template
from minigpt.export.onnx import FILE_NAMES, export_onnx
from minigpt.utils.errors import UserError
from modeling_minigpt import MiniGPTForCausalLM
from support.tiny import CONTEXT, byte_tokenizer, tiny_model

IDS = (torch.arange(3 * 20).view(3, 20) * 7) % 257
TOLERANCE = 1e-4  # the same arithmetic in float32, with operations in another order


def save(folder: Path, padding: int = 0, **config: object) -> MiniGPTForCausalLM:
    """A tiny model whose biases and norms differ from their start, so that an exchange or a loss of them shows."""
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    set_chat_template(tokenizer, read_chat_template("plain"))
    model = tiny_model(len(tokenizer) + padding, **config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = [0, 5]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[MiniGPTForCausalLM, Path]:
    """A model with seven rows that have no token, and its export in all types."""
    folder = tmp_path_factory.mktemp("onnx")
    model = save(folder / "run", padding=7)
    main(["export", "onnx", str(folder / "run"), str(folder / "out"), "--dtype", *FILE_NAMES])
    return model, folder / "out"


def engine(folder: Path, dtype: str = "fp32") -> OnnxRuntime:
    return OnnxRuntime(folder / "onnx" / f"{FILE_NAMES[dtype]}.onnx", end_ids=[0], threads=1)


@torch.no_grad()
def logits(model: MiniGPTForCausalLM, ids: torch.Tensor = IDS, **options: torch.Tensor) -> np.ndarray:
    return model(ids, **options).logits[..., :257].numpy()


def test_onnx_runtime_gives_the_logits_also_in_chunks_and_one_by_one(
    exported: tuple[MiniGPTForCausalLM, Path],
) -> None:
    model, folder = exported
    runtime, expected = engine(folder), logits(model)
    for lengths in ([20], [1] * 20, [7, 1, 12]):
        for row in range(3):
            cache, parts = runtime.empty_cache, []
            for chunk in IDS[row].split(lengths):
                part, cache = runtime.logits(chunk.tolist(), cache)
                parts.append(part)
            np.testing.assert_allclose(np.concatenate(parts), expected[row], atol=TOLERANCE, rtol=0)


def test_rows_of_a_batch_with_left_padding_have_the_logits_of_each_text(
    exported: tuple[MiniGPTForCausalLM, Path],
) -> None:
    model, folder = exported
    runtime = engine(folder)
    lengths = [20, 3, 11]
    mask = np.stack([np.arange(20) >= 20 - length for length in lengths]).astype(np.int64)
    ids = np.where(mask, IDS.numpy(), 0)
    positions = (mask.cumsum(1) - 1).clip(0)
    cache = {name: np.repeat(empty, 3, axis=0) for name, empty in runtime.empty_cache.items()}
    for part in (slice(0, 13), slice(13, 19), slice(19, 20)):  # the second text begins in the second part
        inputs = {
            "input_ids": ids[:, part],
            "attention_mask": mask[:, : part.stop],
            "position_ids": positions[:, part],
        }
        found, *present = runtime.session.run(runtime.outputs, inputs | cache)
        cache = dict(zip(cache, present, strict=True))
        for row, length in enumerate(lengths):
            first = 20 - length
            if first < part.stop:
                expected = logits(model, IDS[row : row + 1, first : part.stop])[0]
                seen = found[row][max(0, first - part.start) :]
                np.testing.assert_allclose(seen, expected[-len(seen) :], atol=TOLERANCE, rtol=0)


def test_greedy_text_is_that_of_the_model(exported: tuple[MiniGPTForCausalLM, Path]) -> None:
    model, folder = exported
    ours = MiniGPTEngine(model, end_ids=[0, *range(257, 264)])
    for row in range(3):
        prompt = IDS[row, :12].tolist()
        assert engine(folder).greedy(prompt, 20) == ours.greedy(prompt, 20)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 0.02), ("int8", 0.2), ("q4", 2.0)])
def test_smaller_types_stay_close_to_the_model(
    exported: tuple[MiniGPTForCausalLM, Path], dtype: str, tolerance: float
) -> None:
    model, folder = exported
    found = engine(folder, dtype).log_probabilities(IDS[0].tolist())
    expected = torch.from_numpy(logits(model)[0]).log_softmax(-1).numpy()
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95


def test_the_folder_is_what_transformers_js_looks_for(exported: tuple[MiniGPTForCausalLM, Path]) -> None:
    _, folder = exported
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    graphs = {"onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx", "onnx/model_q4.onnx"}
    assert names == graphs | {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    config = GPT2Config.from_pretrained(folder)
    assert (config.model_type, config.vocab_size, config.n_positions) == ("gpt2", 257, CONTEXT)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [0, 5]
    assert "generation %}" not in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    assert text == "User:\nWho?\nAssistant:\nI.<|endoftext|>"
    for name in graphs:
        session = onnxruntime.InferenceSession(folder / name)
        layers = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
        inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{layer}" for layer in layers)]
        assert [entry.name for entry in session.get_inputs()] == inputs
        assert [entry.name for entry in session.get_outputs()] == ["logits", *(f"present.{layer}" for layer in layers)]
        assert {entry.type for entry in session.get_inputs()} == {"tensor(int64)", "tensor(float)"}


def test_quantized_files_are_smaller(exported: tuple[MiniGPTForCausalLM, Path]) -> None:
    """Only if the head and the matrices really are quantized."""
    _, folder = exported
    for dtype in ("int8", "q4"):
        operators = quantized_matrices(folder / "onnx" / f"{FILE_NAMES[dtype]}.onnx")
        assert operators == 2 * 6 + 1  # of each layer, and the head


def quantized_matrices(path: Path) -> int:
    import onnx

    return sum(node.op_type in ("MatMulInteger", "MatMulNBits") for node in onnx.load(path).graph.node)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": False, "qkv_bias": False},
        {"intermediate_size": 40, "layer_norm_epsilon": 1e-2, "num_attention_heads": 4, "hidden_act": "silu"},
        {"hidden_size": 256, "num_hidden_layers": 6, "max_position_embeddings": 256},
    ],
    ids=["untied", "other_sizes", "larger"],
)
def test_other_shapes_give_the_logits_too(tmp_path: Path, config: dict) -> None:
    model = save(tmp_path / "run", **config)
    export_onnx(tmp_path / "run", tmp_path / "out")
    runtime = engine(tmp_path / "out")
    ids = IDS.flatten()[: min(60, model.config.max_position_embeddings)][None]
    expected = logits(model, ids)[0]
    first, cache = runtime.logits(ids[0, :9].tolist(), runtime.empty_cache)
    rest, _ = runtime.logits(ids[0, 9:].tolist(), cache)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.concatenate([first, rest]), expected, atol=TOLERANCE * max(1, scale), rtol=0)


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("a long text", encoding="utf-8")
    with pytest.raises(UserError, match="is not empty"):
        export_onnx(tmp_path / "run", tmp_path / "full")
    monkeypatch.setattr("torch.onnx.export", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_onnx(tmp_path / "run", tmp_path / "new" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run"]
    monkeypatch.setattr("minigpt.export.onnx.MAX_FILE_BYTES", 1000)
    with pytest.raises(UserError, match="an ONNX file holds 2 GiB"):
        export_onnx(tmp_path / "run", tmp_path / "out")
