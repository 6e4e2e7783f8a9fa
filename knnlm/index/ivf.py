"""Inverted lists: keys are grouped around nlist centroids, a query visits the nprobe nearest groups.

Recipes: "ivf<nlist>[,<codec>]", with any codec of codecs.py. What a codec loses in distances, rescoring gives back;
what nprobe misses is missed. "ivf4096,pq64" visiting 32 lists is the recipe of Khandelwal et al. 2020 (arXiv
1911.00172) at d = 1024.
"""

import math
import re
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
import numpy.typing as npt

from knnlm.errors import DatastoreCorrupt, InvalidRequest
from knnlm.index.codecs import Codec, codec, codec_names
from knnlm.index.contract import Float32, Int64, Parameters
from knnlm.index.faiss_family import FaissFamily, FaissIndex
from knnlm.index.kernels import all_squared_distances
from knnlm.index.parallel import in_slices
from knnlm.index.pre_transform import PreTransform, split
from knnlm.index.rescore import nearest_first
from knnlm.options import SearchOptions

__all__ = ["Ivf", "default_nprobe", "list_sizes", "lists_for", "remark_on_lists", "visited"]

MAX_NLIST = 1 << 20
PQ_CENTROIDS = 256
ENTRIES_PER_LIST = 40  # FAISS warns below 39 training points per list
TRAINING_KEYS_PER_LIST = 64

# 2 sqrt(n) lists of sqrt(n) / 2 entries, of which 32 hold 16 sqrt(n). Half as many again changed perplexity by less
# than 0.2 % on five sets of keys and by 0.1 % at a million (benchmarks/README.md)
LISTS_PER_SQRT = 2  # times sqrt(n)
VISITED_PER_SQRT = 16  # times sqrt(n), entries
MIN_VISITED = 16_384  # entries: what 16 sqrt(n) is of a million
QUANTIZER_EF_SEARCH = 64  # candidates among the centroids, where a graph finds the lists
OVERSIZED = 10  # times the average list
LARGE_SHARE = 0.2  # a list that holds this part of all entries is remarked
DISTANCES_BYTES = 1 << 24  # bytes of the distances between queries and all centroids that one thread holds at once
# candidates: what farther ones add to p_kNN is a sum of many, which the distances of their codes give as well; with
# 1024 neighbors perplexity changed by -1.3 to +0.12 % on five sets of keys (benchmarks/README.md)
RESCORED = 256
FAISS_BLAS_DIM = 16  # dimensions of one code from which on its tables are a matrix product, rounded with the batch
FASTSCAN_IMPLEMENTATION = 11  # of FAISS's FastScan, with a reservoir of candidates: fastest at k around a thousand


