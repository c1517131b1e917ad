"""What this process may use of its machine: cores and memory, within the limits of its container or its job.

Docker, Kubernetes and SLURM set these limits with control groups. A process that takes more memory is killed without a
message. Source: Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst of the Linux kernel.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
GROUPS_OF_THIS_PROCESS = Path("/proc/self/cgroup")
LIMIT_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # v2, v1
CACHE_COUNTERS = {"inactive_file", "total_inactive_file"}  # files in memory, which are dropped when it is short


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> int:
    """The bytes that this process could use if nothing else ran."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits())])


def free_memory() -> int:
    """The bytes that this process can still allocate."""
    return min([psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in _memory_limits())])


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Limit and used bytes of every control group that this process is in: a parent's limit holds for all below it."""
    for folder in _memory_groups():
        for limit_file, usage_file in LIMIT_FILES:
            try:
                limit, used, counters = (
                    (folder / name).read_text(encoding="ascii") for name in (limit_file, usage_file, "memory.stat")
                )
            except OSError:  # the other version, or the root, which has no limit
                continue
            if limit.strip() != "max":
                cache = dict(line.split() for line in counters.splitlines())
                yield int(limit), int(used) - max(int(cache.get(name, 0)) for name in CACHE_COUNTERS)


def _memory_groups() -> Iterator[Path]:
    """The folders of the control groups that limit the memory. A container may see its own group as the root."""
    if not GROUPS_OF_THIS_PROCESS.is_file():  # not Linux
        return
    for line in GROUPS_OF_THIS_PROCESS.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", maxsplit=2)
        if not controllers:
            root = GROUPS
        elif "memory" in controllers.split(","):
            root = GROUPS / "memory"
        else:
            continue
        group = root / path.lstrip("/")
        yield group
        yield from (parent for parent in group.parents if parent.is_relative_to(root))
