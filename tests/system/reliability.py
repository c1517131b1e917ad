"""Measure the reliability of training and print the tables of docs/reliability.md. Takes about a quarter of an hour.

    make soak, or: python tests/system/reliability.py [kills] [elastic] [splits] [saving]

Every run is a real process, started as a user would start it.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `support`, which pytest finds by itself

from minigpt.training.checkpoint_files import find_damage
from minigpt.utils.formatting import markdown_table
from minigpt.utils.progress import Progress
from minigpt.utils.run_files import METRICS_FILE, checkpoint_step, find_checkpoints
from support.runs import command, metrics
from support.tensors import different_tensors

WORDS = ["cat", "dog", "bird", "sees", "hears", "the", "a", "tree", "and", "follows"]
TINY = """
    --tokenizer char --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --block_size 16
    --per_device_eval_batch_size 32 --learning_rate 1e-2 --warmup_steps 2 --logging_steps 1 --eval_steps 0
    --sample_max_new_tokens 1 --report_to none --use_cpu
""".split()  # noqa: SIM905


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    experiments = f"any of {', '.join(EXPERIMENTS)} (default: all but saving)"
    parser.add_argument("experiments", nargs="*", default=["kills", "elastic", "splits"], help=experiments)
    parser.add_argument("--kills", type=int, default=30, help="kills per number of ranks (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.experiments) - EXPERIMENTS.keys():
        parser.error(f"unknown experiment {min(unknown)}; give {experiments}")
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        text = Path(folder, "text.jsonl")  # short documents: a sample has room for one, two or three
        generator = random.Random(0)
        documents = [" ".join(generator.choices(WORDS, k=generator.randint(1, 4))) for _ in range(2000)]
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
        common = [*TINY, "--train_file", str(text), "--cache_dir", str(Path(folder, "cache"))]
        for name in args.experiments:
            start = time.perf_counter()
            EXPERIMENTS[name](Path(folder), common, args)
            print(f"({name}: {time.perf_counter() - start:.0f} s)\n", flush=True)


def train(options: list[str], processes: int = 1) -> None:
    """Train to the end."""
    subprocess.run(command(*options, processes=processes), check=True, capture_output=True)


def kills(folder: Path, common: list[str], args: argparse.Namespace) -> None:
    """Kill -9 at random moments. After each kill all checkpoints must be undamaged and the newest still exist."""
    moments = random.Random(args.seed)
    progress = Progress("kill -9", total=2 * args.kills, unit="kills")
    rows = []
    for processes in (1, 2):
        options = [*common, "--dropout", "0.1", "--max_steps", "400", "--save_steps", "5", "--seed", "7"]
        options += ["--per_device_train_batch_size", str(8 // processes)]
        uninterrupted, killed = folder / f"uninterrupted-{processes}", folder / f"killed-{processes}"
        train([*options, "--output_dir", str(uninterrupted)], processes)
        options += ["--output_dir", str(killed), "--resume_from_checkpoint", "latest"]
        kill_count = while_writing = damaged_or_lost = newest = runs = equal_runs = 0
        while kill_count < args.kills:
            process = subprocess.Popen(
                command(*options, processes=processes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            wait_for_a_step(killed, process)
            time.sleep(moments.uniform(0, 0.5))
            killed_now = process.poll() is None
            kill_count += killed_now
            progress.update(killed_now)
            kill_with_children(process)
            while_writing += any(killed.glob(".writing-checkpoint-*"))
            checkpoints = find_checkpoints(killed)
            damaged_or_lost += sum(find_damage(checkpoint) is not None for checkpoint in checkpoints)
            last_step = max(map(checkpoint_step, checkpoints), default=0)
            damaged_or_lost += last_step < newest
            newest = last_step
            if newest == 400 or kill_count == args.kills:
                train(options, processes)
                runs += 1
                equal_runs += same(uninterrupted, killed)
                shutil.rmtree(killed)
                newest = 0
        verdict = f"bit-identical in {equal_runs} of {runs} runs"
        rows.append([str(processes), str(kill_count), str(while_writing), str(damaged_or_lost), verdict])
    progress.close()
    head = ["ranks", "kills", "while writing a checkpoint", "damaged or lost checkpoints", "final weights and losses"]
    print(markdown_table(head, rows, numeric=True))


def kill_with_children(process: "subprocess.Popen[bytes]") -> None:
    """Send SIGKILL to a launcher and its workers."""
    launcher = psutil.Process(process.pid)
    family = [launcher, *launcher.children(recursive=True)] if process.poll() is None else []
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    process.wait()


def wait_for_a_step(run_dir: Path, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the run logs a step, or ends."""
    file, start = run_dir / METRICS_FILE, time.time()
    while process.poll() is None and not (file.exists() and file.stat().st_mtime > start and file.stat().st_size):
        time.sleep(0.005)


def same(first: Path, second: Path) -> bool:
    """Whether two runs have the same weights and logged the same losses, bit for bit."""
    return not different_tensors(first, second) and metrics(first, "train/loss") == metrics(second, "train/loss")


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
            checkpoints = Checkpoints(options, tokenizer, max_steps=2000)
            start = time.perf_counter()
            checkpoints.save(TrainingState(step=1000), model, optimizer, accelerator)
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


EXPERIMENTS = {"kills": kills, "elastic": elastic, "splits": splits, "saving": saving}

if __name__ == "__main__":
    main()
