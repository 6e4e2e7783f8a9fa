"""The whole of a search: what is asked is checked, the index searched, candidates rescored, values and text looked up.

One Searcher is one version of one domain, opened. It never changes; switching versions is opening another Searcher.
What was added to a version is searched beside its index and merged; what was removed from it is never returned.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from knnlm.datastore.layout import Checksums
from knnlm.datastore.manifest import FLAT, Manifest
from knnlm.datastore.reader import Datastore, Int32
from knnlm.errors import DatastoreCorrupt, DatastoreError, InvalidRequest, TooLarge
from knnlm.index.added import Added, added_bytes
from knnlm.index.contract import MISSING_DISTANCE, Float32, Index, Int64
from knnlm.index.exclusion import Exclusion, check_follow, without
from knnlm.index.followed import followed
from knnlm.index.freeing import drop_maps, drop_pages
from knnlm.index.kernels import gather
from knnlm.index.memory import require
from knnlm.index.requests import SPARE_CANDIDATES, Candidates, check_lookup, check_request, overfetched
from knnlm.index.rescore import nearest_first, partly_rescored, rescored
from knnlm.index.table import family
from knnlm.index.tombstones import NO_TOMBSTONES, Tombstones
from knnlm.messages import DomainInfo, Memory, ModelInfo, Passage, PassagesRequest, SearchRequest, SearchResult
from knnlm.neighbors import Neighbors
from knnlm.options import SearchOptions

__all__ = ["Searcher"]

WARM_QUERIES = 16
BLOCK_BYTES = 1 << 26  # that finding and rescoring the candidates of some queries may take at once
CANDIDATE_BYTES = 64  # of one candidate, in FAISS's heaps, in arrays and while they are sorted
EFFORT_BYTES = 64  # bytes for one list that is visited, or one candidate that a graph keeps: its number and distance


class Searcher:
    """Searches from any number of threads; `close` when none runs any more."""

    def __init__(
        self,
        datastore: Datastore,
        index: Index,
        *,
        recipe: str | None = None,
        resident: bool = False,
        max_candidates: int | None = None,
    ) -> None:
        """index: opened for the keys of datastore, which are its base's, by the family of `recipe` (the default one's).

        resident: hold the keys that rescoring reads in this process's memory; reduced ones the index holds itself.
        max_candidates: candidates that one query may have; None = as many as there are entries.
        """
        self._closed = False
        self._max_candidates = max_candidates
        self._datastore = datastore
        self._index = index
        self._recipe = recipe or datastore.manifest.index.recipe
        self._resident = resident
        self._keys = np.array(datastore.keys) if resident and index.reduced is None else datastore.keys
        self._base = len(datastore.keys)  # entries that the index holds
        self._added: Added | None = None
        if datastore.entries > self._base:
            self._added = Added(datastore.added_keys(), self._base, index, resident=resident)
        self._added_values = datastore.added_values()
        self._removed = (
            Tombstones.of(datastore.removed, datastore.entries) if len(datastore.removed[0]) else NO_TOMBSTONES
        )

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        index: str | None = None,
        resident: bool = False,
        device: str = "cpu",
        memory_limit: int | None = None,
        max_candidates: int | None = None,
        expect: ModelInfo | None = None,
        check: Checksums = "none",
    ) -> Self:
        """The version in folder `path`.

        index: the recipe of one of its indexes; by default its default one. resident: read into memory what could be
        mapped, of the index and of the keys. device: where to search; cuda or cuda:N need torch or FAISS's GPU part.
        memory_limit: bytes that it may hold; by default what the system has. max_candidates: what one query may have
        while it is searched, over-fetched ones and those in place of excluded ones counted. check: files to compare
        with their checksums before FAISS or anything else reads them: "small" = all but the keys, "all", or "none".
        Raises as `Datastore.open` does, InvalidRequest for an index it does not have and for a version of shards, which
        `knnlm.index.sharded_searcher.open_searcher` opens, DatastoreError for an index that this program does not know,
        and InsufficientMemory, before anything is loaded, when it would not fit.
        """
        datastore = Datastore.open(path, expect=expect, check=check)
        if datastore.manifest.shards:
            raise InvalidRequest(f"{path} has shards: one Searcher searches one of them", param="path")
        record = datastore.manifest.index_of(index)
        file = None if record.file is None else path / record.file
        if device != "cpu":
            from knnlm.index.device import open_on_device  # where it is asked for: it may need torch

            held = datastore.keys.nbytes if resident else 0
            require(held + added_bytes(datastore, family(FLAT), resident=resident), path, limit=memory_limit)
            found = open_on_device(datastore.keys, device, record.recipe, file, record.parameters)
            return cls(datastore, found, recipe=record.recipe, resident=resident, max_candidates=max_candidates)
        try:
            chosen = family(record.recipe)
        except InvalidRequest as err:
            raise DatastoreError(f"{path} has an index that this program does not know: {err.message}") from err
        needed = chosen.resident_bytes(datastore.keys, file, resident=resident)
        needed += added_bytes(datastore, chosen, resident=resident)
        held = datastore.keys.nbytes if resident and not chosen.reduced else 0
        require(needed + held, path, limit=memory_limit)
        opened = chosen.open(datastore.keys, file, record.parameters, resident=resident)
        return cls(datastore, opened, recipe=record.recipe, resident=resident, max_candidates=max_candidates)

    @property
    def manifest(self) -> Manifest:
        return self._datastore.manifest

    @property
    def datastore(self) -> Datastore:
        return self._datastore

    @property
    def index(self) -> Index:
        """What searches the keys of the base; its attributes are the defaults of a search."""
        return self._index

    @property
    def recipe(self) -> str:
        return self._recipe

    @property
    def memory(self) -> Memory:
        """Where index and keys lie, those of added entries included. What is mapped, the system may drop and read
        again; of added entries, most never is."""
        read = self._keys if self._index.reduced is None else self._index.reduced
        return Memory(
            index=self._index.memory,
            index_bytes=self._index.memory_bytes + (self._added.index_bytes if self._added else 0),
            keys="resident" if self._resident else "mapped",
            keys_bytes=int(read.nbytes) + (self._added.keys_bytes if self._added else 0),
        )

    @property
    def memory_bytes(self) -> int:
        """Bytes that the index occupies, file maps included."""
        return self._index.memory_bytes

    @property
    def held_bytes(self) -> int:
        """What lies in this process's own memory, whatever the system drops of maps: index, keys, added entries."""
        index = self._index.memory_bytes if self._index.memory == "resident" else 0
        read = self._keys if self._index.reduced is None else self._index.reduced
        keys = int(read.nbytes) if self._resident else 0
        return index + keys + added_bytes(self._datastore, family(self._recipe), resident=self._resident)

    def search(self, request: SearchRequest) -> SearchResult:
        """The nearest entries of every query, distances ascending, padded with value -1 where too few were found.

        Unless rescoring is switched off, the answer to a query does not depend on the others. Beside the answer, memory
        is bounded: queries with many candidates are searched a few at a time. Raises InvalidRequest, naming the
        parameter, for what is out of range; TooLarge for more than max_candidates; UnknownDomain or UnknownVersion when
        the request means another version than this one; DatastoreCorrupt for what is found damaged; DatastoreError when
        this was closed.
        """
        self._refuse_closed()
        check_request(request, self.manifest, self._index, self._recipe)
        check_follow(request)
        queries = np.ascontiguousarray(request.queries, np.float32)  # (n, d)
        k = min(request.k, self.manifest.live_entries)
        exclusion = Exclusion.of(request, self._datastore, self._removed)
        timings = {"search": 0.0, "rescore": 0.0}
        # excluded entries may be among the nearest. Decided by the request, not by its rows: a row's answer must not
        # depend on the others
        all_rescored = exclusion is not None or request.exclude_entries is not None

        def nearest(queries: Float32, k: int) -> tuple[Float32, Int64]:
            wanted = Candidates.of(k, request.options, self._index, all_rescored=all_rescored)
            return self._nearest(queries, k, wanted, request, timings)

        if not k or not len(queries):
            distances, ids = _nothing(len(queries), k)
        elif request.follow is not None:
            distances, ids = followed(self._datastore, queries, request.follow, k, exclusion)
        elif exclusion is None:
            distances, ids = nearest(queries, k)
        else:
            distances, ids = without(nearest, queries, k, exclusion, self._datastore.entries)
        begun = time.perf_counter()
        values = gather(self._datastore.values, ids, self._added_values)
        self._refuse_strange(values, ids)
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

    def passages(self, request: PassagesRequest) -> list[Passage]:
        """The text around each entry, in their order.

        Raises InvalidRequest, naming the field, for an entry that this version does not have or that was removed from
        it; UnknownDomain, UnknownVersion, DatastoreCorrupt and DatastoreError as `search`.
        """
        self._refuse_closed()
        check_lookup(request, self.manifest)
        removed = request.entries[self._removed.holds(request.entries)]
        if len(removed):
            raise InvalidRequest(
                f"entry {removed[0]} was removed from {self.manifest.domain} {self.manifest.version}", param="entries"
            )
        return self._datastore.passages(request.entries, request.passage_tokens, request.passage_tokens)

    def info(self, versions: Sequence[str], state: str = "ready") -> DomainInfo:
        """`versions`: all of the domain on disk, oldest first, as the catalog knows them."""
        return self.manifest.info(self._recipe, self.memory, versions, state)

    def warm(self) -> None:
        """Bring index and documents into memory and run a search, before the first request has to wait for them."""
        self._index.warm()
        keys = self._datastore.keys if self._base or self._added is None else self._datastore.added_keys()
        if len(keys):
            stored = np.nan_to_num(keys[:WARM_QUERIES])  # damaged ones are reported by the search that meets them
            k = max(1, min(1024, self.manifest.live_entries))
            with suppress(TooLarge):  # of a version of which nearly all was removed: fewer neighbors can be asked for
                self.search(SearchRequest(self.manifest.domain, stored, SearchOptions(k=k), passages=1))

    def close(self) -> None:
        """Let go of the index and of the datastore's maps, while no search runs; other threads are not held up.

        Afterwards it can only be closed again: searching raises DatastoreError.
        """
        if self._closed:
            return
        self._closed = True
        self._index.close()
        if self._added is not None:
            self._added.close()
        store = self._datastore
        if self._keys is not store.keys:
            drop_pages(self._keys)
        drop_maps(store.keys, store.values, store.tokens)
        for segment in store.segments:
            drop_maps(segment.keys, segment.values, segment.tokens)
        del self._keys, self._added_values
        store.close()

    def _nearest(
        self, queries: Float32, k: int, wanted: Candidates, request: SearchRequest, timings: dict[str, float]
    ) -> tuple[Float32, Int64]:
        """Distances and ids (n, k) of queries (n, d), nearest first, found in blocks of rows that take BLOCK_BYTES.

        Adds its seconds to timings. Raises TooLarge when a query would have more than max_candidates.
        """
        options = request.options
        self._refuse_too_many(min(wanted.wanted, self._datastore.entries), options)
        efforts = sum(min(self._index.effort(name, options), self._base) for name in self._index.efforts)
        row_bytes = min(wanted.found, self._datastore.entries) * CANDIDATE_BYTES + efforts * EFFORT_BYTES
        step = max(1, BLOCK_BYTES // row_bytes)
        blocks = [
            self._nearest_of_block(queries[lo : lo + step], k, wanted, request, timings)
            for lo in range(0, len(queries), step)
        ]
        if len(blocks) == 1:
            return blocks[0]
        return np.concatenate([near for near, _ in blocks]), np.concatenate([ids for _, ids in blocks])

    def _refuse_too_many(self, candidates: int, options: SearchOptions) -> None:
        if self._max_candidates is None or candidates <= self._max_candidates:
            return
        if candidates <= overfetched(options.k or 0, options, self._index):
            raise TooLarge(
                f"k times overfetch must be at most {self._max_candidates} candidates, got {candidates}",
                param="k" if options.overfetch is None else "overfetch",
            )
        raise TooLarge(
            f"{options.k} neighbors beside those that are excluded or removed need {candidates} candidates, at most "
            f"{self._max_candidates} are allowed: exclude fewer or smaller documents, or compact the version",
            param="exclude_documents",
        )

    def _nearest_of_block(
        self, queries: Float32, k: int, wanted: Candidates, request: SearchRequest, timings: dict[str, float]
    ) -> tuple[Float32, Int64]:
        """`_nearest` of all queries at once."""
        begun = time.perf_counter()
        rescores = wanted.rescored != 0
        projected = self._index.project(queries)
        found, ids = _nothing(len(queries), 0)
        if self._base:
            found, ids = self._index.search_projected(projected, min(wanted.found, self._base), request.options)
            self._refuse_unknown(ids)
        searched = time.perf_counter()
        timings["search"] += searched - begun
        # whether the answer's distances are those between keys as the index works on them, rather than stored ones
        in_space = not rescores or (self._index.reduced is not None and request.options.rescore is None)
        if not rescores:
            found = np.nan_to_num(found, copy=False, nan=float(MISSING_DISTANCE))  # NaN: beyond float32
        elif in_space and self._index.reduced is not None:
            found, ids = rescored(self._index.reduced, projected, ids, k)
        else:
            found, ids = partly_rescored(self._keys, queries, found, ids, k, wanted.rescored)
        if self._added is not None:
            beside = self._added.search(
                queries, projected, k, max(wanted.found, k + SPARE_CANDIDATES), in_space=in_space
            )
            found, ids = np.concatenate([found, beside[0]], axis=1), np.concatenate([ids, beside[1]], axis=1)
        if self._added is not None or not rescores:
            found, ids = nearest_first(found, ids, k)
        timings["rescore" if rescores else "search"] += time.perf_counter() - searched
        return found, ids

    def _refuse_closed(self) -> None:
        if self._closed:
            raise DatastoreError(f"{self._datastore.path} was closed")

    def _refuse_unknown(self, ids: Int64) -> None:
        """Sizes are compared on opening, contents are not: an id that is no entry would be read beside the keys."""
        most = int(ids.max(initial=-1))
        if most >= self._base:
            raise DatastoreCorrupt(f"index {self._recipe} of {self._datastore.path} found entry {most} of {self._base}")

    def _refuse_strange(self, values: Int32, ids: Int64) -> None:
        """Values that are no tokens, of entries that are."""
        most = self.manifest.model.vocab_size
        if values.max(initial=-1) >= most or np.count_nonzero(values < 0) > np.count_nonzero(ids < 0):
            strange = ids[(ids >= 0) & ((values < 0) | (values >= most))]
            raise DatastoreCorrupt(
                f"{self._datastore.path} has value {self._datastore.values_of(strange[:1])[0]} at entry {strange[0]}, "
                f"expected [0, {most})"
            )

    def _passages(self, ids: npt.NDArray[np.int64], request: SearchRequest) -> list[Passage]:
        nearest = ids[: request.passages]
        return self._datastore.passages(nearest[nearest >= 0], request.passage_tokens, request.passage_tokens)


def _nothing(n: int, k: int) -> tuple[Float32, Int64]:
    return np.full((n, k), MISSING_DISTANCE, np.float32), np.full((n, k), -1, np.int64)
