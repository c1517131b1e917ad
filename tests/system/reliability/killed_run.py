"""A run that is killed at many moments, restarted until it ends, and checked after each kill."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system.reliability.setting import same

from minigpt.training.checkpoint_files import find_damage
from minigpt.utils.errors import UserError
from minigpt.utils.run_files import (
    ARGUMENTS_FILE,
    CHECKSUMS_FILE,
    LOCK_FILE,
    METRICS_FILE,
    OPTIMIZER_FILE,
    checkpoint_step,
    find_checkpoints,
    read_metrics,
)
from support.fork_server import Process, start, start_ranks
from support.hub_client import USERS, environment
from support.hub_server import Hub, running_hub
from support.runs import ROOT, metrics

MAX_STEPS, SAVE_STEPS = 100, 5
WEIGHTS_FILE = "model.safetensors"
TRAINER = [sys.executable, str(ROOT / "train_accelerate.py")]

# moments that are read from the disk after the kill …
START, STEP, WRITING, DELETING = "start or resume", "steps", "writing a checkpoint", "deleting old checkpoints"
FINAL, FIGURES, UPLOAD = "writing the final model", "figures and card", "upload to the Hub"
# … and events that come before it
SECOND, DAMAGE, FULL = "beside a second trainer", "after a damaged byte", "on a full disk"
MOMENTS = (START, STEP, WRITING, DELETING, FINAL, FIGURES, UPLOAD, SECOND, DAMAGE, FULL)

AIMS = {START: 2, STEP: 2, WRITING: 3, DELETING: 3, UPLOAD: 2, SECOND: 1, DAMAGE: 2, FULL: 4}  # and their weights
AIMS_AT_THE_END = {START: 1, FINAL: 4, UPLOAD: 2, DAMAGE: 1, FULL: 1}
DISK_MB = 16
TIMEOUT_S = 60

REQUESTS_OF_AN_UPLOAD = r"/preupload/|/objects/batch$|^/large/|/commit/"
PUBLISHED = {"config.json", WEIGHTS_FILE, "tokenizer.json", "README.md", METRICS_FILE, "data.json", "environment.json"}

Sign = tuple[str, Callable[[], bool]]

hub: Hub  # of this process, see start_hub
until_the_process_ends = ExitStack()


def start_hub(cache: Path) -> None:
    """Start the Hub to which all runs of this process push, before the fork server imports the Hub's client."""
    global hub
    hub = until_the_process_ends.enter_context(running_hub(USERS))
    variables = environment(hub, cache / str(os.getpid()))
    os.environ.clear()
    os.environ.update(variables)


def can_mount(folder: Path) -> bool:
    """Whether this user can mount a small file system."""
    try:
        with small_disk(folder):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a file system of `DISK_MB` MB at `folder`."""
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", folder], check=True, capture_output=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@dataclass(frozen=True)
class Job:
    """What the killed runs of one number of ranks have in common."""

    folder: Path
    options: list[str]
    processes: int
    uninterrupted: Path
    faults_dir: Path | None  # for copies of the runs in which a fault was found


def kill_a_run(job: Job, seed: int, number: int, kills: int) -> list[dict[str, Any]]:
    """Kill a run up to `kills` times and then let it end. Returns one record per kill, each with the run's outcome."""
    moments = random.Random(f"{seed} {number}")
    name = f"run-{seed}-{number}"
    with ExitStack() as stack:
        folder = job.folder / name
        on_small_disk = moments.random() < 0.3 and can_mount(job.folder / f"probe-{number}")
        if on_small_disk:
            stack.enter_context(small_disk(folder))
        else:
            folder.mkdir()
        stack.callback(shutil.rmtree, folder / "run", ignore_errors=True)
        run = KilledRun(job, moments, folder / "run", f"{name}-{time.time():.0f}", on_small_disk)
        while not run.finished and len(run.records) < kills:
            run.launch_and_kill()
        run.finish()
        identical = run.finished and same(job.uninterrupted, run.run_dir)
        return [{**record, "finished": run.finished, "bit_identical": identical} for record in run.records]


