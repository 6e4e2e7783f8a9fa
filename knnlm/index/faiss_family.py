"""What all families share that FAISS builds: training on a sample, adding chunk by chunk, one file, opening it."""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import faiss
import numpy as np
import numpy.typing as npt

from knnlm.datastore.files import CHUNK
from knnlm.datastore.manifest import FLAT
from knnlm.errors import DatastoreCorrupt, DatastoreError, InvalidRequest
from knnlm.index.codecs import Codec
from knnlm.index.contract import (
    DEFAULTS,
    Family,
    Float32,
    Index,
    Int64,
    Keys,
    Parameters,
    Progress,
    chunks,
    to_float32,
)
from knnlm.index.freeing import free
from knnlm.index.pre_transform import PreTransform, Projection, reduce_all
from knnlm.options import SearchOptions

__all__ = ["MIN_TRAINING_KEYS", "FaissFamily", "FaissIndex", "faiss_message"]

ENOUGH_ENTRIES = 1 << 62  # entries
# FAISS itself samples down to 256 points per centroid and warns below 39
MIN_TRAINING_KEYS = 1 << 16
MAX_ROUNDING = 1e-6  # share of a vector's squared length that the rounding of a pre-transform changes, at most
PAGE = 4096  # bytes that a map brings in at once, at least


