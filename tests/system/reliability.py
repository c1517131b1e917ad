"""The proofs that take minutes: `make soak`, or `python tests/system/reliability.py kills|elastic|splits|saving`.

Prints the tables of docs/reliability.md. Every run is a real process, started as a user would start it.
"""

import argparse
import json
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from minigpt.training.checkpoint_files import damage
from minigpt.utils.run_files import find_checkpoints
from support.runs import command, metrics

WORDS = ["cat", "dog", "bird", "sees", "hears", "the", "a", "tree", "and", "follows"]
TINY = """
    --tokenizer char --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --block_size 16
    --per_device_eval_batch_size 32 --learning_rate 1e-2 --warmup_steps 2 --logging_steps 1 --eval_steps 0
    --sample_max_new_tokens 1 --report_to none --use_cpu
""".split()  # noqa: SIM905


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("proofs", nargs="*", default=["kills", "elastic", "splits"], metavar="PROOF")
    parser.add_argument("--kills", type=int, default=30, help="for each number of processes")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        text = Path(folder, "text.jsonl")  # short documents: a sample has room for one, two or three
        words = random.Random(0)
        documents = [" ".join(words.choices(WORDS, k=words.randint(1, 4))) for _ in range(2000)]
        text.write_text("".join(json.dumps({"text": of}) + "\n" for of in documents), encoding="utf-8")
        common = [*TINY, "--train_file", str(text), "--cache_dir", str(Path(folder, "cache"))]
        for proof in args.proofs:
            begin = time.perf_counter()
            PROOFS[proof](Path(folder), common, args)
            print(f"({proof}: {time.perf_counter() - begin:.0f} s)\n", flush=True)


def train(options: list[str], processes: int = 1) -> None:
    """Train to the end."""
    subprocess.run(command(*options, processes=processes), check=True, capture_output=True)


