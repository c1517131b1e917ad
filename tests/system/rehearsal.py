"""Rehearse a training on several hosts, and what can happen to it: `python -m system.rehearsal` in tests/, as root.

The hosts are network namespaces of this machine, connected by a bridge; the ranks are gloo processes with a tiny
model. Each fault comes while a run trains. Measured is the time until the launchers of all hosts that still run have
ended. Then the run is resumed with another number of ranks, and its losses are compared with those of one process.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from minigpt.utils.formatting import markdown_table
from minigpt.utils.run_files import checkpoint_step, find_checkpoints
from support.runs import metrics

ROOT = Path(__file__).parents[2]
STEPS, SAVE_STEPS, SAMPLES = 60, 5, 32
FAULT_AFTER = 10  # steps
PORT = 29400


class Cluster:
    """Network namespaces at 10.98.0.1, 10.98.0.2, … on one bridge, which is in a namespace of its own."""

    def __init__(self, hosts: int, timeout_s: int) -> None:
        self.timeout_s = timeout_s
        self.hosts = [f"rehearsal-{number}" for number in range(hosts)]
        self.switch = "rehearsal-switch"

    def __enter__(self) -> "Cluster":
        self.__exit__()
        self._ip("netns", "add", self.switch)
        self._ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        self._ip("-n", self.switch, "link", "set", "bridge", "up")
        for number, host in enumerate(self.hosts):
            self._ip("netns", "add", host)
            peer = ["type", "veth", "peer", "name", f"port{number}", "netns", self.switch]
            self._ip("link", "add", "cable", "netns", host, *peer)
            self._ip("-n", self.switch, "link", "set", f"port{number}", "master", "bridge", "up")
            self._ip("-n", host, "addr", "add", f"10.98.0.{number + 1}/24", "dev", "cable")
            for device in ("cable", "lo"):
                self._ip("-n", host, "link", "set", device, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for name in [*self.hosts, self.switch]:
            self.kill(name)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def kill(self, host: str) -> None:
        for pid in self.pids(host):
            os.kill(pid, signal.SIGKILL)

    def pids(self, host: str) -> list[int]:
        """All processes of a host, its launcher first."""
        listed = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True)
        return sorted(map(int, listed.stdout.split()))

    def cut(self, number: int, is_cut: bool = True) -> None:
        self._ip("-n", self.switch, "link", "set", f"port{number}", "down" if is_cut else "up")

    @contextmanager
    def shaped(self, *discipline: str) -> Iterator[bool]:
        """The cables of all hosts with a queueing discipline of tc; False if this kernel does not have it."""
        added = [self._tc(host, "add", *discipline).returncode == 0 for host in self.hosts]
        try:
            yield all(added)
        finally:
            for host in self.hosts:
                self._tc(host, "del")

    def _tc(self, host: str, verb: str, *discipline: str) -> "subprocess.CompletedProcess[bytes]":
        words = ["ip", "netns", "exec", host, "tc", "qdisc", verb, "dev", "cable", "root", *discipline]
        return subprocess.run(words, capture_output=True)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Launch:
    """The launchers of all hosts, and where their ranks write."""

    processes: list["subprocess.Popen[str]"]
    logs: Path

    def wait(self, timeout: float, ignored: int | None = None) -> list[int]:
        """The exit codes, without that of an `ignored` host."""
        deadline = time.monotonic() + timeout
        running = [process for number, process in enumerate(self.processes) if number != ignored]
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in running]

    def sentences(self) -> list[str]:
        """The last line of each rank that wrote one."""
        last = [path.read_text(errors="replace").strip().splitlines()[-1:] for path in self.logs.glob("rank-*.log")]
        return sorted({line for lines in last for line in lines})

    def log(self) -> str:
        return (self.logs / "rank-0.log").read_text(errors="replace")


def options(folder: Path, run: str) -> list[str]:
    text = " ".join(f"line {number} of a text that a tiny model can learn" for number in range(2000))
    (folder / "text.txt").write_text(text)
    return (
        f"--train_file {folder / 'text.txt'} --tokenizer char --cache_dir {folder / 'cache'} --output_dir "
        f"{folder / run} --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --block_size 16 --dropout 0 "
        f"--per_device_train_batch_size 1 --per_device_eval_batch_size 64 --max_steps {STEPS} --warmup_steps 2 "
        f"--save_steps {SAVE_STEPS} --save_total_limit 100 --eval_steps 0 --logging_steps 1 --learning_rate 1e-2 "
        "--sample_max_new_tokens 1 --report_to none --use_cpu --resume_from_checkpoint latest"
    ).split()


def launch(
    cluster: Cluster, folder: Path, run: str, ranks: int, hosts: int, slow_s: dict[int, float] | None = None
) -> Launch:
    """Start a run on some hosts, with equally many ranks on each."""
    global PORT
    PORT += 1
    logs = folder / f"{run}-logs"
    logs.mkdir(exist_ok=True)
    words = [*options(folder, run), "--gradient_accumulation_steps", str(SAMPLES // ranks)]
    words += ["--ddp_timeout", str(cluster.timeout_s)]
    processes = []
    for number, host in enumerate(cluster.hosts[:hosts]):
        place = [str(ranks // hosts), str(number * ranks // hosts), str(ranks), str(logs)]
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable",
            "SLOW_S": str((slow_s or {}).get(number, 0)),
        }  # fmt: skip
        command = ["ip", "netns", "exec", host, sys.executable, str(ROOT / "tests" / "support" / "host.py")]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen([*command, *place, *words], env=environment, stdin=pipe, stdout=pipe, text=True)
        )
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"10.98.0.1 {PORT}\n")
        process.stdin.flush()
    return Launch(processes, logs)


def wait_for_step(launched: Launch, step: int) -> None:
    deadline = time.monotonic() + 600
    while not re.search(rf"^step +{step}/", launched.log() if (launched.logs / "rank-0.log").exists() else "", re.M):
        assert time.monotonic() < deadline, launched.log()
        assert all(process.poll() is None for process in launched.processes), launched.sentences()
        time.sleep(0.05)


def loss_difference(folder: Path, run: str, reference: dict[int, float]) -> float:
    losses = metrics(folder / run, "train/loss")
    assert list(losses) == list(reference), (list(losses), launch)
    return max(abs(losses[step] - reference[step]) for step in reference)


def rehearse(ranks: int, hosts: int, timeout_s: int) -> None:
    """Print a table of what happened."""
    faults: dict[str, Callable[[Cluster], None]] = {
        "a rank is killed": lambda cluster: os.kill(cluster.pids(cluster.hosts[1])[-1], signal.SIGKILL),
        "a rank hangs": lambda cluster: os.kill(cluster.pids(cluster.hosts[1])[-1], signal.SIGSTOP),
        "all processes of a host are killed": lambda cluster: cluster.kill(cluster.hosts[-1]),
        "the cable of a host is cut": lambda cluster: cluster.cut(hosts - 1),
    }
    rows = []
    with tempfile.TemporaryDirectory() as name, Cluster(hosts, timeout_s) as cluster:
        folder = Path(name)
        assert launch(cluster, folder, "reference", 1, 1).wait(600) == [0]
        reference = metrics(folder / "reference", "train/loss")

        def undisturbed(
            title: str, run: str, said: Callable[[Launch], str], slow_s: dict[int, float] | None = None
        ) -> None:
            started = time.monotonic()
            launched = launch(cluster, folder, run, ranks, hosts, slow_s)
            assert set(launched.wait(1800)) == {0}, launched.sentences()
            seconds = f"{time.monotonic() - started:.0f} s in all"
            rows.append(
                (title, seconds, said(launched), "0", str(ranks), f"{loss_difference(folder, run, reference):.1e}")
            )
            print(rows[-1], flush=True)

        undisturbed("none", "whole", lambda launched: "")
        with cluster.shaped("netem", "delay", "20ms", "loss", "1%") as is_shaped:
            if is_shaped:
                undisturbed("20 ms of delay, 1 % of packets lost", "lossy", lambda launched: "")
            else:
                print("this kernel has no netem: delay and loss are left out", flush=True)
        with cluster.shaped("tbf", "rate", "10mbit", "burst", "16kbit", "latency", "100ms") as is_shaped:
            if is_shaped:
                undisturbed("cables with 10 Mbit/s that drop what waits for 100 ms", "narrow", lambda launched: "")
        undisturbed(
            "a host is slow", "slow", lambda launched: re.findall("note: (rank .*)", launched.log())[-1], {1: 0.1}
        )

        for number, (title, strike) in enumerate(faults.items()):
            run = f"fault-{number}"
            launched = launch(cluster, folder, run, ranks, hosts)
            wait_for_step(launched, FAULT_AFTER + 2)
            steps_before = max(metrics(folder / run, "train/loss"))
            struck = time.monotonic()
            strike(cluster)
            lost_host = hosts - 1 if "host" in title else None
            codes = launched.wait(20 * timeout_s, ignored=lost_host)
            seconds = time.monotonic() - struck
            assert 0 not in codes
            said = launched.sentences()
            for host in cluster.hosts:
                cluster.kill(host)
            cluster.cut(hosts - 1, is_cut=False)
            newest = checkpoint_step(find_checkpoints(folder / run)[-1])
            resumed = ranks // 2 if number % 2 else ranks // 4
            assert set(launch(cluster, folder, run, resumed, hosts if resumed >= hosts else 1).wait(1800)) == {0}
            difference = loss_difference(folder, run, reference)
            reports = [line.split(": ", 1)[1] for line in said if line.startswith("train_accelerate.py")]
            said_once = re.sub(r" \(\[.*", "", reports[0]) if reports else "nothing"
            rows.append(
                (title, f"{seconds:.1f} s", said_once, str(steps_before - newest), str(resumed), f"{difference:.1e}")
            )
            print(rows[-1], flush=True)
    head = ("fault", "noticed after", "said", "steps lost", "resumed with ranks", "largest difference of a loss")
    print(f"\n{ranks} ranks on {hosts} hosts, --ddp_timeout {timeout_s}\n\n{markdown_table(head, rows)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=32, help="default: 32; a divisor of 32")
    parser.add_argument("--hosts", type=int, default=4, help="default: 4")
    parser.add_argument("--ddp_timeout", type=int, default=60, help="seconds (default: 60)")
    arguments = parser.parse_args()
    rehearse(arguments.ranks, arguments.hosts, arguments.ddp_timeout)
