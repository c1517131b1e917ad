"""Laws of the training loop, on tiny models: they hold for every model and text."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from minigpt.config.parser import parse_arguments
from minigpt.data.datamodule import load_data
from minigpt.data.samplers import BlockOrder
from minigpt.data.samples import TokenBlocks
from minigpt.data.tokenizer import train_characters
from minigpt.training.setup import build_model
from minigpt.utils.errors import EXIT_STOPPED
from minigpt.utils.run_files import find_checkpoints
from modeling_minigpt import MiniGPTForCausalLM
from support.runs import ROOT, command, finish, metrics
from support.tensors import different_tensors

Train = Callable[[list[str]], int]


def with_option(words: list[str], **options: object) -> list[str]:
    """`words` with other values of some options; the last value on a command line counts."""
    return [*words, *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


def losses(run_dir: Path) -> list[float]:
    return list(metrics(run_dir, "train/loss").values())


# ---- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(
    tiny_run: list[str], tmp_path: Path, train_here: Train, optimizer: str
) -> None:
    words = with_option(tiny_run, optimizer=optimizer, gradient_accumulation_steps=2)
    assert train_here(words) == 0
    uninterrupted, resumed = tmp_path / "run", tmp_path / "resumed"
    shutil.copytree(uninterrupted / "checkpoint-5", resumed / "checkpoint-5")
    shutil.copy(uninterrupted / "metrics.jsonl", resumed)
    assert train_here(with_option(words, output_dir=resumed, resume_from_checkpoint="latest")) == 0
    for name in ("train/loss", "train/lr", "train/grad_norm", "val/loss"):
        assert metrics(resumed, name) == metrics(uninterrupted, name)
    assert different_tensors(uninterrupted, resumed) == []
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert different_tensors(uninterrupted / "checkpoint-12", resumed / "checkpoint-12", file) == []


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tiny_run: list[str], tmp_path: Path) -> None:
    words = with_option(tiny_run, max_steps=60, save_steps=5, eval_steps=0)
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert finish(command(*with_option(words, output_dir=uninterrupted))).returncode == 0
    words = with_option(words, output_dir=killed, resume_from_checkpoint="latest")
    with subprocess.Popen(command(*words), stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: find_checkpoints(killed), process)
        process.kill()
    assert not (killed / "checkpoint-60").exists()
    assert finish(command(*words)).returncode == 0
    assert metrics(killed, "train/loss") == metrics(uninterrupted, "train/loss")
    assert different_tensors(uninterrupted, killed) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_a_checkpoint_and_exits(tiny_run: list[str], tmp_path: Path, number: signal.Signals) -> None:
    words = with_option(tiny_run, max_steps=100000, save_steps=0, eval_steps=0)
    run_dir = tmp_path / "run"
    with subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (run_dir / "metrics.jsonl").exists() and losses(run_dir), process)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED
    assert "resume with --resume_from_checkpoint latest" in output
    assert "Traceback" not in errors
    (checkpoint,) = find_checkpoints(run_dir)
    state = json.loads((checkpoint / "training_state.json").read_text())
    assert state["step"] == max(metrics(run_dir, "train/loss"))


def wait_for(condition: Callable[[], object], process: "subprocess.Popen[str] | subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended before it was interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- the result does not depend on how the work is split ---------------------------------------------------------


def test_the_same_batch_gives_the_same_losses_however_it_is_split(tiny_run: list[str], tmp_path: Path) -> None:
    words = with_option(tiny_run, dropout=0, save_steps=0)
    splits = {"whole": (1, 8, 1), "micro": (1, 2, 4), "processes": (2, 4, 1), "both": (2, 2, 2)}
    for name, (processes, micro_batch, accumulation) in splits.items():
        options = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
        run = finish(command(*with_option(words, **options, output_dir=tmp_path / name), processes=processes))
        assert run.returncode == 0, run.stderr
    for name in splits:
        # float32 sums in another order: 1e-6 per step, which grows over twelve steps
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
        for metric in ("train/grad_norm", "val/loss"):
            whole = list(metrics(tmp_path / "whole", metric).values())
            assert list(metrics(tmp_path / name, metric).values()) == pytest.approx(whole, rel=1e-4)


def test_muon_on_two_processes_equals_muon_on_one_and_gradients_may_be_reduced_in_half_precision(
    tiny_run: list[str], tmp_path: Path, train_here: Train
) -> None:
    words = with_option(tiny_run, dropout=0, optimizer="muon")
    assert train_here(words) == 0
    one_process = losses(tmp_path / "run")
    for hook in ("no", "fp16"):
        options = {"per_device_train_batch_size": 2, "ddp_comm_hook": hook, "output_dir": tmp_path / hook}
        run = finish(command(*with_option(words, **options), processes=2))
        assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "no") == pytest.approx(one_process, rel=1e-5)
    assert losses(tmp_path / "fp16") == pytest.approx(one_process, rel=1e-4)
    assert losses(tmp_path / "fp16") != losses(tmp_path / "no")


def test_a_run_of_one_process_can_resume_on_two(tiny_run: list[str], tmp_path: Path, train_here: Train) -> None:
    words = with_option(tiny_run, dropout=0)
    assert train_here(words) == 0
    wider = tmp_path / "wider"
    shutil.copytree(tmp_path / "run" / "checkpoint-5", wider / "checkpoint-5")
    words = with_option(words, per_device_train_batch_size=2, output_dir=wider, resume_from_checkpoint="latest")
    run = finish(command(*words, processes=2))
    assert run.returncode == 0, run.stderr
    assert "resumed with other options" not in run.stdout
    assert losses(wider) == pytest.approx(losses(tmp_path / "run")[5:], rel=1e-5)


def test_the_logged_loss_is_the_mean_over_every_target_of_the_step(
    tiny_run: list[str], tmp_path: Path, train_here: Train
) -> None:
    words = with_option(tiny_run, dropout=0, max_steps=1, warmup_steps=0, gradient_accumulation_steps=3)
    assert train_here(words) == 0
    args = parse_arguments(words, "")
    shards, tokenizer = load_data(args)
    blocks, order = TokenBlocks(shards.train, 16), BlockOrder(len(shards.train), 16, args.seed)
    batch = blocks.__getitems__([order[position] for position in range(12)])
    set_seed(args.seed)
    model = build_model(args, tokenizer, None)
    logits = model(input_ids=batch["input_ids"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
    assert losses(tmp_path / "run") == pytest.approx([loss.item()], rel=1e-6)


def test_the_validation_loss_is_that_of_a_plain_loop_over_the_saved_model(
    tiny_run: list[str], tmp_path: Path, train_here: Train
) -> None:
    assert train_here(tiny_run) == 0
    args = parse_arguments(tiny_run, "")
    shards, _ = load_data(args)
    model = MiniGPTForCausalLM.from_pretrained(tmp_path / "run").eval()
    ids = torch.from_numpy(shards.validation.read(0, len(shards.validation)).astype("int64"))
    nats = 0.0
    for start in range(0, len(ids) - 1, args.block_size):
        window = ids[start : start + args.block_size + 1]
        logits = model(input_ids=window[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    reported = metrics(tmp_path / "run", "val/loss")[12]
    assert reported == pytest.approx(nats / (len(ids) - 1), rel=1e-6)
    bits = metrics(tmp_path / "run", "val/bits_per_byte")[12]
    assert bits == pytest.approx(nats / 0.6931471805599453 / shards.validation.text_bytes, rel=1e-6)


def test_with_document_attention_each_document_has_the_loss_that_it_has_alone(
    tiny_run: list[str], tmp_path: Path, train_here: Train
) -> None:
    lines = [json.dumps({"text": f"Number {n} follows number {n - 1}. " * (1 + n % 4)}) for n in range(60)]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = with_option(tiny_run, train_file=tmp_path / "documents.jsonl", document_attention="true", block_size=200)
    assert train_here(words) == 0
    args = parse_arguments(words, "")
    shards, tokenizer = load_data(args)
    model = MiniGPTForCausalLM.from_pretrained(tmp_path / "run").eval()
    ids = torch.from_numpy(shards.validation.read(0, len(shards.validation)).astype("int64"))
    assert (ids == tokenizer.eos_token_id).sum() == 6
    nats, start = 0.0, 0
    while start < len(ids) - 1:  # a window ends after a document, or at the end of a sample of 200 tokens
        ends = (ids[start:] == tokenizer.eos_token_id).nonzero()
        stop = min(start + int(ends[0]) + 1, (start // 200 + 1) * 200, len(ids) - 1)
        logits = model(input_ids=ids[None, start:stop]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, ids[start + 1 : stop + 1], reduction="sum").item()
        start = stop
    assert metrics(tmp_path / "run", "val/loss")[12] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)


# ---- what a run starts from and what it writes -------------------------------------------------------------------


def test_a_run_writes_the_files_that_the_readme_lists(tiny_run: list[str], tmp_path: Path, train_here: Train) -> None:
    assert train_here([*tiny_run, "--report_to", "tensorboard"]) == 0
    run_dir = tmp_path / "run"
    names = {path.name for path in run_dir.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } < names
    assert {"metrics.jsonl", "arguments.yaml", "loss.png", "loss.pdf", "modeling_minigpt.py"} < names
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "loss.pdf").read_bytes().startswith(b"%PDF")
    assert list(run_dir.rglob("events.out.tfevents*"))
    assert not [name for name in names if name.startswith(".")]
    for folder in (run_dir, run_dir / "checkpoint-10"):
        keys = load_file(folder / "model.safetensors").keys()
        assert not [key for key in keys if "module." in key or "_orig_mod" in key]
    assert parse_arguments([str(run_dir / "arguments.yaml")], "").max_steps == 12


def test_the_auto_classes_load_the_run_in_a_process_without_minigpt(
    tiny_run: list[str], tmp_path: Path, train_here: Train
) -> None:
    assert train_here(tiny_run) == 0
    program = (
        "from transformers import AutoModelForCausalLM, pipeline\n"
        f"folder = {str(tmp_path / 'run')!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "generate = pipeline('text-generation', model=folder, trust_remote_code=True)\n"
        "print(type(model).__module__, repr(generate('The ', max_new_tokens=4)[0]['generated_text']))\n"
    )
    empty_folder = tmp_path / "empty"
    empty_folder.mkdir()
    without_minigpt = f"[path for path in sys.path if path != {str(ROOT)!r} and 'editable' not in path]"
    run = finish([sys.executable, "-c", f"import sys\nsys.path = {without_minigpt}\n{program}"], cwd=empty_folder)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("transformers_modules.")
    assert "'The " in run.stdout


def test_fine_tuning_starts_at_the_loss_of_the_given_gpt2(
    text_file: Path, tmp_path: Path, train_here: Train, cache_dir: Path
) -> None:
    folder = tmp_path / "gpt2"
    tokenizer = train_characters([text_file.read_text(encoding="utf-8")])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2)
    ).eval()
    for parameter in gpt2.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    gpt2.save_pretrained(folder)
    words = (
        f"--model_name_or_path {folder} --train_file {text_file} --cache_dir {cache_dir} --block_size 16 --dropout 0 "
        f"--per_device_train_batch_size 4 --max_steps 1 --output_dir {tmp_path / 'run'} --report_to none --use_cpu"
    ).split()
    assert train_here(words) == 0
    args = parse_arguments([*words, "--tokenizer", str(folder)], "")
    tokens = load_data(args)[0].train
    blocks, order = TokenBlocks(tokens, 16), BlockOrder(len(tokens), 16, args.seed)
    batch = blocks.__getitems__([order[position] for position in range(4)])
    logits = gpt2(input_ids=batch["input_ids"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
    assert losses(tmp_path / "run") == pytest.approx([loss.item()], rel=1e-5)


def test_only_the_newest_checkpoints_and_the_best_one_are_kept(
    tiny_run: list[str], tmp_path: Path, train_here: Train
) -> None:
    # with this learning rate the first evaluation has the lowest loss
    words = with_option(tiny_run, max_steps=9, save_steps=1, eval_steps=1, save_total_limit=2, learning_rate=3)
    assert train_here(words) == 0
    validation = metrics(tmp_path / "run", "val/loss")
    best = min(validation, key=lambda step: validation[step])
    assert {path.name for path in find_checkpoints(tmp_path / "run")} == {
        f"checkpoint-{step}" for step in {best, 8, 9}
    }
    assert train_here([*words, "--overwrite_output_dir", "--load_best_model_at_end"]) == 0
    assert different_tensors(tmp_path / "run", tmp_path / "run" / f"checkpoint-{best}") == []


@pytest.mark.parametrize("options", [{"mixed_precision": "bf16"}, {"gradient_checkpointing": "full"}])
def test_bf16_and_gradient_checkpointing_follow_the_float32_curve(
    tiny_run: list[str], tmp_path: Path, train_here: Train, options: dict[str, str]
) -> None:
    words = with_option(tiny_run, dropout=0)
    assert train_here(words) == 0
    assert train_here(with_option(words, output_dir=tmp_path / "other", **options)) == 0
    # bfloat16 has 8 significant bits: half a percent
    tolerance = 5e-3 if "mixed_precision" in options else 1e-5
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "run"), rel=tolerance)


def test_training_lowers_the_loss(tiny_run: list[str], tmp_path: Path, train_here: Train) -> None:
    assert train_here(with_option(tiny_run, max_steps=80, learning_rate=1e-2, eval_steps=40)) == 0
    validation = metrics(tmp_path / "run", "val/loss")
    assert validation[80] < validation[40] < losses(tmp_path / "run")[0] - 0.5
