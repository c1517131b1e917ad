"""Laws of W&B (offline) and Trackio (local): both get every metric, and a resumed run stays one run. Slow."""

import json
import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from support.environments import environment
from support.runs import ROOT, metrics

pytestmark = pytest.mark.slow

READ_WANDB = """
import json, struct, sys
from wandb.proto.wandb_internal_pb2 import Record

def records(path, block=32768):
    "LevelDB's log format: blocks of chunks, each with a checksum (4 bytes), a length (2) and a type (1)."
    content, position, record = open(path, "rb").read(), 7, b""
    while position + 7 < len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""

found = {"run": None, "config": {}, "history": []}
for data in records(sys.argv[1]):
    record = Record()
    record.ParseFromString(data)
    kind = record.WhichOneof("record_type")
    if kind == "run":
        found["run"] = record.run.run_id
    if kind in ("run", "config"):
        updates = record.run.config.update if kind == "run" else record.config.update
        found["config"] |= {"/".join([u.key, *u.nested_key]).strip("/"): json.loads(u.value_json) for u in updates}
    if kind == "history":
        row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        found["history"].append(row)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def trackers(tmp_path_factory: pytest.TempPathFactory) -> str:
    return os.environ.get("MINIGPT_TRACKERS_PYTHON") or environment(tmp_path_factory, "trackers", ["wandb", "trackio"])


def train_and_resume(python: str, options: list[str], folder: Path, tracker: str) -> None:
    """Train twelve steps, delete the checkpoints after step 6, and resume from step 6, which has the best one."""
    words = [*options, "--report_to", tracker, "--sample_steps", "6"]
    environ = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    for resume in ([], ["--resume_from_checkpoint", "latest"]):
        run = subprocess.run(
            [python, str(ROOT / "train_accelerate.py"), *words, *resume],
            capture_output=True, text=True, timeout=240, env=environ,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        for step in (10, 12):
            shutil.rmtree(folder / "run" / f"checkpoint-{step}")
    assert "resuming from" in run.stdout


def test_wandb_has_the_metrics_the_options_and_one_run_across_a_resume(
    trackers: str, tiny_run: list[str], tmp_path: Path
) -> None:
    train_and_resume(trackers, tiny_run, tmp_path, "wandb")
    files = sorted((tmp_path / "run").rglob("*.wandb"), key=lambda path: path.stat().st_mtime)
    parts = [
        json.loads(subprocess.run([trackers, "-c", READ_WANDB, str(file)], capture_output=True, text=True).stdout)
        for file in files
    ]
    assert len(parts) == 2
    assert len({part["run"] for part in parts}) == 1, "the resumed run is another one"
    for part, first in zip(parts, (1, 7), strict=True):
        assert part["config"]["learning_rate"] == 0.01
        logged = {row["_step"]: row["train/loss"] for row in part["history"] if "train/loss" in row}
        expected = {step: loss for step, loss in metrics(tmp_path / "run", "train/loss").items() if step >= first}
        assert logged == pytest.approx(expected)
        assert any("val/loss" in row for row in part["history"])
        assert any("samples" in row or any(key.startswith("samples") for key in row) for row in part["history"])


def test_trackio_has_the_metrics_and_one_run_across_a_resume(
    trackers: str, tiny_run: list[str], tmp_path: Path
) -> None:
    train_and_resume(trackers, tiny_run, tmp_path, "trackio")
    [database] = (tmp_path / "trackio").glob("minigpt*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1, "the resumed run is another one"
    losses = {step: json.loads(line)["train/loss"] for _, step, line in rows if "train/loss" in json.loads(line)}
    assert losses == pytest.approx(metrics(tmp_path / "run", "train/loss"))
    assert any("samples/0" in json.loads(line) for _, _, line in rows)
