"""A real SLURM on this machine, with two nodes, for slow tests."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from support.runs import ROOT

NODES = ("n1", "n2")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
# a job that is queued again waits until its credentials have expired
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2
# a node that does not answer for so long is down; one that answers again is used again
SlurmdTimeout=15
ReturnToService=2
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=2 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES State=UP
"""
GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"  # counted and given to jobs, but not used by them
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def reason_to_skip() -> str | None:
    """What this machine lacks."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "setpriv") if not shutil.which(name)]
    if os.geteuid() != 0 or missing:
        lacking = f" (not found: {', '.join(missing)})" if missing else ""
        return f"needs root and SLURM{lacking}: apt-get install slurm-wlm munge"
    made = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"namespaces may not be made here: {made.stderr.strip()}" if made.returncode != 0 else None


class Slurm:
    """A controller and two nodes, with all their files in one folder.

    Each node has its own process namespace, so that all its processes can be killed together, and its own /etc/hosts,
    which names both nodes. All processes end with this one, whatever ends it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        host, files = socket.gethostname(), self.folder
        (files / "state").mkdir()
        (files / "slurm.conf").write_text(CONFIGURATION.format(folder=files, host=host, ports=_free_ports(3)))
        (files / "gres.conf").write_text(GPUS)
        (files / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
        (files / "munge.key").write_bytes(os.urandom(128))
        (files / "munge.key").chmod(0o400)
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        options = [f"--{option}={files}/munge.{suffix}" for option, suffix in places.items()]
        self._spawn("munged", "munged", "--foreground", "--force", *options)  # force: the folder is for root only
        self._wait_for_start((files / "munge.socket").exists)
        self._spawn("slurmctld", "slurmctld", "-D")
        for name in NODES:
            self.start_node(name)

    def start_node(self, name: str) -> None:
        hosts = self.folder / "hosts"
        node = f"mount --bind {hosts} /etc/hosts && exec slurmd -D -N {name}"
        namespaces = ["unshare", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child"]
        self._spawn(name, *namespaces, "sh", "-c", node)
        self._wait_for_start(lambda: self.node_state(name) in ("idle", "mixed", "allocated"))

    def kill_node(self, name: str) -> None:
        """kill -9 for every process of one node: the kernel ends a namespace with its first process."""
        self._processes[name].kill()
        self._processes.pop(name).wait()

    def stop(self) -> None:
        for name in [*NODES, "slurmctld", "munged"]:
            if name in self._processes:
                self.kill_node(name)

    def run(self, *words: str, **environment: str) -> str:
        """The output of one of SLURM's commands, called in the checkout."""
        done = subprocess.run(
            words, env={**self.environment, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def node_state(self, name: str) -> str:
        listed = subprocess.run(
            ["sinfo", "--noheader", "--nodes", name, "--format", "%T"], env=self.environment, capture_output=True
        )
        return listed.stdout.decode().strip()

    def _wait_for_start(self, condition: Callable[[], bool]) -> None:
        def holds() -> bool:
            for name, process in self._processes.items():
                assert process.poll() is None, (self.folder / f"{name}.out").read_text()
            return condition()

        _wait_until(holds)

    def _spawn(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            command = ["setpriv", "--pdeathsig", "KILL", *words]
            self._processes[name] = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)


class Job:
    """A batch job of a `Slurm`. What happens to it is printed."""

    def __init__(self, slurm: Slurm, run_dir: Path, script: str, options: list[str], words: list[str]) -> None:
        """Submit slurm/SCRIPT.sbatch with options of sbatch, and options of the trainer."""
        self.slurm, self.run_dir = slurm, run_dir
        self._output = run_dir.with_name(f"{run_dir.name}.out")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        submit = ["sbatch", "--parsable", "--cpus-per-task=1", f"--output={self._output}", *options]
        submit += [f"slurm/{script}.sbatch", *words]
        self.id = slurm.run(*submit, RUN_DIR=str(run_dir), PATH=path)
        self._submitted, self._last_event = time.monotonic(), ""
        self.report(f"sbatch {' '.join(options)} slurm/{script}.sbatch")

    def report(self, event: str) -> None:
        print(f"{time.monotonic() - self._submitted:5.0f} s  job {self.id}: {event}", flush=True)

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says, and under "Nodes" the states of both nodes."""
        shown = self.slurm.run("scontrol", "show", "job", "--oneliner", self.id)
        facts = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        facts["Nodes"] = ", ".join(f"{name} {self.slurm.node_state(name)}" for name in NODES)
        event = "{JobState} ({Reason}), restarts {Restarts}; {Nodes}".format(**facts)
        if event != self._last_event:
            self._last_event = event
            self.report(event)
        return facts

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds; the job must not end before."""

        def holds() -> bool:
            ended = self.facts()["JobState"] in ENDED  # before the condition, which may become true at the end
            held = bool(condition())
            assert held or not ended, self.output
            return held

        _wait_until(holds)

    def wait_for_state(self, state: str) -> dict[str, str]:
        """Wait until the job is in this state and, if it has ended, no process of it is left. Returns its facts."""
        self.wait_for(lambda: self.facts()["JobState"] == state)
        if state in ENDED:
            _wait_until(lambda: self.facts()["Nodes"] == ", ".join(f"{name} idle" for name in NODES))
        return self.facts()

    @contextmanager
    def training_suspended(self) -> Iterator[None]:
        """Stop the trainer's processes, not their launchers, for the time of the block: the run cannot end in it."""
        trainers = [process for process in psutil.process_iter() if self._is_trainer(process)]
        assert trainers
        for process in trainers:
            process.send_signal(signal.SIGSTOP)
        self.report("the trainer's processes are suspended")
        try:
            yield
        finally:
            for process in trainers:
                process.send_signal(signal.SIGCONT)
            self.report("the trainer's processes go on")

    def _is_trainer(self, process: psutil.Process) -> bool:
        try:
            words = process.cmdline()
        except psutil.Error:
            return False
        return {"train_accelerate.py", str(self.run_dir)} <= set(words) and "launch" not in words


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports
