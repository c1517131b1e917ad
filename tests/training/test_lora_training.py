"""Laws of training an adapter: only it is trained and saved, a run resumes exactly, and every command can use it."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigpt.data.tokenizer import load_tokenizer, train_characters
from minigpt.export.gpt2 import export_gpt2
from minigpt.hub.upload import UploadTarget, files_to_upload
from minigpt.modeling.loading import find_model, load_model
from minigpt.training.verify_resume import differences
from minigpt.utils.errors import UserError
from support import fork_server
from support.runs import ROOT, metrics
from support.sharding_on_cpu import FSDP2
from support.tensors import different_tensors
from support.tiny import tiny_model

Train = Callable[[list[str]], int]
ADAPTER_FILES = ("adapter_model.safetensors", "optimizer.safetensors")


@pytest.fixture
def words(text_file: Path, cache_dir: Path, tmp_path: Path) -> list[str]:
    """The options of twelve steps of LoRA, with dropout everywhere, into tmp_path/run."""
    tokenizer = train_characters([text_file.read_text(encoding="utf-8")])
    tiny_model(vocab_size=len(tokenizer), initializer_range=0.02).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return (
        f"--model_name_or_path {tmp_path / 'base'} --use_peft --lora_r 4 --lora_dropout 0.2 --train_file {text_file} "
        f"--cache_dir {cache_dir} --output_dir {tmp_path / 'run'} --dropout 0.1 --block_size 16 "
        "--per_device_train_batch_size 4 --per_device_eval_batch_size 32 --max_steps 12 --warmup_steps 2 "
        "--learning_rate 1e-2 --logging_steps 1 --eval_steps 6 --save_steps 5 --save_total_limit 10 "
        "--sample_max_new_tokens 5 --report_to none --use_cpu"
    ).split()


def in_folder(words: list[str], folder: Path, *options: str) -> list[str]:
    return [*words, "--output_dir", str(folder), *options]


def test_resumed_run_equals_uninterrupted_run_and_holds_the_adapter_alone(
    words: list[str], tmp_path: Path, train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    assert train_here(words) == 0
    assert re.search(
        r"adapter LoRA of rank 4 on all linear layers: [0-9,]+ parameters are trained", capsys.readouterr().out
    )
    assert train_here(in_folder(words, resumed, "--resume_from_checkpoint", str(run / "checkpoint-5"))) == 0
    assert list(differences(run, resumed, 5, 12)) == []
    for file in ADAPTER_FILES:
        assert different_tensors(run / "checkpoint-12", resumed / "checkpoint-12", file) == []
    assert different_tensors(run, resumed, "adapter_model.safetensors") == []
    assert metrics(run, "train/loss")[12] < metrics(run, "train/loss")[1] - 0.05
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    moments = load_file(run / "checkpoint-5" / "optimizer.safetensors")
    assert moments
    assert all(".lora_" in name for name in moments)
    for folder in (run, run / "checkpoint-5"):
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} - names <= {
            "README.md"
        }
        assert not names & {"config.json", "model.safetensors", "modeling_minigpt.py"}
    versions = json.loads((run / "environment.json").read_text())["versions"]
    assert versions["peft"]


def test_the_run_folder_its_checkpoint_and_the_best_model_load_as_a_whole_model(
    words: list[str], tmp_path: Path, train_here: Train
) -> None:
    run = tmp_path / "run"
    best = ["--load_best_model_at_end", "--eval_steps", "2", "--warmup_steps", "12", "--learning_rate", "20"]
    assert train_here([*words, *best]) == 0
    state = json.loads((run / "checkpoint-12" / "training_state.json").read_text())
    assert state["best_step"] < 12
    best_checkpoint = run / f"checkpoint-{state['best_step']}"
    assert different_tensors(run, best_checkpoint, "adapter_model.safetensors") == []
    assert different_tensors(run, run / "checkpoint-12", "adapter_model.safetensors")
    assert load_tokenizer(run).get_vocab() == load_tokenizer(tmp_path / "base").get_vocab()
    ids = torch.arange(16)[None] % 20
    expected = load_model(run, device="cpu")(ids).logits
    assert not torch.equal(expected, load_model(tmp_path / "base", device="cpu")(ids).logits)
    export_gpt2(run, tmp_path / "stock")
    stock = load_model(tmp_path / "stock", device="cpu")
    torch.testing.assert_close(stock(ids).logits, expected, atol=1e-5, rtol=0)
    (run / "adapter_config.json").unlink()
    assert find_model(run) == str(run / "checkpoint-12")
    # a full fine-tuning may start from the two together
    whole = tmp_path / "whole"
    options = [word for word in words if word != "--use_peft"]
    for name in ("--lora_r", "--lora_dropout"):
        del options[options.index(name) : options.index(name) + 2]
    start = [
        "--model_name_or_path",
        str(best_checkpoint),
        "--max_steps",
        "1",
        "--warmup_steps",
        "0",
        "--learning_rate",
        "1e-9",
    ]
    assert train_here(in_folder(options, whole, *start)) == 0
    torch.testing.assert_close(load_model(whole, device="cpu")(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [[], ["--mixed_precision", "bf16"]], ids=["float32", "bf16"])
def test_activation_checkpointing_changes_no_bit_of_an_adapter(
    words: list[str], tmp_path: Path, train_here: Train, options: list[str]
) -> None:
    words = [*words, "--max_steps", "2", "--eval_steps", "0", *options]
    for mode in ("no", "selective", "full"):
        assert train_here(in_folder(words, tmp_path / mode, "--gradient_checkpointing", mode)) == 0
        assert different_tensors(tmp_path / "no", tmp_path / mode, "adapter_model.safetensors") == []


def test_another_adapter_is_refused_by_name_as_checkpoint_and_as_base(
    words: list[str], tmp_path: Path, train_here: Train
) -> None:
    assert train_here([*words, "--max_steps", "1", "--warmup_steps", "0", "--eval_steps", "0"]) == 0
    (tmp_path / "other").symlink_to(tmp_path / "base")
    for option, message in {
        "--lora_r 8": "lora_r=8, but .* was trained with 4: it is another adapter",
        "--lora_alpha 8": "lora_alpha=8, but .* was trained with 32",
        "--lora_target_modules q_proj": r"lora_target_modules=\['q_proj'\], but .* was trained with None",
        "--use_rslora": "use_rslora=True, but .* was trained with False",
        f"--model_name_or_path {tmp_path / 'other'}": "other, but .* was trained with .*base: it is an adapter of",
    }.items():
        with pytest.raises(UserError, match=message):
            train_here([*words, "--resume_from_checkpoint", "latest", *option.split()])
    with pytest.raises(UserError, match="is an adapter itself; merge it first: minigpt merge"):
        train_here(in_folder(words, tmp_path / "second", "--model_name_or_path", str(tmp_path / "run")))


def test_an_adapter_is_published_with_its_card_unless_its_base_is_a_folder(
    words: list[str], tmp_path: Path, train_here: Train
) -> None:
    with pytest.raises(
        UserError, match=r"push_to_hub would publish an adapter of .*base, which only this machine has"
    ):
        train_here([*words, "--push_to_hub"])
    assert train_here([*words, "--max_steps", "1", "--warmup_steps", "0", "--eval_steps", "0"]) == 0
    run = tmp_path / "run"
    with pytest.raises(
        UserError, match=r"is an adapter of /.*base, which only this machine has; .*minigpt merge .*run"
    ):
        files_to_upload(UploadTarget("ann/adapter"), run)
    config = json.loads((run / "adapter_config.json").read_text()) | {"base_model_name_or_path": "ann/base"}
    (run / "adapter_config.json").write_text(json.dumps(config))
    sent = {file.name for file in files_to_upload(UploadTarget("ann/adapter"), run)}
    expected = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "generation_config.json"}
    assert expected | {"README.md"} <= sent
    assert not [name for name in sent if name.endswith(".py") or name.startswith(("model", "checkpoint"))]


def launch(words: list[str], processes: int, profile: dict[str, str]) -> None:
    program = [sys.executable, str(ROOT / "train_accelerate.py"), *words]
    ranks = fork_server.start_ranks(program, processes, profile)
    code = fork_server.finish_ranks(ranks, timeout=120)
    assert code == 0, "".join(rank.stderr() for rank in ranks)


@pytest.mark.parametrize("profile", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_two_ranks_train_as_one_process_and_resume_its_checkpoint(
    words: list[str], tmp_path: Path, train_here: Train, profile: dict[str, str]
) -> None:
    words = [*words, "--dropout", "0", "--lora_dropout", "0", "--max_steps", "6", "--save_steps", "3"]
    alone, two, resumed = tmp_path / "alone", tmp_path / "two", tmp_path / "resumed"
    assert train_here(in_folder(words, alone, "--gradient_accumulation_steps", "4")) == 0
    launch(in_folder(words, two, "--gradient_accumulation_steps", "2"), 2, profile)
    for name in ("train/loss", "val/loss", "train/grad_norm"):
        assert metrics(two, name) == pytest.approx(metrics(alone, name), abs=2e-6), name
    start = ["--gradient_accumulation_steps", "4", "--resume_from_checkpoint", str(two / "checkpoint-3")]
    assert train_here(in_folder(words, resumed, *start)) == 0
    expected = metrics(alone, "train/loss")
    assert metrics(resumed, "train/loss") == pytest.approx({step: expected[step] for step in (4, 5, 6)}, abs=2e-6)
    held = load_file(two / "checkpoint-6" / "adapter_model.safetensors").keys()
    assert held == load_file(alone / "checkpoint-6" / "adapter_model.safetensors").keys()
