"""Freed memory stays in the process: a later step causes no page faults."""

import platform
import subprocess
import sys

import pytest

PAGES_OF_A_TENSOR = 64 * 2**20 // 4096
FAULTS_OF_LATER_STEPS = """
import resource, sys, torch
from minigpt.utils.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):  # the first few still grow the heap
    torch.ones(16 * 2**20)
before = faults()
for _ in range(3):
    torch.ones(16 * 2**20)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be configured")
def test_later_steps_get_no_new_pages_from_the_kernel() -> None:
    faults = {}
    for name in ("kept", "returned"):
        words = [sys.executable, "-c", FAULTS_OF_LATER_STEPS, name]
        run = subprocess.run(words, capture_output=True, text=True, check=True)
        faults[name] = int(run.stdout)
    assert faults["returned"] > 2 * PAGES_OF_A_TENSOR  # by default each of the three tensors is new memory
    assert faults["kept"] < PAGES_OF_A_TENSOR / 10
