"""Giving memory back while other threads go on: letting go of gigabytes takes a tenth of a second.

An object that the interpreter frees is freed under its lock. So FAISS is made to delete its indexes inside a call, and
the system to take back the pages of an array before the array goes; calls of both kinds let go of the lock.
"""

import ctypes
import mmap
import sys
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

__all__ = ["drop_maps", "drop_pages", "free"]


def free(index: Any) -> None:  # Any: faiss has no types
    """Delete what FAISS read or made, and what it owns. No reference to it, or to its memory, may be used any more."""
    holder: Any = faiss.IndexReplicas(int(index.d), False)  # False: no threads of its own
    holder.add_replica(index)
    holder.own_indices = True
    index.this.disown()  # by the holder from here on
    holder.remove_replica(index)


def drop_maps(*arrays: npt.NDArray[Any]) -> None:
    """`drop_pages` for those that are maps of files: whoever still has one reads it from the file again."""
    for array in arrays:
        if isinstance(array, np.memmap):
            drop_pages(array)


def drop_pages(array: npt.NDArray[Any]) -> None:  # Any: of whatever dtype
    """Give back the memory of a C-contiguous array that nobody reads any more; its content is lost, or read again from
    the file that it maps. Elsewhere than on Linux nothing is done: the memory goes with the array."""
    if not sys.platform.startswith("linux"):
        return
    begin, page = int(array.ctypes.data), mmap.PAGESIZE
    first, end = -(-begin // page) * page, (begin + array.nbytes) // page * page  # only pages that are all its own
    if end <= first:
        return
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # what the system refuses (locked pages) is freed with the array: later, not never
    madvise(first, end - first, mmap.MADV_DONTNEED)