class FaissFamily(Family):
    """recipe: as asked for. pre-transform: what keys and queries go through first. codec: how keys are written down.
    reduced: whether what the pre-transform makes of the keys is kept, too.
    """

    has_file = True
    flags: ClassVar[int]  # of faiss.read_index, that leave in the file what this kind of index can use from there

    def __init__(self, recipe: str, pre_transform: PreTransform | None, codec: Codec, *, reduced: bool = False) -> None:
        self.recipe = recipe
        self.pre_transform = pre_transform
        self.codec = codec
        self.reduced = reduced

    @property
    @abstractmethod
    def base(self) -> str:
        """FAISS's name of the index behind the pre-transform."""

    @abstractmethod
    def defaults(self, index: Any) -> Parameters:
        """Default search parameters of what FAISS built, without its pre-transform."""

    @abstractmethod
    def opened(self, index: Any, file: Path, parameters: Parameters, mapped: bool) -> "FaissIndex":
        """index: what FAISS read, of the right kind and size. Raises DatastoreCorrupt for another kind."""

    def training_size(self, dim: int) -> int:
        del dim
        return MIN_TRAINING_KEYS

    def set_seed(self, index: Any, seed: int) -> None:
        """Make the training of this index, without its pre-transform, depend on `seed` alone."""

    def why_unsuitable(self, entries: int, dim: int) -> str | None:
        why_not = None if self.pre_transform is None else self.pre_transform.why_unsuitable(entries, dim)
        return self.codec.why_unsuitable(entries, self.transformed_dim(dim)) if why_not is None else why_not

    def transformed_dim(self, dim: int) -> int:
        return dim if self.pre_transform is None else self.pre_transform.dim_out(dim)

    def least(self, dim: int) -> int:
        """Entries that codes and pre-transform are learned from, at least."""
        return max(self.codec.row.points, 0 if self.pre_transform is None else self.pre_transform.least(dim))

    def fallback_recipe(self, entries: int, dim: int) -> str | None:
        only_few = self.why_unsuitable(entries, dim) is not None and self.why_unsuitable(ENOUGH_ENTRIES, dim) is None
        return FLAT if only_few else None

    def always_resident_bytes(self, entries: int, dim: int) -> int:
        """Bytes that are read into memory even when the rest is mapped."""
        del entries
        return 0 if self.pre_transform is None else 4 * dim * self.transformed_dim(dim)

    def load_overhead_bytes(self) -> int:
        """Bytes of what FAISS computes when it reads the file."""
        return 0

    def train(self, sample: Keys, seed: int) -> bytes:
        dim = sample.shape[1]
        factory = self.base if self.pre_transform is None else f"{self.pre_transform.factory},{self.base}"
        index: Any = faiss.index_factory(dim, factory, faiss.METRIC_L2)
        self.set_seed(_inner_index(index), seed)
        if self.reduced:
            _keep_reduced(index)
        with self._refused(len(sample)):
            index.train(to_float32(sample))
        trained: bytes = faiss.serialize_index(index).tobytes()
        return trained

    def add(self, trained: bytes, keys: Keys, file: Path, on_progress: Progress) -> Parameters:
        index: Any = faiss.deserialize_index(np.frombuffer(trained, np.uint8))
        n, dim = keys.shape
        add = _adding(index) if self.reduced else index.add
        with self._refused(n):
            for lo, hi in chunks(n, dim):
                add(to_float32(keys[lo:hi]))
                on_progress(hi, n)
        try:
            faiss.write_index(index, str(file))
        except RuntimeError as err:  # here it is the disk
            raise DatastoreError(f"cannot write {file}: {faiss_message(err)}") from err
        return {**self.defaults(_inner_index(index)), "overfetch": self.codec.row.overfetch}

    @contextmanager
    def _refused(self, n: int) -> Iterator[None]:
        """FAISS has one class of errors for everything: inside, they are about what was asked of it."""
        try:
            yield
        except RuntimeError as err:
            raise InvalidRequest(
                f"FAISS cannot build {self.recipe} of {n} keys: {faiss_message(err)}", param="recipe"
            ) from err

    def resident_bytes(self, keys: Keys, file: Path | None, *, resident: bool) -> int:
        if file is None:
            return 0
        mapped = self.codec.row.mapped and not resident
        whole = file.stat().st_size - (0 if resident else self._reduced_bytes(*keys.shape))
        return self.load_overhead_bytes() + (self.always_resident_bytes(*keys.shape) if mapped else whole)

    def _reduced_bytes(self, entries: int, dim: int) -> int:
        return 2 * entries * self.transformed_dim(dim) if self.reduced else 0

    def open(self, keys: Keys, file: Path | None, parameters: Parameters, *, resident: bool) -> Index:
        if file is None:
            raise DatastoreCorrupt(f"index {self.recipe} needs its file, the manifest names none")
        mapped = self.codec.row.mapped and not resident
        try:
            # mapped: replicas on one machine share it, and opening is immediate
            index = faiss.read_index(str(file), self._flags(resident))
        except RuntimeError as err:
            raise DatastoreCorrupt(f"{file} is not an index: {faiss_message(err)}") from err
        if (index.ntotal, index.d) != keys.shape:
            raise DatastoreCorrupt(f"{file} holds {(index.ntotal, index.d)} keys, expected {keys.shape}")
        if index.metric_type != faiss.METRIC_L2:
            raise DatastoreCorrupt(f"{file} has FAISS's metric {index.metric_type}, expected {faiss.METRIC_L2} (L2)")
        return self.opened(index, file, parameters, mapped)

    def _flags(self, resident: bool) -> int:
        if resident:
            return 0
        if self.reduced:  # plain rows, that can stay in the file whatever finds the candidates
            return int(faiss.IO_FLAG_MMAP_IFC)
        return self.flags if self.codec.row.mapped else 0


