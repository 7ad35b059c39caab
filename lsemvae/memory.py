"""How the C library treats freed memory, and which errors mean that there was not enough."""

import contextlib
import ctypes

# From malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for this process. Without glibc it does nothing.

    By default large blocks go back to the system, and return as pages that fault one by one: a third of a training
    step on a CPU (a gigabyte of gradients each time), a quarter of scoring a full batch. The process then never
    shrinks. From outside the process, MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ do the same when they are
    larger than the largest block.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)


_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "could not create a ")
"""What torch's allocators and oneDNN ("… a primitive", "… a memory object") say on the CPU, with a RuntimeError. On a
GPU the exception has a class of its own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch could not allocate memory, on the host or on a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
