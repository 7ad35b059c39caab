"""How the C library treats memory that is freed."""

import contextlib
import ctypes

# From malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have glibc keep for this process what it frees; elsewhere nothing happens.

    Large blocks go back to the system by default, and come again as pages that fault one by one: a third of a training
    step on a CPU (a gigabyte of gradients each time), a quarter of scoring a full batch. The process stays as large as
    it ever was. The same from outside: MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ above the largest block.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
