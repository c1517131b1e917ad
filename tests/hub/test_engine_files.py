"""`hub_upload.py --gguf --onnx`: other engines run what arrives on the Hub, and the card says how."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from minigpt.benchmarks.engine_drivers import Engine, LlamaCpp, MiniGPTEngine, OnnxRuntime
from support.hub_client import USERS, upload
from support.hub_server import Hub, running_hub
from support.tiny import CONTEXT, byte_tokenizer, tiny_model

PROMPT = list(b"Who are you")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub(USERS) as hub:
        yield hub


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_model().save_pretrained(folder)
    byte_tokenizer(eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_engines_run_what_is_uploaded_and_the_card_names_it(hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    options = ("ann/tiny", "--gguf", "f32", "--onnx")
    upload(run_dir, *options, hub=hub, home=tmp_path)
    files = hub.repos["ann/tiny"].files()
    for name, content in files.items():
        (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / name).write_bytes(content)
    expected = MiniGPTEngine(tiny_model(), [256]).greedy(PROMPT, 12)
    engines: list[Engine] = [
        LlamaCpp(tmp_path / "hub" / "tiny-F32.gguf", CONTEXT, threads=1),
        OnnxRuntime(tmp_path / "hub" / "onnx" / "model.onnx", [256], threads=1),
    ]
    assert [engine.greedy(PROMPT, 12) for engine in engines] == [expected, expected]
    assert "onnx/model_quantized.onnx" in files

    card = files["README.md"].decode()
    for line in ("llama-server -hf ann/tiny:F32 ", "ollama run hf.co/ann/tiny:F32\n", 'dtype: "q8" }'):
        assert line in card
    assert {"gguf", "onnx", "transformers.js"} <= set(yaml.safe_load(card.split("---\n")[1])["tags"])
    assert "nothing to upload" in upload(run_dir, *options, hub=hub, home=tmp_path)

    upload(run_dir, "ann/plain", hub=hub, home=tmp_path)
    plain = hub.repos["ann/plain"].files()
    assert not [name for name in plain if name.endswith((".gguf", ".onnx"))]
    assert "llama" not in plain["README.md"].decode()


@pytest.mark.slow
def test_the_folder_of_onnx_is_a_gpt2_of_its_own(hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    listed = upload(run_dir, "ann/none", "--onnx", "q4", "--dry_run", hub=hub, home=tmp_path)
    assert "ann/none" not in hub.repos
    names = [line.split()[-1] for line in listed.splitlines()]
    assert {"onnx/model_q4.onnx", "onnx/config.json", "onnx/tokenizer.json", "onnx/tokenizer_config.json"} <= {*names}
    assert "onnx/model.onnx" not in names


def test_an_export_that_is_impossible_is_refused_before_anything_is_sent(
    hub: Hub, run_dir: Path, tmp_path: Path
) -> None:
    silu = tmp_path / "silu"
    tiny_model(hidden_act="silu").save_pretrained(silu)
    byte_tokenizer(eos_token="<|endoftext|>").save_pretrained(silu)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "ann/base", "peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").write_bytes((run_dir / "model.safetensors").read_bytes())
    for folder, message in ((silu, "hidden_act=silu cannot be exported"), (adapter, "run `minigpt merge")):
        error = upload(folder, "ann/refused", "--gguf", hub=hub, home=tmp_path, code=2)
        assert message in error
        assert len(error.splitlines()) == 1
    assert "ann/refused" not in hub.repos
