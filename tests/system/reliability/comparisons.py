"""Runs on other numbers of ranks and with other splits of the batch, and the cost of saving."""

import argparse
import shutil
import time
from pathlib import Path

import torch
from system.reliability.setting import WORDS, train

from minigpt.utils.formatting import markdown_table
from minigpt.utils.progress import Progress
from support.runs import metrics


def elastic(folder: Path, common: list[str], args: argparse.Namespace) -> None:
    """Change the number of ranks after steps 50 and 100, with the same global batch; compare with an unchanged run."""
    rows = []
    for first, second in ((1, 2), (2, 4)):
        runs = [folder / f"elastic-{first}-{part}" for part in range(3)]
        for part, (run, processes) in enumerate(zip(runs, (first, second, first), strict=True)):
            options = [*common, "--dropout", "0", "--max_steps", "150", "--save_steps", "50", "--output_dir", str(run)]
            options += ["--per_device_train_batch_size", str(8 // processes), "--save_total_limit", "9"]
            if part:
                checkpoint = f"checkpoint-{50 * part}"
                shutil.copytree(runs[part - 1] / checkpoint, run / checkpoint)
                options += ["--resume_from_checkpoint", "latest"]
            train(options, processes)
        unchanged, *changed = (metrics(run, "train/loss") for run in runs)
        largest = [
            max(abs(losses[step] / unchanged[step] - 1) for step in range(50 * part + 1, 50 * part + 51))
            for part, losses in enumerate(changed, start=1)
        ]
        rows.append([f"{first} → {second} → {first}", *(f"{difference:.1e}" for difference in largest)])
    head = ["ranks", "largest relative difference of the loss, steps 51 to 100", "steps 101 to 150"]
    print(markdown_table(head, rows, numeric=True))


def splits(folder: Path, common: list[str], args: argparse.Namespace) -> None:
    """Split one global batch of 8 samples over ranks, micro-batches and accumulation; twelve steps, no dropout."""
    shapes = ((1, 8, 1), (1, 1, 8), (1, 2, 4), (2, 4, 1), (2, 2, 2), (4, 2, 1))
    packings = ("wrapped", "bfd", "none")
    progress = Progress("splits", total=len(packings) * len(shapes), unit="runs")
    rows = []
    for packing in packings:
        runs = {}
        for processes, micro_batch, accumulation in shapes:
            run = folder / f"{packing}-{processes}-{micro_batch}-{accumulation}"
            options = [*common, "--dropout", "0", "--max_steps", "12", "--save_steps", "0", "--output_dir", str(run)]
            options += ["--per_device_train_batch_size", str(micro_batch), "--packing_strategy", packing]
            train([*options, "--gradient_accumulation_steps", str(accumulation)], processes)
            runs[f"{processes} x {micro_batch} x {accumulation}"] = run
            progress.update()
        reference = next(iter(runs.values()))
        for split, run in runs.items():
            row = [packing, split]
            for metric in ("train/loss", "train/grad_norm", "val/loss"):
                values, expected = metrics(run, metric), metrics(reference, metric)
                row.append(f"{max(abs(values[step] / expected[step] - 1) for step in expected):.1e}")
            rows.append(row)
    progress.close()
    head = ["samples", "ranks x micro-batch x accumulation", "train loss", "gradient norm", "validation loss"]
    print(markdown_table(head, rows, numeric=True))


def saving(folder: Path, common: list[str], args: argparse.Namespace) -> None:
    """Measure the seconds that training waits for a checkpoint of GPT-2 124M, and their share at save_steps=1000."""
    from accelerate import Accelerator

    from configuration_minigpt import MiniGPTConfig
    from minigpt.config.arguments import Arguments
    from minigpt.data.tokenizer import train_bpe
    from minigpt.optim.optimizer import build_optimizer
    from minigpt.training.checkpoint import Checkpoints
    from minigpt.training.state import TrainingState
    from modeling_minigpt import MiniGPTForCausalLM

    tokenizer = train_bpe(iter(WORDS), 300)
    accelerator, model = Accelerator(cpu=True), MiniGPTForCausalLM(MiniGPTConfig())
    optimizer = build_optimizer(model, Arguments(train_file=["text"]), torch.device("cpu"))
    ids = torch.randint(0, 50257, (1, 1024))

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    step_s = sorted(step() for _ in range(5))[2]
    print(f"a step of one micro-batch of 1,024 tokens: {step_s:.2f} s\n")
    rows = []
    for name, in_background in (("synchronous", False), ("`async_save`", True)):
        waits, totals = [], []
        for attempt in range(3):
            run_dir = folder / f"{name.strip('`')}-{attempt}"
            run_dir.mkdir()
            options = Arguments(train_file=["text"], output_dir=str(run_dir), async_save=in_background)
            checkpoints = Checkpoints(options, tokenizer)
            start = time.perf_counter()
            checkpoints.save(TrainingState(step=1000, max_steps=2000), model, optimizer, accelerator)
            waits.append(time.perf_counter() - start)
            checkpoints.finish()
            totals.append(time.perf_counter() - start)
            shutil.rmtree(run_dir)
        wait_s, total_s = sorted(waits)[1], sorted(totals)[1]
        rows.append([name, f"{wait_s:.2f} s", f"{wait_s / (1000 * step_s):.2%}", f"{total_s:.2f} s"])
    print(
        markdown_table(
            ["", "training waits", "share of 1,000 steps", "the checkpoint is complete after"], rows, numeric=True
        )
    )
