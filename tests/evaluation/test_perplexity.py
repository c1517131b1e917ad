"""`minigpt eval` against plain loops over a stock GPT-2, for all kinds of windows, batches and processes."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2LMHeadModel

from minigpt.cli import main
from minigpt.data.shards import open_shards
from minigpt.data.tokenizer import load_tokenizer, train_characters
from minigpt.evaluation.loss import summed_loss, target_losses
from minigpt.evaluation.perplexity import windows
from minigpt.export.gpt2 import export_gpt2
from minigpt.modeling.loss import IGNORE_INDEX, in_place_cross_entropy
from modeling_minigpt import MiniGPTForCausalLM
from support.runs import finish, launch
from support.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/: a MiniGPT of 32 positions, gpt2/: the same exported, shards/: the text prepared with its tokenizer."""
    folder = tmp_path_factory.mktemp("perplexity")
    tokenizer = train_characters([text_file.read_text(encoding="utf-8")])
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_model(len(tokenizer), **ids).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    export_gpt2(folder / "model", folder / "gpt2")
    options = ["--tokenizer", str(folder / "model"), "--output_dir", str(folder / "shards")]
    main(["prepare", "--train_file", str(text_file), *options])
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, dict[str, float]]:
    capsys.readouterr()
    main(["eval", *map(str, words), "--json", "--use_cpu"])
    return json.loads(capsys.readouterr().out)


def plain_loss(folder: Path, text: str, block_size: int, stride: int) -> tuple[float, int]:
    """The strided loop of transformers' guide over GPT2LMHeadModel: (summed nats, targets)."""
    model = GPT2LMHeadModel.from_pretrained(folder / "gpt2").eval()
    ids = torch.tensor(load_tokenizer(folder / "gpt2").encode(text))
    nats, scored, start = 0.0, 1, 0
    while scored < len(ids):
        end = min(start + block_size + 1, len(ids))
        with torch.no_grad():
            logits = model(ids[None, start : end - 1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, ids[start + 1 : end], reduction="none")
        nats += losses[scored - start - 1 :].sum().item()
        scored, start = end, start + stride
    return nats, len(ids) - 1


@pytest.mark.parametrize(("block_size", "stride"), [(32, 32), (32, 8), (17, 5), (32, 1)])
def test_eval_equals_a_plain_loop_over_the_exported_gpt2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], block_size: int, stride: int
) -> None:
    text = "The cat sees the dog.\nThe tree follows the bird.\n" * 4
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    options = ("--text_file", tmp_path / "text.txt", "--block_size", str(block_size), "--stride", str(stride))
    results = evaluate(capsys, "--model", folder / "model", folder / "gpt2", *options)
    nats, targets = plain_loss(folder, text, block_size, stride)
    for result in results.values():
        assert result["tokens"] == targets
        assert result["loss"] == pytest.approx(nats / targets, abs=1e-5)
        assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
        assert result["word_perplexity"] == pytest.approx(math.exp(nats / len(text.split())), rel=1e-4)


@pytest.mark.parametrize(("length", "block_size", "stride"), [(100, 16, 16), (100, 16, 5), (17, 16, 16), (2, 16, 1)])
def test_windows_score_every_token_but_the_first_once(length: int, block_size: int, stride: int) -> None:
    scored = [target for _, end, first in windows(length, block_size, stride) for target in range(first, end + 1)]
    assert scored == list(range(1, length))
    assert all(end - start <= block_size for start, end, _ in windows(length, block_size, stride))


def test_results_do_not_depend_on_batches_and_processes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", folder / "model", "--data", folder / "shards"]
    (one,) = evaluate(capsys, *words).values()
    (other,) = evaluate(capsys, *words, "--batch_size", "3").values()
    assert other == pytest.approx(one, rel=1e-6)
    run = finish(launch("-m", "minigpt", "eval", *words, "--json", "--use_cpu", processes=2))
    assert run.returncode == 0, run.stderr
    (shared,) = json.loads(run.stdout).values()
    assert shared == pytest.approx(one, rel=1e-9)


