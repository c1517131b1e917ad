"""What becomes of the memory that a step on a CPU frees? It is kept for the next step, or given back to the system."""

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # glibc's malloc.h
NEVER = -1
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER, M_TOP_PAD: 1 << 26}
GIVE_BACK = {M_MMAP_THRESHOLD: 1 << 20}


def set_up_malloc(keep_freed: bool) -> None:
    """Tell glibc's malloc to keep all freed memory, or to give large tensors' back; does nothing to another malloc.

    Kept: fast. Else every large tensor is new memory in each step, and the kernel clears it page by page: an eighth of
    the time of a step of GPT-2 124M. Given back: small. Kept memory has holes that nothing fits into, up to 1 GiB of
    such a process (docs/speed.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    for parameter, value in (KEEP if keep_freed else GIVE_BACK).items():
        mallopt(parameter, value)
