"""Exact search: every query against every key. No file; made from the stored keys when a version is opened.

It costs 4 d bytes per entry and time in proportion to them: the right choice for tens of thousands of entries, and the
twin that every other family is tested against.
"""

from pathlib import Path
from typing import Self

import faiss

from knnlm.errors import InvalidRequest
from knnlm.index.contract import DEFAULTS, Family, Float32, Index, Int64, Keys, Parameters, Progress, chunks
from knnlm.index.freeing import free
from knnlm.options import SearchOptions

__all__ = ["Flat"]


class Flat(Family):
    """Recipe "flat"."""

    has_file = False

    @classmethod
    def parse(cls, recipe: str) -> Self:
        if recipe != "flat":
            raise InvalidRequest(f"recipe {recipe!r} is not known: exact search is called flat", param="recipe")
        return cls()

    def why_unsuitable(self, entries: int, dim: int) -> str | None:
        del entries, dim
        return None

    def train(self, sample: Keys, seed: int) -> bytes:
        del sample, seed
        return b""

    def add(self, trained: bytes, keys: Keys, file: Path, on_progress: Progress) -> Parameters:
        del trained, file
        on_progress(len(keys), len(keys))
        return {}

    def resident_bytes(self, keys: Keys, file: Path | None, *, resident: bool) -> int:
        del file, resident
        return 4 * int(keys.size)

    def open(self, keys: Keys, file: Path | None, parameters: Parameters, *, resident: bool) -> Index:
        del file, parameters, resident
        return self.opened(keys)

    def opened(self, keys: Keys) -> "FlatIndex":
        """The index of keys (n, d), which are copied as float32."""
        index = faiss.IndexFlatL2(keys.shape[1])
        # not by add: it grows by doubling, and would hold twice the keys meanwhile
        index.codes.resize(4 * keys.size)
        index.ntotal = len(keys)
        if keys.size:
            held = faiss.rev_swig_ptr(index.get_xb(), keys.size).reshape(keys.shape)
            for lo, hi in chunks(*keys.shape):
                held[lo:hi] = keys[lo:hi]
        return FlatIndex(index)


class FlatIndex(Index):
    """Its distances are exact up to rounding, which depends on the batch: rescoring takes that away too."""

    memory = "resident"

    def __init__(self, index: faiss.IndexFlatL2) -> None:
        self._index = index

    @property
    def keys(self) -> Float32:
        """(n, d), a view of FAISS's memory, for as long as this is open."""
        held: Float32 = faiss.rev_swig_ptr(self._index.get_xb(), self._index.ntotal * self._index.d)
        return held.reshape(self._index.ntotal, self._index.d)

    def search(self, queries: Float32, k: int, options: SearchOptions = DEFAULTS) -> tuple[Float32, Int64]:
        del options
        distances, ids = self._index.search(queries, k)
        return distances, ids

    @property
    def memory_bytes(self) -> int:
        return 4 * int(self._index.ntotal) * int(self._index.d)

    def close(self) -> None:
        index = vars(self).pop("_index", None)
        if index is not None:
            free(index)
