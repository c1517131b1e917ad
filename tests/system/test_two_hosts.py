"""Laws of training on two hosts: two network namespaces of this machine, connected by a virtual cable. Slow."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.runs import ROOT, command, finish, metrics
from support.tensors import different_tensors

SECONDS_TO_NOTICE = 60  # until the lost host is reported: 4 s on an idle machine

pytestmark = pytest.mark.slow


class Hosts:
    """Two network namespaces that reach each other at 10.99.0.1 and 10.99.0.2, and no other host."""

    INTERFACE = "cable"

    def __init__(self) -> None:
        self.names = [f"minigpt-{os.getpid()}-{number}" for number in range(2)]
        self.processes: list[subprocess.Popen[str]] = []

    def connect(self) -> None:
        """Raises CalledProcessError or OSError if this machine does not allow network namespaces."""
        for name in self.names:
            self._ip("netns", "add", name)
        first, second = self.names
        ends = ["netns", first, "type", "veth", "peer", "name", self.INTERFACE, "netns", second]
        self._ip("link", "add", self.INTERFACE, *ends)
        for number, name in enumerate(self.names, start=1):
            self._ip("-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", self.INTERFACE)
            self._ip("-n", name, "link", "set", self.INTERFACE, "up")
            self._ip("-n", name, "link", "set", "lo", "up")

    def launch(self, number: int, words: list[str]) -> "subprocess.Popen[str]":
        """Start the training on one host as docs/clusters.md describes, but on the CPU."""
        profile = ROOT / "accelerate_configs" / "multi_node.yaml"
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        options = ["--config_file", str(profile), "--num_machines", "2", "--num_processes", "2"]
        options += ["--machine_rank", str(number)]
        options += ["--main_process_ip", "10.99.0.1", str(ROOT / "train_accelerate.py"), *words]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[number], *launcher, *options, "--mixed_precision", "no"],
            env={**os.environ, "GLOO_SOCKET_IFNAME": self.INTERFACE},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def kill(self, number: int) -> None:
        """kill -9 for every process of one host."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[number]], capture_output=True, text=True)
        for pid in listed.stdout.split():
            os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> None:
        """End the processes on both hosts and delete the namespaces, even if `connect` failed half-way."""
        for number, name in enumerate(self.names):
            self.kill(number)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        for process in self.processes:
            process.communicate()

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command `ip` of iproute2")
    hosts = Hosts()
    try:
        try:
            hosts.connect()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces may not be made here: {error.stderr.strip()}")
        yield hosts
    finally:
        hosts.remove()


def train_on_both(hosts: Hosts, words: list[str]) -> str:
    """Train to the end. Returns the output of the first host."""
    processes = [hosts.launch(number, words) for number in range(2)]
    outputs = [process.communicate(timeout=240) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return outputs[0][0]


def assert_same_run(first: Path, second: Path) -> None:
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert metrics(first, name) == metrics(second, name)
    assert different_tensors(first, second) == []


def test_two_hosts_train_the_same_model_as_two_processes_on_one_host(
    hosts: Hosts, tiny_run: list[str], tmp_path: Path
) -> None:
    alone = finish(command(*tiny_run, "--output_dir", tmp_path / "alone", processes=2))
    assert alone.returncode == 0, alone.stderr
    assert "micro-batches x 2 processes x" in train_on_both(hosts, tiny_run)
    assert_same_run(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_host_dies_the_other_reports_it_and_the_resumed_run_equals_an_uninterrupted_one(
    hosts: Hosts, tiny_run: list[str], tmp_path: Path, victim: int
) -> None:
    words = [*tiny_run, "--max_steps", "300", "--save_steps", "20", "--eval_steps", "0"]
    words += ["--resume_from_checkpoint", "latest"]
    uninterrupted, run_dir = tmp_path / "uninterrupted", tmp_path / "run"
    reference = finish(command(*words, "--output_dir", uninterrupted, processes=2))
    assert reference.returncode == 0, reference.stderr

    processes = [hosts.launch(number, words) for number in range(2)]
    deadline = time.monotonic() + 240
    while not (run_dir / "checkpoint-40").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    hosts.kill(victim)
    _, errors = processes[1 - victim].communicate(timeout=SECONDS_TO_NOTICE)
    assert processes[1 - victim].returncode != 0
    assert f"rank {1 - victim} has lost another rank or its host" in errors
    assert "start all hosts again with --resume_from_checkpoint latest" in errors
    assert f"[rank{1 - victim}]: Traceback" not in errors
    assert not (run_dir / "checkpoint-300").exists()

    assert "resuming from" in train_on_both(hosts, words)
    assert_same_run(run_dir, uninterrupted)
