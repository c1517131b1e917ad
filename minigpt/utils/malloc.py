"""Keep the memory that a step frees on a CPU for the next step."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h

NEVER = -1


def keep_freed_memory() -> None:
    """Tell glibc's malloc to give no memory back to the system; does nothing where there is another malloc.

    Else every large tensor is new memory in each step, and the kernel clears it page by page: an eighth of the time of
    a step of GPT-2 124M. In return the process has holes into which nothing fits (docs/speed.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, NEVER)
