"""Keeps the memory that a CPU's tensors were freed from, where it would go back to the kernel.

glibc maps every block above 32 MiB anew, and gives the top of its heap back as soon as twice that
is free. Activations come and go by the megabyte, and each page of new memory is a fault that the
kernel fills with zeros: a copy of 32 MiB took 16 ms, and into memory that was kept 3 ms.
"""

import ctypes

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of malloc.h


# Fields of malloc.h's struct mallinfo2, size_t each; fordblks has the bytes that are free.
_FIRST = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks"]
_MALLINFO2 = [*_FIRST, "fordblks", "keepcost"]


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO2]


def freed_bytes() -> int:
    """Return the memory that this process has freed and kept, which it can use again; 0 where libc
    does not say."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Mallinfo2
    return mallinfo2().fordblks


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