class Ivf(FaissFamily):
    flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY

    def __init__(
        self, recipe: str, pre_transform: PreTransform | None, nlist: int, codec: Codec, *, reduced: bool = False
    ) -> None:
        super().__init__(recipe, pre_transform, codec, reduced=reduced)
        self._nlist = nlist

    @classmethod
    def parse(cls, recipe: str) -> Self:
        pre_transform, rest, reduced = split(recipe)
        match = re.fullmatch(r"ivf([1-9]\d{0,6})(?:,(.*))?", rest)
        chosen = codec(match[2] if match and match[2] is not None else "flat")
        if match is None or chosen is None or int(match[1]) > MAX_NLIST:
            raise InvalidRequest(
                f"recipe {recipe!r} is not known: expected ivf<lists>[,<codec>] with at most {MAX_NLIST} lists, like "
                f"ivf256,sq8; codecs: {codec_names()}",
                param="recipe",
            )
        return cls(recipe, pre_transform, int(match[1]), chosen, reduced=reduced)

    @property
    def base(self) -> str:
        return f"IVF{self._nlist},{self.codec.factory}"

    def training_size(self, dim: int) -> int:
        return max(TRAINING_KEYS_PER_LIST * self._nlist, super().training_size(dim))

    def set_seed(self, index: Any, seed: int) -> None:
        index.cp.seed = seed
        if hasattr(index, "pq"):
            index.pq.cp.seed = seed

    def why_unsuitable(self, entries: int, dim: int) -> str | None:
        why_not = super().why_unsuitable(entries, dim)
        if why_not is None and entries < self._nlist:
            return f"{self._nlist} lists need at least as many entries, there are {entries}"
        return why_not

    def fallback_recipe(self, entries: int, dim: int) -> str | None:
        fallback = super().fallback_recipe(entries, dim)
        if fallback is None or entries < max(self.least(dim), ENTRIES_PER_LIST):
            return fallback
        prefix, _, rest = self.recipe.partition(f"ivf{self._nlist}")
        return f"{prefix}ivf{lists_for(entries)}{rest}"

    def always_resident_bytes(self, entries: int, dim: int) -> int:
        return super().always_resident_bytes(entries, dim) + 4 * self._nlist * self.transformed_dim(dim)

    def load_overhead_bytes(self) -> int:
        tables = 4 * self._nlist * self.codec.parts * PQ_CENTROIDS if self.codec.row.mapped else 0
        settings: Any = faiss.cvar
        return tables if tables <= settings.precomputed_table_max_bytes else 0  # else FAISS does without

    def defaults(self, index: Any) -> Parameters:
        nprobe = {"nprobe": default_nprobe(list_sizes(index))}
        return {**nprobe, "rescored": RESCORED} if self._ranks_truly(index) else nprobe

    def _ranks_truly(self, index: Any) -> bool:
        """Whether its own distances are good enough for far candidates, and the same in every batch: those of codes
        whose tables FAISS makes for one query after another."""
        narrow = self.codec.parts > 0 and index.d // self.codec.parts < FAISS_BLAS_DIM
        return isinstance(index, faiss.IndexIVFFastScan) and narrow and not self.reduced

    def list_sizes(self, file: Path) -> Int64 | None:
        whole = faiss.read_index(str(file), self.flags)  # owns the lists
        return list_sizes(faiss.extract_index_ivf(whole))

    def remark(self, file: Path) -> str | None:
        return remark_on_lists(faiss.read_index(str(file), self.flags))

    def opened(self, index: Any, file: Path, parameters: Parameters, mapped: bool) -> "IvfIndex":
        return IvfIndex(index, file, parameters, mapped)


