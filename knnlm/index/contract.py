"""What an index family is, and what an opened index can be asked. FAISS stays behind it.

A family is one file and one row of table.py. It is made from a recipe ("ivf256,sq8"), says whether it suits a
datastore, builds a file once, and opens it in any number of processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from knnlm.neighbors import MISSING_DISTANCE
from knnlm.options import SearchOptions

__all__ = [
    "MISSING_DISTANCE",
    "Family",
    "Float32",
    "Index",
    "Int64",
    "Keys",
    "Parameters",
    "Progress",
    "chunks",
    "sample_rows",
    "to_float32",
]

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Keys = npt.NDArray[np.floating]
Parameters = Mapping[str, int | float]
Progress = Callable[[int, int], None]  # hears what is done, and how much there is

DEFAULTS = SearchOptions()
CHUNK_BYTES = 1 << 26  # of float32: what building and opening hold at once, beside the index itself


class Index(ABC):
    """An opened index: immutable until it is closed, and safe for searches from any number of threads.

    efforts: the search options that say how much of it is looked at, by their names in SearchOptions, with its
    defaults. overfetch: candidates per neighbor that rescoring should start from. rescored: how many candidates, the
    nearest by its own distances, are rescored where a search asks for nothing else; None = all. Where it is a number,
    its own distances are ascending and do not depend on the other queries. exact: its distances are the squared
    L2 to the stored keys, whatever else is in the batch, so that rescoring adds nothing. memory: "resident", "mapped",
    "device", or "none" when it has no part of its own. reduced: (n, m) float16, keys as the index's pre-transform makes
    them; where there are such, they are what a search rescores by, unless it asks for the stored keys.
    """

    reduced: Keys | None = None
    efforts: Mapping[str, int] = {}
    overfetch: float = 1.0
    rescored: int | None = None
    exact: bool = False
    memory: str

    @abstractmethod
    def search(self, queries: Float32, k: int, options: SearchOptions = DEFAULTS) -> tuple[Float32, Int64]:
        """queries: (n, d) C-contiguous. Returns distances and ids, both (n, k); id -1 where nothing was found.

        k: how many to find, whatever `options` says of neighbors; of the options those in `efforts` count.

        Nothing is promised about the order, or about the distance beside an id of -1. Which ids are found for a query
        does not depend on the other queries.
        """

    def project(self, queries: Float32) -> Float32:
        """(n, m) of queries (n, d): what the index's pre-transform makes of them, each as if it were alone; the
        array itself where it has no pre-transform."""
        return queries

    def search_projected(self, queries: Float32, k: int, options: SearchOptions) -> tuple[Float32, Int64]:
        """`search` for what `project` gave."""
        return self.search(queries, k, options)

    def effort(self, name: str, options: SearchOptions) -> int:
        """What is asked for of one of its `efforts`, or its default."""
        asked: int | None = getattr(options, name)
        return self.efforts[name] if asked is None else asked

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """What it holds in memory once every part of it but `reduced` has been used, file maps included."""

    def grouped(self) -> Int64 | None:
        """(n,) its entries, those that lie together one after another: searched for in this order, the same parts of
        the index and of the keys are read again and again. None where it does not group them."""
        return None

    def made_of(self, keys: Float32, entries: Int64) -> npt.NDArray[np.bool_] | None:
        """(m,) whether what it keeps of entries (m,) is what keys (m, d) give; None where it cannot say."""
        del keys, entries
        return None

    def warm(self) -> None:
        """Bring what is mapped into memory, so that the first searches do not wait for the disk."""
        return

    def close(self) -> None:
        """Give back its memory, while no search runs. Afterwards it can only be closed again: all else raises."""
        vars(self).clear()


class Family(ABC):
    """One way to search, with one recipe. reduced: whether its indexes have reduced keys, see Index."""

    has_file: bool
    reduced: bool = False

    @classmethod
    @abstractmethod
    def parse(cls, recipe: str) -> Self:
        """Raises InvalidRequest, saying what recipes look like."""

    @abstractmethod
    def why_unsuitable(self, entries: int, dim: int) -> str | None:
        """Why it cannot hold this many keys of this dimension; None when it can."""

    def fallback_recipe(self, entries: int, dim: int) -> str | None:
        """The recipe to take instead when there are too few keys for this one; None when that is not the reason."""
        del entries, dim
        return None

    def training_size(self, dim: int) -> int:
        """How many keys of this dimension `train` should have; 0 when nothing is learned from them."""
        del dim
        return 0

    @abstractmethod
    def train(self, sample: Keys, seed: int) -> bytes:
        """An index of no keys, learned from a sample (m, d): what `add` begins with, in this process or in another.

        Deterministic for one seed. Raises InvalidRequest when nothing can be learned from these keys.
        """

    @abstractmethod
    def add(self, trained: bytes, keys: Keys, file: Path, on_progress: Progress) -> Parameters:
        """Write an index of keys (n, d) to `file` and return the defaults of its searches.

        Indexes that one `trained` gave share what was learned: their lists, codes and pre-transform are the same. Keys
        are added chunk by chunk; on_progress hears (keys added, n). Memory: the index and one chunk of keys. A family
        with has_file=False writes nothing. Raises DatastoreError when the file cannot be written.
        """

    def build(self, keys: Keys, file: Path, seed: int, on_progress: Progress) -> Parameters:
        """`train` on a sample of keys (n, d), then `add` all of them. Raises as they do."""
        on_progress(0, len(keys))
        rows = sample_rows(len(keys), self.training_size(keys.shape[1]), seed)
        return self.add(self.train(_rows_of(keys, rows), seed), keys, file, on_progress)

    def list_sizes(self, file: Path) -> Int64 | None:
        """(lists,) how many keys of the index in `file` lie in each list; None where it has no lists."""
        del file
        return None

    def remark(self, file: Path) -> str | None:
        """What is unusual about the index in `file` and should be known to whoever built it; None mostly."""
        del file
        return None

    def transformed_dim(self, dim: int) -> int:
        """Dimension of keys of dimension `dim` after the pre-transform."""
        return dim

    @abstractmethod
    def resident_bytes(self, keys: Keys, file: Path | None, *, resident: bool) -> int:
        """What `open` will hold in the process's own memory, known before it is opened."""

    @abstractmethod
    def open(self, keys: Keys, file: Path | None, parameters: Parameters, *, resident: bool) -> Index:
        """Open what `build` wrote for these keys. resident: read into memory what could be mapped.

        Raises DatastoreCorrupt when the file is not that.
        """


