"""Entries that were added to a version after its index was built: searched exactly, beside it, whatever they are.

They are searched in the space in which the index works: as its pre-transform makes them, where it has one, rounded
where it keeps them rounded. So their distances mean the same as those of the entries that the index holds.
"""

import numpy as np

from knnlm.datastore.reader import Datastore
from knnlm.index.contract import Family, Float32, Index, Int64, Keys, chunks, to_float32
from knnlm.index.flat import Flat
from knnlm.index.freeing import drop_maps, drop_pages
from knnlm.index.pre_transform import project_all, reduce_all
from knnlm.index.rescore import rescored

__all__ = ["Added", "added_bytes"]


class Added:
    """m entries, numbered from `first` on."""

    def __init__(self, keys: Keys, first: int, index: Index, *, resident: bool) -> None:
        """keys: (m, d), as they are stored. index: of the entries before them. resident: hold in this process's memory
        what rescoring reads."""
        self._first = first
        self._copied = resident and index.reduced is None
        self._stored = np.array(keys) if self._copied else keys
        reduced = _in_space(keys, index)
        self._flat = Flat().opened(self._stored if reduced is None else reduced)
        self._space = self._stored if reduced is None else reduced
        if reduced is not None and index.reduced is None:
            self._space = self._flat.keys  # the same numbers, which need not be held twice
        self._rescoring = self._stored if index.reduced is None else self._space

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def index_bytes(self) -> int:
        """What finding candidates holds in memory."""
        return self._flat.memory_bytes

    @property
    def keys_bytes(self) -> int:
        """Bytes of the keys that rescoring reads."""
        return int(self._rescoring.nbytes)

    def search(
        self, queries: Float32, projected: Float32, k: int, candidates: int, *, in_space: bool
    ) -> tuple[Float32, Int64]:
        """The min(k, m) nearest: distances and ids, nearest first, as `rescored` gives them.

        queries: (n, d). projected: (n, r), what the index's pre-transform makes of them. candidates: how many are
        rescored, at least k. in_space: distances between projected keys; otherwise between stored ones.
        """
        wanted = min(candidates, len(self))
        _, found = self._flat.search(projected, wanted)
        keys, asked = (self._space, projected) if in_space else (self._stored, queries)
        distances, ids = rescored(keys, asked, found, min(k, wanted))
        ids[ids >= 0] += self._first
        return distances, ids

    def close(self) -> None:
        """Give back its memory. Afterwards it can only be closed again."""
        if not vars(self):
            return
        if self._copied:
            drop_pages(self._stored)
        drop_maps(self._stored)
        flat = self._flat
        vars(self).clear()  # a view of FAISS's memory goes first
        flat.close()


def added_bytes(datastore: Datastore, family: Family, *, resident: bool) -> int:
    """What an `Added` of this version will hold in this process's memory, beside an index of this family."""
    m = datastore.entries - datastore.manifest.base_entries
    dim = datastore.manifest.key_dim
    space = family.transformed_dim(dim)
    copied = (resident and not family.reduced) or len(datastore.segments) > 1
    stored = datastore.keys.dtype.itemsize * m * dim if copied else 0
    return m * space * (4 + 2 * family.reduced) + stored


def _in_space(keys: Keys, index: Index) -> Keys | None:
    """What the index's pre-transform makes of the keys, as the index keeps it; None where it has no pre-transform."""
    some = to_float32(keys[:1])
    if index.project(some) is some:
        return None
    width = index.project(np.zeros((0, keys.shape[1]), np.float32)).shape[1]
    made = np.empty((len(keys), width), np.float32 if index.reduced is None else np.float16)
    make = project_all if index.reduced is None else reduce_all
    for lo, hi in chunks(*keys.shape):
        made[lo:hi] = make(index.project, to_float32(keys[lo:hi]))
    return made