def kills(folder: Path, common: list[str], args: argparse.Namespace) -> None:
    """kill -9 at random moments; each time the newest checkpoint must be whole, and none that was whole be lost."""
    print(
        "| processes | kills | while writing a checkpoint | damaged or lost checkpoints | final weights and losses |"
    )
    print("| ---: | ---: | ---: | ---: | --- |", flush=True)
    moments = random.Random(args.seed)
    for processes in (1, 2):
        options = [*common, "--dropout", "0.1", "--max_steps", "400", "--save_steps", "5", "--seed", "7"]
        options += ["--per_device_train_batch_size", str(8 // processes)]
        straight, killed = folder / f"straight-{processes}", folder / f"killed-{processes}"
        train([*options, "--output_dir", str(straight)], processes)
        words = [*options, "--output_dir", str(killed), "--resume_from_checkpoint", "latest"]
        done = writing = bad = newest = runs = equal_runs = 0
        while done < args.kills:
            process = subprocess.Popen(
                command(*words, processes=processes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            wait_for_a_step(killed, process)
            time.sleep(moments.uniform(0, 0.5))
            done += process.poll() is None
            kill_all(process)
            writing += any(killed.glob(".writing-checkpoint-*"))
            bad += sum(damage(path) is not None for path in find_checkpoints(killed))
            steps = [int(path.name[11:]) for path in find_checkpoints(killed)]
            bad += max(steps, default=0) < newest
            newest = max(steps, default=0)
            if newest == 400 or done == args.kills:
                train(words, processes)
                runs += 1
                equal_runs += same(straight, killed)
                shutil.rmtree(killed)
                newest = 0
        verdict = f"bit-identical in {equal_runs} of {runs} runs"
        print(f"| {processes} | {done} | {writing} | {bad} | {verdict} |", flush=True)


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """kill -9, the launcher and its workers."""
    whole = psutil.Process(process.pid)
    family = [whole, *whole.children(recursive=True)] if process.poll() is None else []
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    process.wait()


def wait_for_a_step(run_dir: Path, process: "subprocess.Popen[bytes]") -> None:
    """Until the run has written something since now, or has ended."""
    file, since = run_dir / "metrics.jsonl", time.time()
    while process.poll() is None and not (file.exists() and file.stat().st_mtime > since and file.stat().st_size):
        time.sleep(0.005)


def same(one: Path, two: Path) -> bool:
    """Whether two runs have the same weights and logged the same losses, bit for bit."""
    ours, theirs = (load_file(run / "model.safetensors") for run in (one, two))
    weights = all(torch.equal(ours[name], theirs[name]) for name in ours)
    return weights and metrics(one, "train/loss") == metrics(two, "train/loss")


def elastic(folder: Path, common: list[str], args: argparse.Namespace) -> None:
    """The same global batch on other numbers of processes after steps 50 and 100, against a run that stays."""
    print("| processes | largest relative difference of the loss, steps 51 to 100 | steps 101 to 150 |")
    print("| --- | ---: | ---: |", flush=True)
    for first, second in ((1, 2), (2, 4)):
        runs = [folder / f"elastic-{first}-{place}" for place in range(3)]
        for place, (run, processes) in enumerate(zip(runs, (first, second, first), strict=True)):
            options = [*common, "--dropout", "0", "--max_steps", "150", "--save_steps", "50", "--output_dir", str(run)]
            options += ["--per_device_train_batch_size", str(8 // processes), "--save_total_limit", "9"]
            if place:
                at = f"checkpoint-{50 * place}"
                run.mkdir()
                shutil.copytree(runs[place - 1] / at, run / at)
                options += ["--resume_from_checkpoint", "latest"]
            train(options, processes)
        losses = [metrics(run, "train/loss") for run in runs]
        worst = [
            max(abs(losses[place][step] / losses[0][step] - 1) for step in range(50 * place + 1, 50 * place + 51))
            for place in (1, 2)
        ]
        print(f"| {first} → {second} → {first} | {worst[0]:.1e} | {worst[1]:.1e} |", flush=True)


def splits(folder: Path, common: list[str], args: argparse.Namespace) -> None:
    """One global batch of 8 samples over processes, micro-batches and accumulation; twelve steps, no dropout."""
    print("| samples | processes x micro-batch x accumulation | train loss | gradient norm | validation loss |")
    print("| --- | --- | ---: | ---: | ---: |", flush=True)
    for packing in ("wrapped", "bfd", "none"):
        runs = {}
        for processes, micro_batch, accumulation in ((1, 8, 1), (1, 1, 8), (1, 2, 4), (2, 4, 1), (2, 2, 2), (4, 2, 1)):
            run = folder / f"{packing}-{processes}-{micro_batch}-{accumulation}"
            options = [*common, "--dropout", "0", "--max_steps", "12", "--save_steps", "0", "--output_dir", str(run)]
            options += ["--per_device_train_batch_size", str(micro_batch), "--packing_strategy", packing]
            train([*options, "--gradient_accumulation_steps", str(accumulation)], processes)
            runs[f"{processes} x {micro_batch} x {accumulation}"] = run
        whole = next(iter(runs.values()))
        for name, run in runs.items():
            worst = []
            for metric in ("train/loss", "train/grad_norm", "val/loss"):
                ours, theirs = metrics(run, metric), metrics(whole, metric)
                worst.append(max(abs(ours[step] / theirs[step] - 1) for step in theirs))
            print(f"| {packing} | {name} | {' | '.join(f'{value:.1e}' for value in worst)} |", flush=True)


def saving(folder: Path, common: list[str], args: argparse.Namespace) -> None:
    """Seconds that a checkpoint of GPT-2 124M holds the training up, and its share at save_steps=1000."""
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerFast

    from configuration_minigpt import MiniGPTConfig
    from minigpt.config.arguments import Arguments
    from minigpt.data.tokenizer import train_bpe
    from minigpt.optim.optimizer import build_optimizer
    from minigpt.training.checkpoint import Checkpoints
    from minigpt.training.state import TrainingState
    from modeling_minigpt import MiniGPTForCausalLM

    tokenizer: PreTrainedTokenizerFast = train_bpe(iter(WORDS), 300)
    accelerator, model = Accelerator(cpu=True), MiniGPTForCausalLM(MiniGPTConfig())
    optimizer = build_optimizer(model, Arguments(train_file=["text"]), torch.device("cpu"))
    ids = torch.randint(0, 50257, (1, 1024))

    def step() -> float:
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begin

    step_s = sorted(step() for _ in range(5))[2]
    print(f"a step of one micro-batch of 1,024 tokens: {step_s:.2f} s\n")
    print("| | the training waits | of 1,000 steps | the file is there after |\n| --- | ---: | ---: | ---: |")
    for name, in_background in (("synchronous", False), ("async_save", True)):
        waits, whole = [], []
        for turn in range(3):
            options = Arguments(
                train_file=["text"], output_dir=str(folder / f"{name}-{turn}"), async_save=in_background
            )
            options.run_dir.mkdir()
            checkpoints = Checkpoints(options, tokenizer, max_steps=2000)
            begin = time.perf_counter()
            checkpoints.save(TrainingState(step=1000), model, optimizer, accelerator)
            waits.append(time.perf_counter() - begin)
            checkpoints.finish()
            whole.append(time.perf_counter() - begin)
            shutil.rmtree(options.run_dir)
        wait = sorted(waits)[1]
        print(f"| {name} | {wait:.2f} s | {wait / (1000 * step_s):.2%} | {sorted(whole)[1]:.2f} s |", flush=True)


PROOFS = {"kills": kills, "elastic": elastic, "splits": splits, "saving": saving}

if __name__ == "__main__":
    main()
