"""Inverted lists: keys are grouped around nlist centroids, a query visits the nprobe nearest groups.

Recipes: "ivf<nlist>[,<codec>]" with a codec of flat (float32), fp16, sq8 (a byte per dimension) or pq<M> (M bytes per
entry). What a codec loses in distances, rescoring gives back; what nprobe misses is missed.
"""

import math
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np

from knnlm.datastore.files import CHUNK
from knnlm.errors import DatastoreCorrupt, DatastoreError, InvalidRequest
from knnlm.index.contract import Family, Float32, Index, Int64, Keys, Parameters, SearchParameters, chunks, to_float32

__all__ = ["Ivf", "default_nprobe", "sample_rows"]

FACTORY = {"flat": "Flat", "fp16": "SQfp16", "sq8": "SQ8"}
OVERFETCH = {"flat": 1.0, "fp16": 1.1, "sq8": 1.25, "pq": 4.0}
PQ_CENTROIDS = 256  # FAISS cannot train a byte's codebook on fewer points
MAX_NLIST = 1 << 20

# FAISS itself samples down to 256 points per centroid and warns below 39
POINTS_PER_LIST = 64
LEAST_POINTS = 1 << 16

# A kNN-LM asks for about a thousand neighbors: lists that hold sixteen times as many, and never under 1/64 of them all
VISITED_ENTRIES = 16 * 1024
VISITED_SHARE = 64


class Ivf(Family):
    has_file = True

    def __init__(self, nlist: int, codec: str) -> None:
        self._nlist = nlist
        self._codec = codec
        self._subvectors = int(codec[2:]) if codec.startswith("pq") else 0

    @classmethod
    def parse(cls, recipe: str) -> Self:
        match = re.fullmatch(r"ivf([1-9]\d{0,6})(?:,(flat|fp16|sq8|pq[1-9]\d{0,3}))?", recipe)
        if match is None or int(match[1]) > MAX_NLIST:
            raise InvalidRequest(
                f"recipe {recipe!r} is not known: expected ivf<lists>[,flat|fp16|sq8|pq<bytes>] "
                f"with at most {MAX_NLIST} lists, like ivf256,sq8",
                param="recipe",
            )
        return cls(int(match[1]), match[2] or "flat")

    def refusal(self, entries: int, dim: int) -> str | None:
        if entries < self._nlist:
            return f"{self._nlist} lists need at least as many entries, there are {entries}"
        if self._subvectors and dim % self._subvectors:
            return f"{self._codec} cuts a key into {self._subvectors} equal parts, {dim} dimensions cannot be"
        if self._subvectors and entries < PQ_CENTROIDS:
            return f"{self._codec} needs at least {PQ_CENTROIDS} entries to be trained, there are {entries}"
        return None

    def build(self, keys: Keys, file: Path, seed: int, on_progress: Callable[[int, int], None]) -> Parameters:
        n, dim = keys.shape
        codec = f"PQ{self._subvectors}np" if self._subvectors else FACTORY[self._codec]
        # "np": without polysemous codes, which take longest to train and serve a kind of search that is not ours
        index: Any = faiss.index_factory(dim, f"IVF{self._nlist},{codec}", faiss.METRIC_L2)
        index.cp.seed = seed
        if self._subvectors:
            index.pq.cp.seed = seed
        index.train(_gather(keys, sample_rows(n, max(POINTS_PER_LIST * self._nlist, LEAST_POINTS), seed)))
        for lo, hi in chunks(n, dim):
            index.add(to_float32(keys[lo:hi]))
            on_progress(hi, n)
        try:
            faiss.write_index(index, str(file))
        except RuntimeError as err:  # FAISS has one class for everything; here it is the disk
            raise DatastoreError(f"cannot write {file}: {err}") from err
        return {
            "nprobe": default_nprobe(n, self._nlist),
            "overfetch": OVERFETCH["pq" if self._subvectors else self._codec],
        }

    def open(self, keys: Keys, file: Path | None, parameters: Parameters) -> Index:
        if file is None:
            raise DatastoreCorrupt("an ivf index needs its file, the manifest names none")
        try:
            # mapped: replicas on one machine share it, and opening is immediate
            index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as err:
            raise DatastoreCorrupt(f"{file} is not an index: {err}") from err
        if not isinstance(index, faiss.IndexIVF) or (index.ntotal, index.d) != keys.shape:
            raise DatastoreCorrupt(
                f"{file} is {type(index).__name__} of {(index.ntotal, index.d)} keys, expected IndexIVF of {keys.shape}"
            )
        return IvfIndex(index, file, parameters)


class IvfIndex(Index):
    lossy = True
    nprobe: int

    def __init__(self, index: Any, file: Path, parameters: Parameters) -> None:  # Any: faiss has no types
        self._index = index
        self._file = file
        self._bytes = file.stat().st_size
        self._nlist = int(index.nlist)
        self.nprobe = min(int(parameters.get("nprobe", default_nprobe(int(index.ntotal), self._nlist))), self._nlist)
        self.overfetch = float(parameters.get("overfetch", 1.0))

    def search(self, queries: Float32, parameters: SearchParameters) -> tuple[Float32, Int64]:
        # per request, never set on the index: other threads are searching it
        settings = faiss.SearchParametersIVF()
        settings.nprobe = min(self.nprobe if parameters.nprobe is None else parameters.nprobe, self._nlist)
        distances, ids = self._index.search(queries, parameters.k, params=settings)
        return distances, ids

    @property
    def memory_bytes(self) -> int:
        tables = getattr(self._index, "precomputed_table", None)  # FAISS makes them when it reads pq codes
        return self._bytes + (0 if tables is None else 4 * int(tables.size()))

    def warm(self) -> None:
        with suppress(FileNotFoundError), self._file.open("rb") as file:  # an index replaced since lives on unnamed
            while file.read(CHUNK):
                pass


def default_nprobe(entries: int, nlist: int) -> int:
    """How many lists a search visits when it does not say: VISITED_ENTRIES worth of them, at least 1/VISITED_SHARE."""
    wanted = max(nlist / VISITED_SHARE, VISITED_ENTRIES * nlist / max(entries, 1), 1)
    return min(nlist, math.ceil(wanted))


def sample_rows(entries: int, size: int, seed: int) -> Int64:
    """(min(size, entries),) ascending and distinct: one row drawn from each of `size` equal stretches of the corpus.

    Uniform over the corpus, as training must be: neighboring rows come from one text and are alike.
    """
    size = min(size, entries)
    edges = np.arange(size + 1, dtype=np.int64) * entries // max(size, 1)
    widths = np.diff(edges)
    return edges[:-1] + np.floor(np.random.default_rng(seed).random(size) * widths).astype(np.int64)


def _gather(keys: Keys, rows: Int64) -> Float32:
    result = np.empty((len(rows), keys.shape[1]), np.float32)
    for lo, hi in chunks(len(rows), keys.shape[1]):
        result[lo:hi] = keys[rows[lo:hi]]
    return result
