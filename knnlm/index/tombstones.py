"""Entries of removed documents, which no search finds: a bit for every entry of the version."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from knnlm.index.contract import Int64

__all__ = ["NO_TOMBSTONES", "Tombstones"]


@dataclass(frozen=True)
class Tombstones:
    """count: how many entries. bits: uint8, bit i % 8 of byte i // 8 is set when entry i is one of them.

    Bits, and no search in ranges: that would take longer than finding the candidates.
    """

    count: int
    bits: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, ranges: tuple[Int64, Int64], entries: int) -> Self:
        """ranges: starts and ends of disjoint ranges [start, end) of a version's entries."""
        flags = np.zeros(entries, np.bool_)
        for start, end in zip(*(edges.tolist() for edges in ranges), strict=True):
            flags[start:end] = True
        return cls(int(flags.sum()), np.packbits(flags, bitorder="little"))

    def holds(self, ids: Int64) -> npt.NDArray[np.bool_]:
        """Which of ids, of any shape, are removed; -1 never is."""
        if not self.count:
            return np.zeros(ids.shape, np.bool_)
        bit = self.bits[ids >> 3] >> (ids & 7).astype(np.uint8)
        found: npt.NDArray[np.bool_] = ((bit & 1) == 1) & (ids >= 0)
        return found


NO_TOMBSTONES = Tombstones(0, np.empty(0, np.uint8))
