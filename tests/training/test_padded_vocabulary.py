"""Laws of padded vocabularies: extra rows of the embedding change no logits, and their ids are never generated."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from minigpt.export.gpt2 import export_gpt2
from minigpt.generation.sampling import Sampling, complete
from modeling_minigpt import MiniGPTForCausalLM
from support.runs import ROOT, finish

Train = Callable[[list[str]], int]


@pytest.fixture
def padded_run(tiny_run: list[str], tmp_path: Path, train_here: Train) -> Path:
    assert train_here([*tiny_run, "--pad_vocab_size_to_multiple_of", "64", "--max_steps", "2"]) == 0
    return tmp_path / "run"


def test_the_matrix_is_padded_and_the_tokenizer_is_not(padded_run: Path) -> None:
    for folder in (padded_run, padded_run / "checkpoint-2"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) < 64
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == 64
        suppressed = json.loads((folder / "generation_config.json").read_text())["suppress_tokens"]
        assert suppressed == list(range(len(tokenizer), 64))


def test_padding_ids_are_never_sampled(padded_run: Path) -> None:
    model, tokenizer = MiniGPTForCausalLM.from_pretrained(padded_run), AutoTokenizer.from_pretrained(padded_run)
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 5.0, "top_k": 0, "num_return_sequences": 40, "max_new_tokens": 15}
    prompt = torch.tensor([[1]])
    assert int(model.generate(prompt, **options).max()) < len(tokenizer)
    sampling = Sampling(max_new_tokens=100, temperature=5.0, num_return_sequences=5)
    for completion in complete(model, tokenizer, [1], sampling, seed=0):
        # every id of the tokenizer is one character, a padding id would be none
        assert len(completion.continuation) == completion.new_tokens - (completion.finish_reason == "end")
    model.generation_config.suppress_tokens = None
    assert int(model.generate(prompt, **options).max()) >= len(tokenizer)  # without suppression they are


def test_padding_ids_are_never_sampled_by_transformers_without_the_project(padded_run: Path, tmp_path: Path) -> None:
    export_gpt2(str(padded_run), str(tmp_path / "gpt2"))
    program = (
        "import torch\n"
        "from transformers import pipeline\n"
        "torch.manual_seed(0)\n"
        f"for folder in ({str(padded_run)!r}, {str(tmp_path / 'gpt2')!r}):\n"
        "    generate = pipeline('text-generation', model=folder, trust_remote_code=True)\n"
        "    texts = generate('The ', do_sample=True, temperature=5.0, top_k=0, max_new_tokens=12,\n"
        "                     num_return_sequences=40, return_tensors=True)\n"
        "    print(max(max(text['generated_token_ids']) for text in texts) < len(generate.tokenizer))\n"
    )
    hide = f"import sys\nsys.path = [path for path in sys.path if path != {str(ROOT)!r} and 'editable' not in path]\n"
    run = finish([sys.executable, "-c", hide + program], cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True", "True"]


def test_a_padded_run_resumes_and_another_padding_is_refused(
    padded_run: Path, tiny_run: list[str], train_here: Train
) -> None:
    words = [*tiny_run, "--resume_from_checkpoint", "latest", "--max_steps", "3"]
    assert train_here([*words, "--pad_vocab_size_to_multiple_of", "64"]) == 0
    with pytest.raises(ValueError, match="vocab_size=64 is not a multiple of pad_vocab_size_to_multiple_of=100"):
        train_here([*words, "--pad_vocab_size_to_multiple_of", "100"])


def test_padding_a_pretrained_model_keeps_its_logits(
    tiny_run: list[str], text_file: Path, tmp_path: Path, train_here: Train
) -> None:
    from minigpt.config.parser import parse_arguments
    from minigpt.data.tokenizer import train_characters
    from minigpt.training.setup import build_model

    tokenizer = train_characters([text_file.read_text(encoding="utf-8")])
    tokenizer.save_pretrained(tmp_path / "gpt2")
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2))
    gpt2.save_pretrained(tmp_path / "gpt2")
    words = f"--model_name_or_path {tmp_path / 'gpt2'} --train_file {text_file} --block_size 16 --dropout 0".split()
    model = build_model(parse_arguments([*words, "--pad_vocab_size_to_multiple_of", "64"], ""), tokenizer, None)
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == 64
    ids = torch.arange(10)[None]
    logits = model.eval()(ids).logits[..., : len(tokenizer)]
    assert (logits - gpt2.eval()(ids).logits).abs().max() <= 1e-5
    assert model.generation_config.suppress_tokens == list(range(len(tokenizer), 64))