class FaissIndex(Index):
    """Searches whatever FAISS read, without parameters of its own."""

    def __init__(self, index: Any, file: Path, parameters: Parameters, mapped: bool) -> None:  # Any: faiss has no types
        self._whole = index  # owns what is behind the pre-transform
        self._project: Projection | None = None
        self._index = index
        if isinstance(index, faiss.IndexPreTransform) and Projection.possible(index.chain):
            self._project = Projection(index.chain)
            self._index = _inner_index(index)
        if isinstance(index, faiss.IndexPreTransform) and isinstance(
            faiss.downcast_index(index.index), faiss.IndexRefine
        ):
            self.reduced = _reduced(faiss.downcast_index(index.index))
        self._file = file
        self._bytes = file.stat().st_size - (0 if self.reduced is None else self.reduced.nbytes)
        self.memory = "mapped" if mapped else "resident"
        self.overfetch = float(parameters.get("overfetch", 1.0))

    def search(self, queries: Float32, k: int, options: SearchOptions = DEFAULTS) -> tuple[Float32, Int64]:
        return self.search_projected(self.project(queries), k, options)

    def project(self, queries: Float32) -> Float32:
        return queries if self._project is None else self._project(queries)

    def search_projected(self, queries: Float32, k: int, options: SearchOptions) -> tuple[Float32, Int64]:
        del options
        distances, ids = self._index.search(queries, k)
        return distances, ids

    def made_of(self, keys: Float32, entries: Int64) -> npt.NDArray[np.bool_] | None:
        coded = faiss.downcast_index(self._index.storage) if isinstance(self._index, faiss.IndexHNSW) else self._index
        if not isinstance(coded, faiss.IndexFlatCodes):
            return None
        codes = coded.codes
        kept = faiss.rev_swig_ptr(codes.data(), codes.size()).view(np.uint8).reshape(coded.ntotal, coded.code_size)
        here, wanted = coded.sa_decode(kept[entries]), coded.sa_decode(coded.sa_encode(self.project(keys)))
        same: npt.NDArray[np.bool_] = ((here - wanted) ** 2).sum(axis=1) <= MAX_ROUNDING * (wanted**2).sum(axis=1)
        return same

    def is_a(self, kind: type) -> bool:
        """Whether what searches, behind the pre-transform, is of this class of FAISS."""
        return isinstance(self._index, kind)

    @property
    def memory_bytes(self) -> int:
        return self._bytes

    def warm(self) -> None:
        if self.memory == "mapped":
            with suppress(FileNotFoundError), self._file.open("rb") as file:  # one replaced since lives on unnamed
                while file.read(CHUNK):
                    pass
        if self.reduced is not None:
            self.reduced.reshape(-1).view(np.uint8)[::PAGE].max(initial=0)  # a byte of each brings all of it

    def close(self) -> None:
        whole = vars(self).get("_whole")
        vars(self).clear()  # views of FAISS's memory go first
        if whole is not None:
            free(whole)


def faiss_message(err: RuntimeError) -> str:
    """What FAISS complains about, without where in its code."""
    return re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", str(err)).strip()


def _inner_index(index: Any) -> Any:
    """What finds candidates: behind the pre-transform, and beside the reduced keys when they are kept."""
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
        if isinstance(index, faiss.IndexRefine):
            index = faiss.downcast_index(index.base_index)
    return index


def _keep_reduced(index: Any) -> None:
    """Put float16 rows beside what finds candidates, behind the pre-transform, in the form in which FAISS can write
    both."""
    rows: Any = faiss.IndexScalarQuantizer(index.index.d, faiss.ScalarQuantizer.QT_fp16)
    both: Any = faiss.IndexRefine(index.index, rows)
    both.own_fields = both.own_refine_index = True
    for owned in (rows, both):
        owned.this.disown()  # by C++ from here on: the pre-transform owns both, and both own their parts
    index.index = both


def _adding(index: Any) -> Callable[[Float32], None]:
    """Adds keys as `index.add` does, but for the pre-transform, which is applied as it is to queries: what is kept
    of a key does not depend on the keys beside it, and is the same when it is added to the version later."""
    projection = Projection(index.chain)

    def add(keys: Float32) -> None:
        index.index.add(to_float32(reduce_all(projection, keys)))  # rounded already, so that FAISS does not
        index.ntotal = index.index.ntotal

    return add


def _reduced(both: Any) -> Keys:
    """(n, m) float16, a view of FAISS's memory or of the file."""
    rows: Any = faiss.downcast_index(both.refine_index)
    codes = rows.codes
    raw = faiss.rev_swig_ptr(codes.data(), codes.size())
    reduced: Keys = raw.view(np.float16).reshape(both.ntotal, both.d)
    return reduced