class Watch:
    """Tells what has changed in a folder since the watch began."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before = {name: self._stamp(name) for name in self._names()}

    def changed(self, prefix: str) -> bool:
        """Whether there is a new or changed file or folder whose name has this prefix."""
        names = [name for name in self._names() if name.startswith(prefix)]
        return any(self._stamp(name) != self.before.get(name) for name in names)

    def _names(self) -> list[str]:
        return [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []

    def _stamp(self, name: str) -> int | None:
        with suppress(FileNotFoundError):
            return (self.folder / name).lstat().st_mtime_ns
        return None


class Launch:
    """One start of the trainer, alone or as several ranks."""

    def __init__(self, options: list[str], processes: int) -> None:
        words = [*TRAINER, *options]
        self.ranks: list[Process] = [start(words)] if processes == 1 else start_ranks(words, processes)

    def has_ended(self) -> bool:
        """Whether rank 0 has ended, which works longest, or any rank has failed."""
        return self.ranks[0].poll() is not None or any(rank.poll() for rank in self.ranks)

    def wait(self) -> list[int | None]:
        """The exit codes. A rank that does not end is killed and has the code None."""
        deadline = time.monotonic() + TIMEOUT_S
        codes: list[int | None] = []
        for rank in self.ranks:
            try:
                codes.append(rank.wait(max(0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
                codes.append(None)
        return codes

    def kill(self, ranks: list[Process]) -> list[int | None]:
        """Kill some ranks; returns the exit codes of the others, which must end by themselves."""
        for rank in ranks:
            rank.kill()
        codes = self.wait()
        return [code for rank, code in zip(self.ranks, codes, strict=True) if rank not in ranks]

    @property
    def output(self) -> str:
        """What rank 0 has printed so far."""
        return self.ranks[0].stdout()

    @property
    def errors(self) -> str:
        """The end of what the ranks have printed to stderr."""
        return " | ".join(rank.stderr()[-1500:] for rank in self.ranks)


class KilledRun:
    """A run, what is known to be on its disk, and the records of its kills."""

    def __init__(self, job: Job, moments: random.Random, run_dir: Path, name: str, on_small_disk: bool) -> None:
        self.job, self.moments, self.run_dir, self.name, self.on_small_disk = (
            job,
            moments,
            run_dir,
            name,
            on_small_disk,
        )
        self.repo_id = f"ann/{name}"
        self.ballast = run_dir.parent / "ballast"
        self.losses = metrics(job.uninterrupted, "train/loss")
        self.newest = 0  # step of the newest undamaged checkpoint
        self.damaged: set[str] = set()
        self.commits: list[str] = []  # of the Hub, already checked
        self.early_kills = moments.randint(4, 9)  # then the run may reach its end
        self.finished = self.pushes = False
        self.records: list[dict[str, Any]] = []
        for content in (hub.repos, hub.large_files, hub.requests):
            content.clear()

    # ---- one start and its end -----------------------------------------------------------------------------------
    def launch_and_kill(self) -> None:
        """Start the trainer, kill it at a moment, and check what is left."""
        began = time.monotonic()
        aim = self._choose_aim()
        event = self._damage_a_byte() if aim == DAMAGE else ""
        newest_before, watch, requests = self.newest, Watch(self.run_dir), len(hub.requests)
        launch = self._launch(aim)
        (sign, there), longest_delay_s = self._choose_sign(aim, watch, launch, requests)
        codes: list[int | None] | None = None  # of the ranks that end by themselves
        delay_s, victims = 0.0, launch.ranks
        faults: list[str] = []
        if self._wait_for(there, launch, closely=aim in (DELETING, FINAL)):
            if aim == SECOND:
                faults += self._second_trainer(launch)
            if aim == FULL:
                event = self._fill_the_disk()
                if self.moments.random() < 0.5:
                    codes = launch.wait()  # the disk ends it, or training continues without checkpoints
                    if None in codes:
                        faults.append(f"it did not end: {codes}")
            if codes is None:
                delay_s = longest_delay_s * self.moments.random() ** 2
                time.sleep(delay_s)
                # earlier, the others would wait for a group to form; torch's launcher would end them
                if len(victims) > 1 and watch.changed(LOCK_FILE + ".json") and self.moments.random() < 0.25:
                    victims = [self.moments.choice(victims)]
                codes = launch.kill(victims)
                faults += self._faults_of_survivors(codes, watch)
        else:
            codes = launch.wait()
            if any(code != 0 for code in codes):
                faults.append(f"it ended with {codes}: {launch.errors}")
        killed = aim == FULL or any(rank.returncode == -9 for rank in launch.ranks)
        on_disk = self._moment(watch, launch, requests, sign)
        self.finished = launch.ranks[0].returncode == 0
        faults += self._faults_of_output(launch, newest_before) + self._faults_on_disk() + self._faults_on_hub()
        if aim == FULL and self.ballast.exists():
            if not self.finished and self.moments.random() < 0.5:
                faults += self._refused_on_the_full_disk()
            self.ballast.unlink()
        if not killed and not faults:  # the run has ended before the sign: nothing to record
            self.finished = True
            return
        self.records.append(
            {
                "run": self.name,
                "ranks": self.job.processes,
                "aim": aim,
                "moment": aim if aim in (SECOND, DAMAGE, FULL) else on_disk,
                "on_disk": on_disk,
                "sign": sign,
                "event": event,
                "delay_ms": round(1000 * delay_s, 2),
                "killed_ranks": [launch.ranks.index(rank) for rank in victims],
                "other_codes": codes,
                "stderr": launch.ranks[0].stderr()[-300:],
                "checkpoint_before": newest_before,
                "checkpoint_after": self.newest,
                "seconds": round(time.monotonic() - began, 2),
                "faults": faults,
            }
        )
        if faults:
            self._keep(launch)

    def finish(self) -> None:
        """Restart the run without a kill, unless it has ended."""
        if self.finished:
            return
        newest_before = self.newest
        launch = self._launch(UPLOAD if self.pushes else STEP)
        codes = launch.wait()
        self.finished = all(code == 0 for code in codes)
        faults = [] if self.finished else [f"the last start ended with {codes}: {launch.errors}"]
        faults += self._faults_of_output(launch, newest_before) + self._faults_on_disk() + self._faults_on_hub()
        if self.finished and self.pushes and hub.repos[self.repo_id].messages[-1] != "End of training":
            faults.append("the final model was not pushed")
        if faults:
            self.records[-1]["faults"] += faults
            self._keep(launch)

    def _choose_aim(self) -> str:
        at_end = self.newest == MAX_STEPS
        if not at_end and len(self.records) >= self.early_kills:
            return FINAL
        aims = dict(AIMS_AT_THE_END if at_end else AIMS)
        if not self.on_small_disk:
            del aims[FULL]
        if len(self._undamaged()) < 2:
            del aims[DAMAGE]
        if self.newest > MAX_STEPS // 2:
            aims.pop(SECOND, None)  # the first trainer would end before the second is refused
        return self.moments.choices(list(aims), list(aims.values()))[0]

    def _launch(self, aim: str) -> Launch:
        options = [*self.job.options, "--output_dir", str(self.run_dir), "--resume_from_checkpoint", "latest"]
        options += ["--save_total_limit", "1" if aim == DELETING else "50"]  # many at once take longer to delete
        if aim == UPLOAD:
            self.pushes = True
            options += ["--push_to_hub", "--hub_model_id", self.repo_id]
        elif self.moments.random() < 0.25:
            options += ["--async_save"]
        return Launch(options, self.job.processes)

    def _choose_sign(
        self, aim: str, watch: Watch, launch: Launch, requests: int
    ) -> tuple[str, Callable[[], bool], float]:
        """What is waited for before the kill, and the longest delay after it in seconds."""

        def changed(prefix: str) -> Sign:
            return f"{prefix} changes", lambda: watch.changed(prefix)

        def exists(name: str) -> Sign:
            return f"{name} exists", (self.run_dir / name).exists

        def requested(pattern: str) -> Sign:
            return f"a request of {pattern}", lambda: any(
                re.search(pattern, path) for _, path, _ in hub.requests[requests:]
            )

        logged = ("a step is logged", lambda: _has_made_a_step(launch))
        later = self.newest + SAVE_STEPS * self.moments.randint(1, 3)
        choices: dict[str, list[tuple[Sign, float]]] = {
            START: [
                (("the start", lambda: True), 0.1),
                (changed(LOCK_FILE + ".json"), 0.1),
                (changed(ARGUMENTS_FILE), 0.02),
                (changed(METRICS_FILE), 0.005),
            ],
            STEP: [(logged, 0.3)],
            WRITING: [
                (exists(f".writing-checkpoint-{later}"), 0.02),
                (exists(f".writing-checkpoint-{later}/{OPTIMIZER_FILE}"), 0.02),
            ],
            DELETING: [(changed(".deleting-"), 0.002), (exists(f"checkpoint-{later}"), 0.005)],
            FINAL: [(changed(".writing-model"), 0.02), (changed(WEIGHTS_FILE), 0.02)],
            UPLOAD: [(requested(pattern), 0.02) for pattern in REQUESTS_OF_AN_UPLOAD.split("|")],
            SECOND: [(changed(LOCK_FILE + ".json"), 0.02)],
            DAMAGE: [(logged, 0.1)],
            FULL: [(logged, 0.3), (changed(".writing-"), 0.3), (changed(ARGUMENTS_FILE), 0.3)],
        }
        return self.moments.choice(choices[aim])

    def _wait_for(self, there: Callable[[], bool], launch: Launch, closely: bool) -> bool:
        """Wait for a sign. False if the run ends before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not there():
            if launch.has_ended() or time.monotonic() > deadline:
                return False
            time.sleep(0.0001 if closely else 0.001)
        return True

    def _moment(self, watch: Watch, launch: Launch, requests: int, sign: str) -> str:
        """What the run was doing when it was killed, read from what it left."""
        uploads = [path for _, path, _ in hub.requests[requests:] if re.search(REQUESTS_OF_AN_UPLOAD, path)]
        if uploads and ("/commit/" not in uploads[-1] or "/commit/" in sign):
            return UPLOAD
        if watch.changed(".writing-model"):
            return FINAL
        if watch.changed(WEIGHTS_FILE):
            return FIGURES
        if watch.changed(".deleting-"):
            return DELETING
        if watch.changed(".writing-checkpoint"):
            return WRITING
        return STEP if _has_made_a_step(launch) else START

    # ---- events before a kill ------------------------------------------------------------------------------------
    def _second_trainer(self, first: Launch) -> list[str]:
        """Start a second trainer in the same folder: it must be refused, and the first must go on."""
        option = self.moments.choice(["--overwrite_output_dir", "--resume_from_checkpoint=latest"])
        second = Launch([*self.job.options, "--output_dir", str(self.run_dir), option], processes=1)
        codes = second.wait()
        if first.has_ended():
            ended = first.wait()
            return [f"a second trainer ended the first: {ended}: {first.errors}"] if any(ended) else []
        if codes == [2] and "is in use by process" in second.errors:
            return []
        return [f"a second trainer was not refused: {codes}: {second.errors}"]

    def _damage_a_byte(self) -> str:
        """Change one byte of one file of an undamaged checkpoint, often the newest. Returns what was changed."""
        checkpoints = self._undamaged()
        checkpoint = self.moments.choice([checkpoints[-1], *self.moments.sample(checkpoints[:-1], 1)])
        file = self.moments.choice(sorted(checkpoint.iterdir()))
        content = bytearray(file.read_bytes())
        # white space in JSON may change without changing what is stored
        places = [place for place, byte in enumerate(content) if file.name != CHECKSUMS_FILE or byte not in b" \n"]
        place = self.moments.choice(places)
        content[place] ^= self.moments.randint(1, 255)
        file.write_bytes(content)
        self.damaged.add(checkpoint.name)
        self.newest = max(map(checkpoint_step, self._undamaged()))
        return f"byte {place} of {checkpoint.name}/{file.name}"

    def _fill_the_disk(self) -> str:
        """Leave less room than a checkpoint takes. Returns how much."""
        left = self.moments.choice([0, self.moments.randint(0, 300_000)])
        with suppress(OSError), self.ballast.open("wb", buffering=0) as file:
            for _ in range(100):  # the run may take or free room meanwhile
                file.write(bytes(max(0, shutil.disk_usage(self.run_dir.parent).free - left)))
        return f"{left} bytes left"

    def _refused_on_the_full_disk(self) -> list[str]:
        """A start on the full disk must be refused in one line and change no checkpoint."""
        launch = self._launch(START)
        codes = launch.wait()
        faults = self._faults_on_disk()
        if codes[0] != 2 or "Traceback" in launch.ranks[0].stderr():
            faults.append(f"a start on a full disk ended with {codes}: {launch.errors}")
        return faults

    # ---- checks --------------------------------------------------------------------------------------------------
    def _undamaged(self) -> list[Path]:
        return [folder for folder in find_checkpoints(self.run_dir) if folder.name not in self.damaged]

    def _faults_of_survivors(self, codes: list[int | None], watch: Watch) -> list[str]:
        """A rank whose peer is killed must fail. Only after the last barrier has it nothing more to wait for."""
        past_the_end = watch.changed(WEIGHTS_FILE)
        if None in codes or (0 in codes and not past_the_end):
            return [f"the ranks that were not killed ended with {codes} (None: not within {TIMEOUT_S} s)"]
        return []

    def _faults_of_output(self, launch: Launch, newest: int) -> list[str]:
        """A start must resume from the newest undamaged checkpoint, and report and set aside newer ones."""
        output, faults = launch.output, []
        resumed = re.search(r"resuming from .* after step (\d+)", output)
        if not resumed:
            if newest and _has_made_a_step(launch):
                faults.append(f"it did not resume from checkpoint-{newest}")
            return faults
        if int(resumed[1]) != newest:
            faults.append(f"it resumed from {resumed[1]} instead of checkpoint-{newest}")
        for name in sorted(self.damaged):
            if int(name[11:]) > newest:
                if f"{name} is damaged and skipped" not in output:
                    faults.append(f"{name} is damaged and was not reported")
                if not list(self.run_dir.glob(f"{name}.damaged*")):
                    faults.append(f"{name} is damaged and was not set aside")
        return faults

    def _faults_on_disk(self) -> list[str]:
        """Checkpoints must be undamaged, equal those of the uninterrupted run and not be lost; so must the metrics."""
        faults, steps = [], [0]
        for folder in find_checkpoints(self.run_dir):
            damage = find_damage(folder)
            if damage is None:
                self.damaged.discard(folder.name)  # set aside, and written anew
                steps.append(checkpoint_step(folder))
                if _digests(folder) != _digests(self.job.uninterrupted / folder.name):
                    faults.append(f"{folder.name} is not that of the uninterrupted run")
            elif folder.name not in self.damaged:
                faults.append(f"{folder.name} is damaged: {damage}")
        for name in list(self.damaged):
            if not (self.run_dir / name).exists():
                self.damaged.discard(name)  # set aside, or deleted as an old one
        if max(steps) < self.newest:
            faults.append(f"checkpoint-{self.newest} is lost; the newest is now {max(steps)}")
        self.newest = max(steps)
        return faults + self._faults_in_metrics()

    def _faults_in_metrics(self) -> list[str]:
        try:
            lines = read_metrics(self.run_dir / METRICS_FILE)
        except FileNotFoundError:
            return [f"{METRICS_FILE} is lost"] if self.newest else []
        except UserError as error:
            return [str(error)]
        losses = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
        expected = list(self.losses.items())[: len(losses)]
        if losses != expected or len(losses) < self.newest:
            return [f"the losses in {METRICS_FILE} ({len(losses)}) are not those of the uninterrupted run"]
        return []

    def _faults_on_hub(self) -> list[str]:
        """The Hub must hold its earlier commit, or a complete new one with the weights of that step."""
        faults = []
        with hub.lock:
            repo = hub.repos.get(self.repo_id)
            commits = list(repo.commits) if repo else []
        if commits[: len(self.commits)] != self.commits:
            faults.append("the Hub lost a commit")
        for number in range(max(1, len(self.commits)), len(commits)):  # the first is the empty repository
            assert repo is not None
            message = repo.messages[number]
            files = {name: blob.content for name, blob in repo.commits[commits[number]].items()}
            step = message.removeprefix("Step ")
            weights = self.job.uninterrupted / (f"checkpoint-{step}" if step.isdigit() else "") / WEIGHTS_FILE
            if missing := PUBLISHED - files.keys():
                faults.append(f"commit {message!r} lacks {missing}")
            elif files[WEIGHTS_FILE] != weights.read_bytes():
                faults.append(f"commit {message!r} has other weights")
            else:
                lines = [json.loads(line) for line in files[METRICS_FILE].splitlines()]
                losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
                if any(self.losses[number] != loss for number, loss in losses.items()):
                    faults.append(f"commit {message!r} has other losses")
        self.commits = commits
        return faults

    def _keep(self, launch: Launch) -> None:
        """Keep a copy of the run with a fault, and what it printed."""
        if self.job.faults_dir is not None:
            copy = self.job.faults_dir / f"{self.name}-{len(self.records)}"
            copy.mkdir(parents=True, exist_ok=True)
            if self.run_dir.exists():
                shutil.copytree(self.run_dir, copy, dirs_exist_ok=True)
            for number, rank in enumerate(launch.ranks):
                (copy / f"rank-{number}.txt").write_text(rank.stdout() + rank.stderr(), encoding="utf-8")


def _has_made_a_step(launch: Launch) -> bool:
    return re.search(r"^step ", launch.output, re.MULTILINE) is not None


def _digests(checkpoint: Path) -> list[str]:
    """The recorded SHA-256 of weights and optimizer state."""
    files = json.loads((checkpoint / CHECKSUMS_FILE).read_text(encoding="utf-8"))["files"]
    return [files[name]["sha256"] for name in (WEIGHTS_FILE, OPTIMIZER_FILE)]