def test_the_standard_error_is_that_of_independent_windows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = evaluate(
        capsys, "--model", folder / "model", "--data", folder / "shards", "--block_size", "1"
    ).values()
    model = MiniGPTForCausalLM.from_pretrained(folder / "model").eval()
    validation = open_shards(folder / "shards").validation
    ids = torch.from_numpy(validation.read(0, len(validation)).astype("int64"))
    with torch.no_grad():
        logits = model(ids[:-1, None]).logits[:, 0]
    losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    assert result["standard_error"] == pytest.approx((losses.std() / len(losses) ** 0.5).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--block_size", "33"], "block_size=33 is longer than the 32 positions"),
        (["--stride", "40"], "stride=40 is greater than block_size=32"),
        (["--batch_size", "0"], "batch_size=0 must be at least 1"),
    ],
)
def test_bad_options_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--model", str(folder / "model"), "--data", str(folder / "shards"), *words, "--use_cpu"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_output_file_holds_what_is_printed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "eval.json"
    printed = evaluate(capsys, "--model", folder / "model", "--data", folder / "shards", "--output", output)
    saved = json.loads(output.read_text(encoding="utf-8"))
    assert saved["results"] == printed
    assert saved["text"] == str(folder / "shards")


def test_several_models_are_evaluated_each_run_at_its_newest_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-2").symlink_to(folder / "model")
    results = evaluate(capsys, "--model", folder / "model", tmp_path / "run", "--data", folder / "shards")
    assert list(results) == [str(folder / "model"), str(tmp_path / "run")]
    first, second = results.values()
    assert first == second


def test_the_table_is_aligned_and_has_a_row_per_model_with_the_numbers_of_the_json(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", folder / "model", folder / "gpt2", "--data", folder / "shards"]
    results = evaluate(capsys, *words)
    main(["eval", *map(str, words), "--use_cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    for row, (name, result) in zip(rows, results.items(), strict=True):
        cells = dict(zip(head, row, strict=True))
        assert cells["model"] == name
        assert cells["loss"] == f"{result['loss']:.4f}"
        assert cells["bits/byte"] == f"{result['bits_per_byte']:.4f}"


@pytest.mark.parametrize("logits_at_once", [1, 1000, 1 << 22])
def test_target_losses_are_those_of_torch_whatever_the_chunks(
    monkeypatch: pytest.MonkeyPatch, logits_at_once: int
) -> None:
    monkeypatch.setattr("minigpt.evaluation.loss.LOGITS_AT_ONCE", logits_at_once)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 50, generator=generator)
    targets = torch.randint(50, (3, 7), generator=generator)
    targets[0, 3:], targets[2] = IGNORE_INDEX, IGNORE_INDEX
    losses = torch.nn.functional.cross_entropy(
        logits.double().transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none"
    )
    torch.testing.assert_close(target_losses(logits, targets).double(), losses, atol=1e-6, rtol=1e-6)
    assert target_losses(logits.bfloat16(), targets).dtype is torch.float32


def test_the_trainer_and_eval_compute_the_same_loss_of_a_split(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (result,) = evaluate(capsys, "--model", folder / "model", "--data", folder / "shards").values()
    model = MiniGPTForCausalLM.from_pretrained(folder / "model").train()
    model.loss_function = in_place_cross_entropy
    tokens = open_shards(folder / "shards").validation
    batches = []
    for start, end, _ in windows(len(tokens), 32, 32):
        ids = torch.from_numpy(tokens.read(start, end + 1).astype("int64"))
        batches.append({"input_ids": ids[None, :-1], "shift_labels": ids[None, 1:]})
    repeated = {"input_ids": torch.zeros(1, 5, dtype=torch.long), "shift_labels": torch.zeros(1, 5, dtype=torch.long)}
    loss_nats, targets = summed_loss(model, [*batches, repeated], Accelerator(cpu=True), len(batches))
    assert targets == result["tokens"]
    assert loss_nats / targets == pytest.approx(result["loss"], rel=1e-6)
    assert model.training
