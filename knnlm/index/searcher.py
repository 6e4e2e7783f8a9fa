"""The whole of a search: what is asked is checked, the index searched, candidates rescored, values and text looked up.

One Searcher is one version of one domain, opened. It never changes; switching versions is opening another Searcher.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.errors import DatastoreError, InvalidRequest, UnknownDomain, UnknownVersion
from knnlm.index.contract import Float32, Index, Int64, SearchParameters
from knnlm.index.rescore import nearest_first, rescore
from knnlm.index.table import family
from knnlm.messages import DomainInfo, ModelInfo, Passage, SearchRequest, SearchResult
from knnlm.neighbors import Neighbors

__all__ = ["Searcher"]

WARM_QUERIES = 16


class Searcher:
    """Searches from any number of threads; `close` when none runs any more."""

    def __init__(self, datastore: Datastore, index: Index) -> None:
        self._datastore = datastore
        self._index = index

    @classmethod
    def open(cls, path: Path, *, expect: ModelInfo | None = None) -> Self:
        """The version in folder `path`. Raises as `Datastore.open` does, and DatastoreError for an unknown index."""
        datastore = Datastore.open(path, expect=expect)
        record = datastore.manifest.index
        try:
            chosen = family(record.recipe)
        except InvalidRequest as err:
            raise DatastoreError(f"{path} has an index that this program does not know: {err.message}") from err
        file = None if record.file is None else path / record.file
        return cls(datastore, chosen.open(datastore.keys, file, record.parameters))

    @property
    def manifest(self) -> Manifest:
        return self._datastore.manifest

    @property
    def memory_bytes(self) -> int:
        """The index, file maps included. Not the stored keys: what rescoring maps of them the system may drop."""
        return self._index.memory_bytes

    def search(self, request: SearchRequest) -> SearchResult:
        """The nearest entries of every query, distances ascending, padded with value -1 where too few were found.

        Raises InvalidRequest, naming the parameter, for what is out of range; UnknownDomain or UnknownVersion when the
        request means another version than this one.
        """
        self._check(request)
        queries = np.ascontiguousarray(request.queries, np.float32)  # (n, d)
        k = min(request.k, self.manifest.entries)
        rescoring = self._rescoring(request)
        begun = time.perf_counter()
        distances, ids = self._candidates(queries, k, request) if k and len(queries) else _nothing(len(queries), k)
        searched = time.perf_counter()
        if rescoring:
            distances = rescore(self._datastore.keys, queries, ids)
        distances, ids = nearest_first(distances, ids, k)
        rescored = time.perf_counter()
        timings = {"search": searched - begun, "rescore": rescored - searched}
        found = ids >= 0
        values = np.full(ids.shape, -1, np.int32)
        values[found] = self._datastore.values[ids[found]]
        passages: Sequence[Sequence[Passage]] = ()
        if request.passages:
            passages = [self._passages(row, request) for row in ids]
            timings["passages"] = time.perf_counter() - rescored
        return SearchResult(
            domain=self.manifest.domain,
            version=self.manifest.version,
            neighbors=Neighbors(distances, values, ids if request.ids else None),
            passages=passages,
            timings=timings,
        )

    def info(self, versions: Sequence[str], state: str = "ready") -> DomainInfo:
        """`versions`: all of the domain on disk, oldest first, as the catalog knows them."""
        manifest = self.manifest
        return DomainInfo(
            domain=manifest.domain,
            version=manifest.version,
            versions=tuple(versions),
            state=state,
            entries=manifest.entries,
            documents=manifest.documents,
            key_dim=manifest.key_dim,
            key_dtype=manifest.key_dtype,
            key_function=manifest.key_function,
            index=manifest.index.recipe,
            model_id=manifest.model.model_id,
            weights_sha256=manifest.model.weights_sha256,
            tokenizer_sha256=manifest.model.tokenizer_sha256,
            tuning=None if manifest.tuning is None else manifest.tuning.message(),
        )

    def warm(self) -> None:
        """Bring index and documents into memory and run a search, before the first request has to wait for them."""
        self._index.warm()
        stored = self._datastore.keys[: min(WARM_QUERIES, self.manifest.entries)]
        if len(stored):
            self.search(SearchRequest(self.manifest.domain, stored, k=min(1024, self.manifest.entries), passages=1))

    def close(self) -> None:
        """Let go of the datastore's maps and of the index. Afterwards this object must not be used."""
        self._datastore.close()
        del self._index

    def _candidates(self, queries: Float32, k: int, request: SearchRequest) -> tuple[Float32, Int64]:
        wanted = k
        if self._rescoring(request):
            overfetch = self._index.overfetch if request.overfetch is None else request.overfetch
            wanted = min(math.ceil(k * overfetch), self.manifest.entries)
        return self._index.search(queries, SearchParameters(wanted, request.nprobe))

    def _rescoring(self, request: SearchRequest) -> bool:
        return self._index.lossy if request.rescore is None else request.rescore

    def _passages(self, ids: npt.NDArray[np.int64], request: SearchRequest) -> list[Passage]:
        nearest = ids[: request.passages]
        tokens = request.passage_tokens
        return [self._datastore.passage(int(entry), tokens, tokens) for entry in nearest[nearest >= 0]]

    def _check(self, request: SearchRequest) -> None:
        if request.domain != self.manifest.domain:
            raise UnknownDomain(f"asked for domain {request.domain!r}, this is {self.manifest.domain}", param="domain")
        if request.version not in (None, self.manifest.version):
            raise UnknownVersion(
                f"domain {self.manifest.domain} answers from version {self.manifest.version}, "
                f"version {request.version!r} was asked for",
                param="version",
            )
        _check_queries(request.queries, self.manifest.key_dim)
        if request.k < 1:
            raise InvalidRequest(f"k must be >= 1, got {request.k}", param="k")
        if request.nprobe is not None and self._index.nprobe is None:
            raise InvalidRequest(f"index {self.manifest.index.recipe} has no lists, so no nprobe", param="nprobe")
        if request.nprobe is not None and request.nprobe < 1:
            raise InvalidRequest(f"nprobe must be >= 1, got {request.nprobe}", param="nprobe")
        if request.overfetch is not None and not (math.isfinite(request.overfetch) and request.overfetch >= 1):
            raise InvalidRequest(f"overfetch must be >= 1, got {request.overfetch}", param="overfetch")
        if request.overfetch is not None and not self._rescoring(request):
            raise InvalidRequest("overfetch means candidates for rescoring, which is off here", param="overfetch")
        for name, number in (("passages", request.passages), ("passage_tokens", request.passage_tokens)):
            if number < 0:
                raise InvalidRequest(f"{name} must be >= 0, got {number}", param=name)


def _check_queries(queries: npt.NDArray[np.floating], dim: int) -> None:
    if queries.dtype not in (np.float32, np.float16):
        raise InvalidRequest(f"queries must be float32 or float16, got {queries.dtype.name}", param="queries")
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise InvalidRequest(f"queries must have shape (n, {dim}), got {queries.shape}", param="queries")
    finite = np.isfinite(queries).all(axis=1)
    if not finite.all():
        raise InvalidRequest(f"query {int(np.argmin(finite))} is not finite", param="queries")


def _nothing(n: int, k: int) -> tuple[Float32, Int64]:
    return np.zeros((n, k), np.float32), np.full((n, k), -1, np.int64)
