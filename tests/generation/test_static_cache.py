"""A static cache and a compiled decoding step do not change the text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, StaticCache

from minigpt.commands import generate
from minigpt.generation.sampling import sample_text
from minigpt.generation.static_cache import use_static_cache
from minigpt.utils.errors import UserError
from support.tiny import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(eos_token="<|endoftext|>")


def test_options_keep_the_greedy_text_also_when_the_context_is_full(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, backends = tiny_model(), []

    def note_backend(function: Any, *, backend: str, **options: Any) -> Any:
        backends.append(backend)
        return function

    monkeypatch.setattr(torch, "compile", note_backend)  # the test below really compiles
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    more_than_the_context = str(model.config.max_position_embeddings + 5)
    words = ["--model", str(tmp_path), "--prompt", "abc", "--max_new_tokens", more_than_the_context, "--temperature=0"]
    texts = []
    for options in ("", "--cache_implementation static", "--torch_compile --torch_compile_backend aot_eager"):
        generate.run(generate.parse([*words, "--device", "cpu", *options.split()]))
        texts.append(capsys.readouterr().out)
        assert bool(backends) == ("--torch_compile" in options)
    assert texts[0] == texts[1] == texts[2]
    assert set(backends) == {"aot_eager"}


def test_prompts_of_every_length_share_one_compilation_and_a_static_cache(tokenizer: PreTrainedTokenizerFast) -> None:
    model, graphs, caches = tiny_model(), [], set()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        caches.add(type(kwargs["past_key_values"]))

    def texts(*prompts: str) -> list[str]:
        return sample_text(model, tokenizer, prompts, max_new_tokens=6, temperature=0)

    expected = texts("a", "ab", "abcde")
    use_static_cache(model, backend)
    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    assert texts("a") == expected[:1]
    hook.remove()
    compiled = len(graphs)
    assert texts("ab", "abcde") == expected[1:]
    assert caches == {StaticCache}
    assert 0 < compiled == len(graphs)


def test_a_growing_cache_is_not_compiled() -> None:
    words = ["--model", "DIR", "--torch_compile", "--cache_implementation", "dynamic"]
    with pytest.raises(UserError, match="torch_compile requires cache_implementation=static"):
        generate.parse(words)