def chunks(entries: int, dim: int) -> list[tuple[int, int]]:
    """[lo, hi) over all entries, each worth at most CHUNK_BYTES of float32."""
    step = max(1, CHUNK_BYTES // (4 * dim))
    return [(lo, min(lo + step, entries)) for lo in range(0, entries, step)]


def to_float32(keys: Keys) -> Float32:
    """C-contiguous, as FAISS takes it; FAISS itself would copy silently."""
    return np.ascontiguousarray(keys, np.float32)


def sample_rows(entries: int, size: int, seed: int) -> Int64:
    """(min(size, entries),) ascending and distinct: one row drawn from each of `size` equal stretches of the corpus.

    Uniform over the corpus, as training must be: neighboring rows come from one text and are alike.
    """
    size = min(size, entries)
    edges = np.arange(size + 1, dtype=np.int64) * entries // max(size, 1)
    widths = np.diff(edges)
    return edges[:-1] + np.floor(np.random.default_rng(seed).random(size) * widths).astype(np.int64)


def _rows_of(keys: Keys, rows: Int64) -> Float32:
    result = np.empty((len(rows), keys.shape[1]), np.float32)
    for lo, hi in chunks(len(rows), keys.shape[1]):
        result[lo:hi] = keys[rows[lo:hi]]
    return result