class IvfIndex(FaissIndex):
    def __init__(self, index: Any, file: Path, parameters: Parameters, mapped: bool) -> None:
        super().__init__(index, file, parameters, mapped)
        self.rescored = int(parameters["rescored"]) if "rescored" in parameters else None
        if not isinstance(self._index, faiss.IndexIVF):
            raise DatastoreCorrupt(f"{file} is {type(self._index).__name__}, expected IndexIVF")
        self._nlist = int(self._index.nlist)
        nprobe = int(parameters.get("nprobe") or default_nprobe(list_sizes(self._index)))
        self.efforts = {"nprobe": min(nprobe, self._nlist)}
        self._quantizer = faiss.downcast_index(self._index.quantizer)
        self._centroids: Float32 | None = None
        if isinstance(self._quantizer, faiss.IndexFlat):
            raw = faiss.rev_swig_ptr(self._quantizer.get_xb(), self._nlist * self._index.d)
            self._centroids = raw.reshape(self._nlist, self._index.d)
        if isinstance(self._index, faiss.IndexIVFFastScan):
            self._index.implem = FASTSCAN_IMPLEMENTATION

    def search_projected(self, queries: Float32, k: int, options: SearchOptions) -> tuple[Float32, Int64]:
        # per request, never set on the index: other threads are searching it
        settings = faiss.SearchParametersIVF()
        settings.nprobe = min(self.effort("nprobe", options), self._nlist)
        if self._centroids is None:
            graph: Any = faiss.SearchParametersHNSW()  # type: ignore[attr-defined]  # lives as long as what points at it
            if isinstance(self._quantizer, faiss.IndexHNSW):
                graph.efSearch = max(QUANTIZER_EF_SEARCH, 2 * settings.nprobe)
                settings.quantizer_params = graph
            distances, ids = self._index.search(queries, k, params=settings)
            return distances, ids
        near, lists = self._lists(self._centroids, queries, settings.nprobe)
        n = len(queries)
        distances, ids = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
        pointers = [faiss.swig_ptr(array) for array in (queries, lists, near, distances, ids)]
        # the form of C++: FAISS's wrapper of it takes no parameters
        self._index.search_preassigned_c(n, pointers[0], k, *pointers[1:], False, settings)
        return distances, ids

    def _lists(self, centroids: Float32, queries: Float32, nprobe: int) -> tuple[Float32, Int64]:
        """The nprobe nearest centroids of each query and their distances. Not by a matrix product, whose rounding
        depends on the batch and would decide which lists are visited."""
        near, lists = np.empty((len(queries), nprobe), np.float32), np.empty((len(queries), nprobe), np.int64)
        step = max(1, DISTANCES_BYTES // (12 * self._nlist))  # 12: a float32 distance and an int64 position

        def work(begin: int, end: int) -> None:
            for lo in range(begin, end, step):
                hi = min(lo + step, end)
                distances = all_squared_distances(centroids, queries[lo:hi])
                nearest = np.argpartition(distances, nprobe - 1, axis=1)[:, :nprobe]
                distances = np.take_along_axis(distances, nearest, axis=1)
                near[lo:hi], lists[lo:hi] = nearest_first(distances, nearest, nprobe)

        in_slices(work, len(queries))
        return near, lists

    def grouped(self) -> Int64:
        lists = self._index.invlists
        parts = [faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)) for i in range(self._nlist)]
        return np.concatenate([np.array(part, np.int64) for part in parts])

    def made_of(self, keys: Float32, entries: Int64) -> npt.NDArray[np.bool_]:
        """Whether they lie in the list that their keys are nearest to, or in the next one."""
        lists = self._index.invlists
        _, nearest = self._quantizer.search(self.project(keys), min(2, self._nlist))
        there = np.zeros(nearest.shape, np.bool_)
        for number in np.unique(nearest[nearest >= 0]).tolist():
            here = nearest == number
            ids = faiss.rev_swig_ptr(lists.get_ids(number), lists.list_size(number))
            there[here] = np.isin(np.broadcast_to(entries[:, None], nearest.shape)[here], ids)
        return np.asarray(there.any(axis=1))

    @property
    def memory_bytes(self) -> int:
        tables = getattr(self._index, "precomputed_table", None)  # FAISS makes them when it reads pq codes
        return super().memory_bytes + (0 if tables is None else 4 * int(tables.size()))


def list_sizes(index: Any) -> Int64:
    """(nlist,) entries in each list of an index that FAISS built or read."""
    return np.array([index.invlists.list_size(i) for i in range(index.nlist)], np.int64)


def default_nprobe(sizes: Int64) -> int:
    """How many of these lists a search visits when it does not say: usual ones that hold visited(n) entries together.

    Usual: lists of more than OVERSIZED times the average, of one beginning of many texts for example, are left out.
    Most queries are nearest to the others, which are shorter than the average then.
    """
    usual = sizes[sizes <= OVERSIZED * sizes.mean()]
    return int(min(len(sizes), max(1, math.ceil(visited(int(sizes.sum())) / max(usual.mean(), 1.0)))))


def remark_on_lists(index: Any) -> str | None:
    """A sentence when one list, of many, holds more than LARGE_SHARE of the entries, as many equal keys make it."""
    sizes = list_sizes(faiss.extract_index_ivf(index))
    share = sizes.max(initial=0) / max(sizes.sum(), 1)
    if share <= max(LARGE_SHARE, OVERSIZED / len(sizes)):
        return None
    return (
        f"one of {len(sizes)} lists holds {share:.0%} of the entries: many keys are nearly equal, as those of repeated "
        "text are, and queries near them are slow; consider leaving such text out"
    )


def visited(entries: int) -> int:
    """Entries that a search looks at by default, in an index of `entries`: never too few for a thousand neighbors."""
    return max(VISITED_PER_SQRT * math.isqrt(entries), MIN_VISITED)


def lists_for(entries: int) -> int:
    """The number of lists that suits an index of `entries`."""
    return int(
        np.clip(round(LISTS_PER_SQRT * math.sqrt(entries)), 1, min(max(1, entries // ENTRIES_PER_LIST), MAX_NLIST))
    )
