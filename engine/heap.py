"""Keeps the memory that a CPU's tensors were freed from, where it would go back to the kernel.

glibc maps every block above 32 MiB anew, and gives the top of its heap back as soon as twice that
is free. Activations come and go by the megabyte, and each page of new memory is a fault that the
kernel fills with zeros: a copy of 32 MiB took 16 ms, and into memory that was kept 3 ms.
"""

import ctypes

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of malloc.h


def keep_freed_memory() -> bool:
    """Have glibc's malloc reuse all that this process has freed; return whether it does.

    The process then holds on to the most that it ever used. Another libc (musl, macOS) stays as it
    is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No block is mapped by itself, and no free top is large enough to go.
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
