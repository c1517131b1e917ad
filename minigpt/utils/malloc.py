"""Keep freed memory in the process, so that the next step on a CPU can use it."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
NEVER_TRIM = -1


def keep_freed_memory() -> None:
    """Configure glibc's malloc to return no memory to the system; has no effect with another malloc.

    By default every large tensor is new memory in each step, and the kernel clears it page by page, which takes an
    eighth of the time of a step of GPT-2 124M. The cost is fragmentation: free gaps that no tensor fits into
    (docs/speed.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)
