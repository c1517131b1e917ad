"""Kill runs at many moments, two runs side by side, and print how many survived."""

import argparse
import json
import os
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from system.reliability.killed_run import MAX_STEPS, MOMENTS, SAVE_STEPS, Job, can_mount, kill_a_run, start_hub
from system.reliability.setting import train

from minigpt.utils.formatting import markdown_table
from minigpt.utils.progress import Progress

KILLS_PER_RUN = 12
SIDE_BY_SIDE = 2


def kills(folder: Path, common: list[str], args: argparse.Namespace) -> None:
    """Kill -9 at many moments of runs on one and two ranks. Every run is restarted until it ends."""
    if sys.platform != "linux":
        print("kills: skipped; the runs are started and watched with means of Linux")
        return
    if not can_mount(folder / "probe"):
        print("a full disk: skipped; mounting a small file system needs root")
    output = args.output or folder / "kills.jsonl"
    jobs = []
    for processes in (1, 2):
        uninterrupted = folder / f"uninterrupted-{processes}"
        options = [*common, "--dropout", "0.1", "--max_steps", str(MAX_STEPS), "--save_steps", str(SAVE_STEPS)]
        options += ["--seed", "7", "--per_device_train_batch_size", str(8 // processes)]
        train(
            [*options, "--save_total_limit", "50", "--output_dir", str(uninterrupted)],
            processes,
            {**os.environ, "OMP_NUM_THREADS": "1"},
        )
        jobs.append(Job(folder, options, processes, uninterrupted, args.output and Path(f"{args.output}.faults")))

    progress = Progress("kill -9", total=args.kills, unit="kills")
    done, started = 0, 0
    running: dict[Future[list[dict[str, Any]]], int] = {}  # and the most kills of each
    with ProcessPoolExecutor(SIDE_BY_SIDE, get_context("spawn"), start_hub, (folder / "hub_cache",)) as pool:
        while running or done < args.kills:
            while len(running) < SIDE_BY_SIDE and (most := args.kills - done - sum(running.values())) > 0:
                most = min(most, KILLS_PER_RUN)
                running[pool.submit(kill_a_run, jobs[started % len(jobs)], args.seed, started, most)] = most
                started += 1
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for run in ended:
                del running[run]
                lines = run.result()
                with output.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
                done += len(lines)
                progress.update(len(lines))
                for line in lines:
                    for fault in line["faults"]:
                        print(f"FAULT in {line['run']}, {line['moment']}: {fault}", flush=True)
    progress.close()
    print(table([json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]))


def table(lines: list[dict[str, Any]]) -> str:
    """Kills and runs by moment and number of ranks. A run counts for every moment at which it was killed."""
    rows = []
    for moment in [*MOMENTS, None]:
        for ranks in (1, 2):
            here = [line for line in lines if line["ranks"] == ranks and moment in (line["moment"], None)]
            if not here:
                continue
            runs = {line["run"]: line for line in here}.values()
            finished, identical = (sum(line[name] for line in runs) for name in ("finished", "bit_identical"))
            faults = sum(bool(line["faults"]) for line in here)
            rows.append([moment or "all", *map(str, (ranks, len(here), faults, len(runs), finished, identical))])
    head = ["moment of the kill", "ranks", "kills", "lost or damaged", "runs", "finished", "bit-identical"]
    return markdown_table(head, rows, numeric=True)
