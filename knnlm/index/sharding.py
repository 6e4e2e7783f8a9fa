"""One search of many shards: what each of them is asked, and the one answer that their answers make. Pure.

A shard knows its own documents and entries, numbered from 0. The k nearest of the whole are among the k nearest of each
shard, so merging by distance loses nothing; what indexes of shards find is what one index would, since all were trained
once and a query visits the same lists in each of them. Where the shards are is not known here: in this process
(sharded_searcher.py) or elsewhere.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from knnlm.datastore.manifest import Manifest
from knnlm.errors import InvalidRequest
from knnlm.index.contract import MISSING_DISTANCE, Int64
from knnlm.index.exclusion import check_exclusion, check_follow
from knnlm.index.requests import check_lookup, check_queries, check_version
from knnlm.messages import Passage, PassagesRequest, SearchRequest, SearchResult
from knnlm.neighbors import Neighbors

__all__ = ["ShardRequest", "ShardResult", "Sharding"]

COLUMN_BITS = np.uint64(32)
COLUMN_MASK = np.uint64(0xFFFFFFFF)
MERGED_AT_ONCE = 16  # answers of shards that are held side by side, however many shards there are


@dataclass(frozen=True)
class ShardResult:
    """What one shard answers. unknown_documents: those of the excluded ones that it does not have: others may."""

    result: SearchResult
    unknown_documents: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardRequest:
    """What one shard is asked: all queries, or those of `rows` (m,), ascending."""

    shard: int
    request: SearchRequest
    rows: Int64 | None = None


class Sharding:
    """The shards of one version, by the numbers of their entries; a version without shards is one. first_entries:
    (s + 1,) int64, where each of them begins, then how many entries there are."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        parts = [shard.entries for shard in manifest.shards] or [manifest.entries]
        self.first_entries: Int64 = np.cumsum([0, *parts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.first_entries) - 1

    @property
    def entries(self) -> int:
        return int(self.first_entries[-1])

    def split(self, request: SearchRequest) -> list[ShardRequest]:
        """What each shard is asked. Raises InvalidRequest, naming the field, for entries that do not exist, and
        UnknownDomain or UnknownVersion; the rest is checked by the shards.

        Of entries to follow, a shard gets its own and their queries; one that has none is not asked, but for the first
        one and where documents are named: each knows its own.
        """
        check_version(request.domain, request.version, self._manifest)
        check_exclusion(request)
        check_follow(request)
        for name in ("exclude_entries", "follow"):
            given = getattr(request, name)
            if given is None:
                continue
            wrong = given[(given < -1) | (given >= self.entries)]
            if len(wrong):
                raise InvalidRequest(f"{name} must lie in [-1, {self.entries}), got {wrong[0]}", param=name)
        if request.follow is not None:
            return self._split_followed(replace(request, ids=True), request.follow)
        return [
            ShardRequest(shard, replace(request, ids=True, exclude_entries=self._local(request.exclude_entries, shard)))
            for shard in range(len(self))
        ]

    def _split_followed(self, request: SearchRequest, follow: Int64) -> list[ShardRequest]:
        check_queries(request.queries, self._manifest.key_dim)
        rows, columns = np.nonzero(follow >= 0)
        entries = follow[rows, columns]
        owners = self._owners(entries)
        order = np.argsort(owners, kind="stable")  # by shard, then by query
        ends = np.searchsorted(owners[order], np.arange(len(self) + 1))
        asked = []
        for shard, (start, end) in enumerate(pairwise(ends.tolist())):
            if start == end and shard and not request.options.exclude_documents:
                continue
            mine = order[start:end]
            queries, firsts, counts = np.unique(rows[mine], return_index=True, return_counts=True)
            local = np.full((len(queries), counts.max(initial=0)), -1, np.int64)
            columns = np.arange(len(mine)) - np.repeat(firsts, counts)
            local[np.repeat(np.arange(len(queries)), counts), columns] = entries[mine] - self.first_entries[shard]
            excluded = None if request.exclude_entries is None else request.exclude_entries[queries]
            part = replace(
                request, queries=request.queries[queries], follow=local, exclude_entries=self._local(excluded, shard)
            )
            asked.append(ShardRequest(shard, part, queries))
        return asked

    def merge(
        self, request: SearchRequest, asked: Sequence[ShardRequest], answers: Iterable[ShardResult]
    ) -> SearchResult:
        """The answer to `request` of what the shards answered to `asked`, which is `split(request)`, in their order.

        Answers are taken one by one, and at most MERGED_AT_ONCE of them are held. Of equal distances the lower entry
        comes first, as in one index. timings: of all shards together. Raises InvalidRequest for an excluded document
        that no shard has.
        """
        k = min(request.k, self.entries)
        if request.follow is not None:
            k = min(k, request.follow.shape[1])
        unknown = set(request.options.exclude_documents)
        timings: dict[str, float] = {}
        n = len(request.queries)
        held = [] if request.follow is None else [_found_nothing(n, k, request.passages)]  # shards answer less than k
        for part, answer in zip(asked, answers, strict=True):
            unknown.intersection_update(answer.unknown_documents)
            for stage, seconds in answer.result.timings.items():
                timings[stage] = timings.get(stage, 0.0) + seconds
            found = self._found(part.shard, answer.result)
            held.append(found if part.rows is None else _spread(found, part.rows, n))
            if len(held) == MERGED_AT_ONCE:
                held = [_nearest(held, k, request.passages)]
        for name in request.options.exclude_documents:
            if name in unknown:
                raise InvalidRequest(
                    f"exclude_documents names {name!r:.80}, which is no document of {self._manifest.domain} "
                    f"{self._manifest.version}",
                    param="exclude_documents",
                )
        near = _nearest(held, k, request.passages)
        return SearchResult(
            domain=self._manifest.domain,
            version=self._manifest.version,
            neighbors=Neighbors(near.distances, near.values, near.ids if request.ids else None),
            passages=near.passages,
            timings=timings,
        )

    def split_lookup(self, request: PassagesRequest) -> dict[int, PassagesRequest]:
        """What is asked of the shards that have some of the entries, by their numbers. Raises InvalidRequest for
        entries that do not exist, UnknownDomain and UnknownVersion."""
        check_lookup(request, self._manifest)
        owners = self._owners(request.entries)
        return {
            shard: replace(request, entries=request.entries[owners == shard] - self.first_entries[shard])
            for shard in np.unique(owners).tolist()
        }

    def merge_lookup(self, request: PassagesRequest, answers: Mapping[int, Sequence[Passage]]) -> list[Passage]:
        """The passages of `request`, in its order, of what the shards answered to `split_lookup(request)`."""
        rest = {shard: iter([self._whole(shard, p) for p in found]) for shard, found in answers.items()}
        return [next(rest[shard]) for shard in self._owners(request.entries).tolist()]

    def _owners(self, entries: Int64) -> Int64:
        return np.searchsorted(self.first_entries, entries, side="right").astype(np.int64) - 1

    def _local(self, entries: Int64 | None, shard: int) -> Int64 | None:
        """Entries of the whole by the shard's numbers, -1 for those of others."""
        if entries is None:
            return None
        first, end = self.first_entries[shard : shard + 2]
        return np.where((entries >= first) & (entries < end), entries - first, np.int64(-1))

    def _whole(self, shard: int, passage: Passage) -> Passage:
        return replace(passage, entry=passage.entry + int(self.first_entries[shard]))

    def _found(self, shard: int, result: SearchResult) -> "_Found":
        """What a shard answered, by the entries of the whole."""
        near = result.neighbors
        if near.ids is None:
            raise InvalidRequest("a shard answered without the ids that it was asked for", param="ids")
        ids = np.where(near.ids >= 0, near.ids + self.first_entries[shard], np.int64(-1))
        passages = [[self._whole(shard, passage) for passage in row] for row in result.passages]
        return _Found(near.distances, near.values, ids, passages)


@dataclass(frozen=True)
class _Found:
    """Neighbors of n queries by the entries of the whole. distances, values, ids: (n, c), padding (id -1) last.
    passages: for each query those of its first columns, as many as are asked for; empty where none are."""

    distances: npt.NDArray[np.float32]
    values: npt.NDArray[np.int32]
    ids: Int64
    passages: Sequence[Sequence[Passage]]


def _found_nothing(n: int, columns: int, passages: int) -> _Found:
    shape = (n, columns)
    distances, values = np.full(shape, MISSING_DISTANCE, np.float32), np.full(shape, -1, np.int32)
    return _Found(distances, values, np.full(shape, -1, np.int64), [()] * n if passages else [])


def _spread(found: _Found, rows: Int64, n: int) -> _Found:
    """What was found for the queries of `rows` as what was found for all n."""
    whole = _found_nothing(n, found.ids.shape[1], 0)
    whole.distances[rows], whole.values[rows], whole.ids[rows] = found.distances, found.values, found.ids
    by_row = dict(zip(rows.tolist(), found.passages, strict=False))  # passages are empty where none were asked for
    return replace(whole, passages=[by_row.get(row, ()) for row in range(n)])


def _nearest(found: Sequence[_Found], k: int, passages: int) -> _Found:
    """The k nearest of all that were found, with the passages of the first ones: each of `found` has as many of its own
    nearest, among which these are."""
    distances = np.concatenate([f.distances for f in found], axis=1)
    values = np.concatenate([f.values for f in found], axis=1)
    ids = np.concatenate([f.ids for f in found], axis=1)
    chosen = _nearest_columns(distances, ids, k)
    near, kept, merged = (np.take_along_axis(a, chosen, axis=1) for a in (distances, values, ids))
    missing = merged < 0
    near[missing], kept[missing] = MISSING_DISTANCE, -1
    begins = np.cumsum([0, *(f.ids.shape[1] for f in found)])
    texts: list[list[Passage]] = []
    for query, columns in enumerate(chosen[:, :passages] if passages else ()):
        present = columns[merged[query, :passages] >= 0]
        owners = np.searchsorted(begins, present, side="right") - 1
        texts.append(
            [
                found[owner].passages[query][column]
                for owner, column in zip(owners.tolist(), (present - begins[owners]).tolist(), strict=True)
            ]
        )
    return _Found(near, kept, merged, texts)


def _nearest_columns(distances: npt.NDArray[np.float32], ids: Int64, k: int) -> Int64:
    """(n, k) columns of the nearest of every row of (n, c), padding (id -1) last; of equal distances the lower column.

    Distances that are not negative are ordered as their bits are: one number holds a distance and a column.
    """
    pairs = (np.maximum(distances, np.float32(0)) + np.float32(0)).view(np.uint32).astype(np.uint64) << COLUMN_BITS
    pairs |= np.arange(distances.shape[1], dtype=np.uint64)
    pairs[ids < 0] |= ~COLUMN_MASK
    if k < pairs.shape[1]:
        pairs = np.partition(pairs, k, axis=1)[:, :k] if k else pairs[:, :0]
    pairs.sort(axis=1)
    return (pairs & COLUMN_MASK).astype(np.int64)
