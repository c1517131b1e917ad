"""Laws of texts of up to 10^11 tokens: a start takes the memory of a small text, and every sample can be reached."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.runs import ROOT

SHARD_TOKENS = 10**8
START = """
import re, sys, time
from pathlib import Path
from minigpt.config.arguments import BatchArguments
from minigpt.data.datamodule import open_data_module
from minigpt.data.shards import open_shards
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before, started = peak(), time.perf_counter()
args = BatchArguments(block_size=1024, per_device_train_batch_size=16)
data_module = open_data_module(args, open_shards(sys.argv[1]), 0)
epoch = data_module.order.samples_per_epoch
for start in (0, epoch // 2, 2 * epoch - 8):  # a resumed run starts anywhere, and this one crosses an epoch
    batch = next(data_module.batches(args, start, 5, 64))
    assert batch["input_ids"].shape == (16, 1024)
print(time.perf_counter() - started, peak() - before, epoch)
"""


def sparse_shards(folder: Path, tokens: int) -> Path:
    """Shards of zeros that take no room on the disk."""
    folder.mkdir()
    shards = []
    for number in range(tokens // SHARD_TOKENS):
        name = f"train-{number:05d}.bin"
        (folder / name).touch()
        os.truncate(folder / name, 2 * SHARD_TOKENS)
        shards.append({"file": name, "tokens": SHARD_TOKENS, "sha256": f"{number:064x}"})
    split = {"tokens": tokens, "documents": None, "text_bytes": None, "shards": shards}
    manifest = {"format": "minigpt-token-shards", "version": 1, "dtype": "uint16", "splits": {"train": split}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def start(folder: Path) -> tuple[float, float, int]:
    """Seconds, MiB and samples of an epoch."""
    command = [sys.executable, "-c", START, str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    seconds, mebibytes, samples = output.split()
    return float(seconds), float(mebibytes), int(samples)


def test_the_memory_of_a_start_does_not_grow_with_the_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {tokens: start(sparse_shards(tmp_path / str(tokens), tokens)) for tokens in (10**9, 10**10, 10**11)}
    with capsys.disabled():
        for tokens, (seconds, mebibytes, samples) in found.items():
            print(f"\n{tokens:.0e} tokens, {samples:,} samples: {seconds:.2f} s, {mebibytes:.1f} MiB", end="")
    assert found[10**11][2] == (10**11 - 1 - 1024) // 1024
    assert found[10**11][1] < found[10**9][1] + 10
