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
from knnlm.errors import DatastoreCorrupt, DatastoreError, InvalidRequest, UnknownDomain, UnknownVersion
from knnlm.index.contract import FAR, Float32, Index, Int64, SearchParameters
from knnlm.index.exclusion import Exclusion, without
from knnlm.index.kernels import gather
from knnlm.index.memory import require
from knnlm.index.rescore import nearest_first, rescored
from knnlm.index.table import family
from knnlm.messages import DomainInfo, Memory, ModelInfo, Passage, SearchRequest, SearchResult
from knnlm.neighbors import Neighbors

__all__ = ["Searcher"]

WARM_QUERIES = 16
SPARE = 8  # candidates beyond those wanted: which one is the last must not hang on the rounding of its distance


class Searcher:
    """Searches from any number of threads; `close` when none runs any more."""

    def __init__(
        self, datastore: Datastore, index: Index, *, recipe: str | None = None, resident: bool = False
    ) -> None:
        """index: opened for the keys of datastore, by the family of `recipe` (the default one's).

        resident: hold the keys that rescoring reads in this process's memory; reduced ones the index holds itself.
        """
        self._datastore = datastore
        self._index = index
        self._recipe = recipe or datastore.manifest.index.recipe
        self._resident = resident
        self._keys = np.array(datastore.keys) if resident and index.reduced is None else datastore.keys

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        index: str | None = None,
        resident: bool = False,
        device: str = "cpu",
        memory_limit: int | None = None,
        expect: ModelInfo | None = None,
    ) -> Self:
        """The version in folder `path`.

        index: the recipe of one of its indexes; by default its default one. resident: read into memory what could be
        mapped, of the index and of the keys. device: where to search; cuda or cuda:N need torch or FAISS's GPU part.
        memory_limit: bytes that it may hold; by default what the system has. Raises as `Datastore.open` does,
        InvalidRequest for an index it does not have, DatastoreError for one that this program does not know, and
        InsufficientMemory, before anything is loaded, when it would not fit.
        """
        datastore = Datastore.open(path, expect=expect)
        record = datastore.manifest.index_of(index)
        file = None if record.file is None else path / record.file
        if device != "cpu":
            from knnlm.index.device import open_on_device  # where it is asked for: it may need torch

            require(datastore.keys.nbytes if resident else 0, path, limit=memory_limit)
            found = open_on_device(datastore.keys, device, record.recipe, file, record.parameters)
            return cls(datastore, found, recipe=record.recipe, resident=resident)
        try:
            chosen = family(record.recipe)
        except InvalidRequest as err:
            raise DatastoreError(f"{path} has an index that this program does not know: {err.message}") from err
        needed = chosen.resident_bytes(datastore.keys, file, resident=resident)
        held = datastore.keys.nbytes if resident and not chosen.reduced else 0
        require(needed + held, path, limit=memory_limit)
        opened = chosen.open(datastore.keys, file, record.parameters, resident=resident)
        return cls(datastore, opened, recipe=record.recipe, resident=resident)

    @property
    def manifest(self) -> Manifest:
        return self._datastore.manifest

    @property
    def memory(self) -> Memory:
        """Where index and keys lie. What is mapped, the system may drop and read again."""
        rescoring = self._keys if self._index.reduced is None else self._index.reduced
        return Memory(
            index=self._index.memory,
            index_bytes=self._index.memory_bytes,
            keys="resident" if self._resident else "mapped",
            keys_bytes=int(rescoring.nbytes),
        )

    @property
    def memory_bytes(self) -> int:
        """Of the index, file maps included."""
        return self._index.memory_bytes

    def search(self, request: SearchRequest) -> SearchResult:
        """The nearest entries of every query, distances ascending, padded with value -1 where too few were found.

        Unless rescoring is switched off, the answer to a query does not depend on the others. Raises InvalidRequest,
        naming the parameter, for what is out of range; UnknownDomain or UnknownVersion when the request means another
        version than this one.
        """
        self._check(request)
        queries = np.ascontiguousarray(request.queries, np.float32)  # (n, d)
        k = min(request.k, self.manifest.entries)
        exclusion = Exclusion.of(request, self._datastore)
        timings = {"search": 0.0, "rescore": 0.0}

        def nearest(queries: Float32, k: int) -> tuple[Float32, Int64]:
            return self._nearest(queries, k, request, timings)

        if not k or not len(queries):
            distances, ids = _nothing(len(queries), k)
        elif exclusion is None:
            distances, ids = nearest(queries, k)
        else:
            distances, ids = without(nearest, queries, k, exclusion, self.manifest.entries)
        begun = time.perf_counter()
        values = gather(self._datastore.values, ids)
        passages: Sequence[Sequence[Passage]] = ()
        if request.passages:
            passages = [self._passages(row, request) for row in ids]
            timings["passages"] = time.perf_counter() - begun
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
            index=self._recipe,
            model_id=manifest.model.model_id,
            weights_sha256=manifest.model.weights_sha256,
            tokenizer_sha256=manifest.model.tokenizer_sha256,
            tuning=None if manifest.tuning is None else manifest.tuning.message(),
            indexes=tuple(index.recipe for index in manifest.indexes),
            memory=self.memory,
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
        del self._index, self._keys

    def _nearest(
        self, queries: Float32, k: int, request: SearchRequest, timings: dict[str, float]
    ) -> tuple[Float32, Int64]:
        """Distances and ids (n, k), nearest first. Adds its seconds to timings."""
        begun = time.perf_counter()
        if not self._rescoring(request):
            found, ids = self._index.search(queries, SearchParameters(k, request.nprobe, request.ef_search))
            self._refuse_unknown(ids)
            timings["search"] += time.perf_counter() - begun
            return nearest_first(np.nan_to_num(found, copy=False, nan=float(FAR)), ids, k)  # NaN: beyond float32
        overfetch = self._index.overfetch if request.overfetch is None else request.overfetch
        wanted = min(math.ceil(k * overfetch) + SPARE, self.manifest.entries)
        projected = self._index.project(queries)
        _, ids = self._index.search_projected(projected, SearchParameters(wanted, request.nprobe, request.ef_search))
        self._refuse_unknown(ids)
        searched = time.perf_counter()
        if self._index.reduced is not None and request.rescore is None:
            distances, ids = rescored(self._index.reduced, projected, ids, k)
        else:
            distances, ids = rescored(self._keys, queries, ids, k)
        timings["search"] += searched - begun
        timings["rescore"] += time.perf_counter() - searched
        return distances, ids

    def _refuse_unknown(self, ids: Int64) -> None:
        """Sizes are compared on opening, contents are not: an id that is no entry would be read beside the keys."""
        most = int(ids.max(initial=-1))
        if most >= self.manifest.entries:
            raise DatastoreCorrupt(
                f"index {self._recipe} of {self._datastore.path} found entry {most} of {self.manifest.entries}"
            )

    def _rescoring(self, request: SearchRequest) -> bool:
        return not self._index.exact if request.rescore is None else request.rescore

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
        for name, asked, default, what in (
            ("nprobe", request.nprobe, self._index.nprobe, "has no lists"),
            ("ef_search", request.ef_search, self._index.ef_search, "is no graph"),
        ):
            if asked is not None and default is None:
                raise InvalidRequest(f"index {self._recipe} {what}, so {name} means nothing to it", param=name)
            if asked is not None and asked < 1:
                raise InvalidRequest(f"{name} must be >= 1, got {asked}", param=name)
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
    return np.full((n, k), FAR, np.float32), np.full((n, k), -1, np.int64)
