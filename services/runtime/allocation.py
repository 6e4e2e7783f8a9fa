"""How a service's process gets memory for its answers."""

import ctypes
from collections.abc import Mapping

__all__ = ["keep_buffers"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_KEPT = 32 << 20  # bytes; glibc allows no more
KEPT = 256 << 20


def keep_buffers(environ: Mapping[str, str]) -> bool:
    """Let glibc keep what it has: an answer's buffers of some 100 KiB would otherwise be given back to the system after
    each request and faulted in for the next, which takes more time than filling them. False where nothing was changed:
    another C library, or MALLOC_ variables that say how it is to be.
    """
    if any(name.startswith("MALLOC_") for name in environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS have none; Windows has no CDLL(None)
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT))
