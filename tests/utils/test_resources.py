"""Laws of the resources of this process: the smallest limit of its control groups holds, and none is no limit."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from minigpt.utils import resources
from minigpt.utils.resources import free_memory, total_memory, usable_cores

MIB = 2**20


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /sys/fs/cgroup and, as the file `own`, for /proc/self/cgroup."""
    monkeypatch.setattr(resources, "GROUPS", tmp_path)
    monkeypatch.setattr(resources, "GROUPS_OF_THIS_PROCESS", tmp_path / "own")
    return tmp_path


def write_group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="ascii")


def test_without_control_groups_the_machine_is_the_limit(groups: Path) -> None:
    assert total_memory() == psutil.virtual_memory().total
    assert 0 < free_memory() <= total_memory()


def test_the_smallest_limit_of_a_group_and_its_parents_holds(groups: Path) -> None:
    """Version 2, as in a job of SLURM. Files in memory count as free; the root has no files of a limit."""
    (groups / "own").write_text("0::/slurm/job_7/step_0\n", encoding="ascii")
    write_group(groups, {"memory.stat": "inactive_file 5"})
    write_group(groups / "slurm", {"memory.max": "max", "memory.current": "99", "memory.stat": "inactive_file 0"})
    job = {
        "memory.max": f"{64 * MIB}",
        "memory.current": f"{40 * MIB}",
        "memory.stat": f"anon 7\ninactive_file {8 * MIB}",
    }
    write_group(groups / "slurm" / "job_7", job)
    step = {"memory.max": f"{96 * MIB}", "memory.current": f"{10 * MIB}", "memory.stat": "inactive_file 0"}
    write_group(groups / "slurm" / "job_7" / "step_0", step)
    assert total_memory() == 64 * MIB
    assert free_memory() == 32 * MIB


def test_version_1_with_other_controllers_and_a_group_that_the_container_cannot_see(groups: Path) -> None:
    lines = ["5:devices:/docker/abc", "4:memory,hugetlb:/docker/abc", "1:name=systemd:/docker/abc", "0::/"]
    (groups / "own").write_text("\n".join(lines) + "\n", encoding="ascii")
    write_group(
        groups / "memory",
        {
            "memory.limit_in_bytes": f"{50 * MIB}",
            "memory.usage_in_bytes": f"{30 * MIB}",
            "memory.stat": f"inactive_file 1\ntotal_inactive_file {5 * MIB}",
        },
    )
    write_group(groups / "devices" / "docker" / "abc", {"memory.limit_in_bytes": "1"})
    assert total_memory() == 50 * MIB
    assert free_memory() == 25 * MIB


def test_more_used_than_allowed_is_nothing_free(groups: Path) -> None:
    (groups / "own").write_text("0::/\n", encoding="ascii")
    write_group(groups, {"memory.max": "1000", "memory.current": "3000", "memory.stat": "inactive_file 0"})
    assert free_memory() == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to cores")
def test_cores_are_those_that_the_process_is_pinned_to() -> None:
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from minigpt.utils.resources import usable_cores; print(usable_cores())"
    )
    pinned = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert pinned.stdout == "1\n"
    assert usable_cores() == len(os.sched_getaffinity(0))
