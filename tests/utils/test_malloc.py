"""Memory that was freed is there for the next step, without the kernel having to hand it out again."""

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
for _ in range(20):  # after the first few, malloc finds room between its own small pieces
    torch.ones(16 * 2**20)
before = faults()
for _ in range(3):
    torch.ones(16 * 2**20)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is set up where it is glibc's")
def test_a_later_step_asks_the_kernel_for_no_page() -> None:
    faults = {}
    for name in ("kept", "returned"):
        words = [sys.executable, "-c", FAULTS_OF_LATER_STEPS, name]
        run = subprocess.run(words, capture_output=True, text=True, check=True)
        faults[name] = int(run.stdout)
    assert faults["returned"] > 2 * PAGES_OF_A_TENSOR  # else this test would show nothing
    assert faults["kept"] < PAGES_OF_A_TENSOR / 10
