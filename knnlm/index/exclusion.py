"""Neighbors that do not count: an entry of its own for each query, its whole document, documents for all queries, and
the documents that were removed from the version.

An index cannot leave entries out, so more candidates are asked for, what is excluded among them is dropped, and a query
with too few left asks again. The distribution over the neighbors that are returned is that of the datastore without the
excluded entries: nothing has to be renormalised afterwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest
from knnlm.index.contract import MISSING_DISTANCE, Float32, Int64
from knnlm.index.tombstones import NO_TOMBSTONES, Tombstones
from knnlm.messages import SearchRequest

__all__ = ["Exclusion", "check_exclusion", "check_follow", "without"]

Search = Callable[[Float32, int], tuple[Float32, Int64]]

# candidates beyond the removed entries that are expected among the nearest: this many, and this many standard
# deviations; a query that meets more is searched again
MARGIN = 4
DEVIATIONS = 3
BLOCK_CANDIDATES = 1 << 20  # of some queries together: what is looked through at once


def check_exclusion(request: SearchRequest) -> None:
    """What can be known without the datastore; before requests are joined, since arrays of wrong sizes would mix them.

    Raises InvalidRequest, naming the field.
    """
    entries, n = request.exclude_entries, len(request.queries)
    if entries is None:
        if request.options.exclude_own_documents:
            raise InvalidRequest(
                "exclude_own_documents means the documents of exclude_entries, which is not given",
                param="exclude_own_documents",
            )
        return
    if entries.dtype != np.int64 or entries.shape != (n,):
        raise InvalidRequest(
            f"exclude_entries must be int64 of shape ({n},), an entry for each query, "
            f"got {entries.dtype.name} of shape {entries.shape}",
            param="exclude_entries",
        )


def check_follow(request: SearchRequest) -> None:
    """What can be known without the datastore. Raises InvalidRequest, naming the field."""
    follow, n = request.follow, len(request.queries)
    if follow is None:
        return
    if follow.dtype != np.int64 or follow.ndim != 2 or len(follow) != n:
        raise InvalidRequest(
            f"follow must be int64 of shape ({n}, c), entries for each query, got {follow.dtype.name} of shape "
            f"{follow.shape}",
            param="follow",
        )


@dataclass(frozen=True)
class Exclusion:
    """Ranges of entries. A document lies in them as a whole or, but for an entry of its own, not at all.

    lows, highs: (n,) int64, query i excludes [lows[i], highs[i]), within one document, empty when they are equal.
    starts, ends: (m,) int64, what every query excludes: ascending, disjoint, none empty. removed: what every search of
    the version excludes, which is none of those.
    """

    lows: Int64
    highs: Int64
    starts: Int64
    ends: Int64
    removed: Tombstones = NO_TOMBSTONES

    @classmethod
    def of(cls, request: SearchRequest, datastore: Datastore, removed: Tombstones = NO_TOMBSTONES) -> Self | None:
        """What the request excludes, and what was removed from the version; None when that is no entry at all.

        Raises InvalidRequest, naming the field, for an entry or document that does not exist; a document that was
        removed does not.
        """
        check_exclusion(request)
        lows, highs = _own(request, datastore)
        starts, ends = _documents(request.options.exclude_documents, datastore)
        if not len(starts) and not removed.count and not (highs > lows).any():
            return None
        return cls(lows, highs, starts, ends, removed)

    def counts(self) -> Int64:
        """(n,) how many entries each query excludes."""
        own = np.where(self._shared(self.lows), 0, self.highs - self.lows)
        counts: Int64 = own + (self.ends - self.starts).sum() + self.removed.count
        return counts

    def holds(self, ids: Int64, rows: Int64) -> npt.NDArray[np.bool_]:
        """Which of ids (r, c), candidates of the queries numbered rows (r,), are excluded. -1 never is."""
        found: npt.NDArray[np.bool_] = (ids >= self.lows[rows, None]) & (ids < self.highs[rows, None])
        if len(self.starts) or self.removed.count:
            found |= self._shared(ids)
        return found

    def _shared(self, ids: Int64) -> npt.NDArray[np.bool_]:
        """Which of ids, of any shape, every query excludes."""
        found = self.removed.holds(ids)
        if len(self.starts):
            place = np.searchsorted(self.starts, ids, side="right") - 1  # of the last range that begins at or before
            found |= (place >= 0) & (ids < self.ends[place])
        return found


def without(search: Search, queries: Float32, k: int, exclusion: Exclusion, entries: int) -> tuple[Float32, Int64]:
    """The k nearest of what `search` finds that are not excluded: distances and ids (n, k), padded with id -1 at
    MISSING_DISTANCE.

    search(queries (r, d), c): distances and ids (r, c) of distinct entries, nearest first, padded with id -1, the same
    for a query whatever else is searched with it; so this is true of what is returned, too. queries: (n, d).
    entries: of the datastore; c is never more. A query that excludes e entries is searched with k + e candidates, or k
    + k if that is less, and with twice as many, up to k + e, as long as fewer than k are left of a full row; e is
    rounded up to a power of two, so that queries of one batch are searched together, as many as have BLOCK_CANDIDATES.
    Removed entries count at first with the number that is expected among the nearest.
    """
    distances, ids = np.full((len(queries), k), MISSING_DISTANCE, np.float32), np.full((len(queries), k), -1, np.int64)
    removed = exclusion.removed.count
    excluded = _power_of_two(exclusion.counts() - removed)
    most = np.minimum(k + excluded + removed, entries)  # (n,) candidates that are always enough
    wanted = k + np.minimum(excluded, k)
    wanted = np.minimum(wanted + _expected(wanted, removed, entries), most)
    waiting = np.arange(len(queries))
    while len(waiting):
        c = int(wanted[waiting[0]])
        rows = waiting[wanted[waiting] == c][: max(1, BLOCK_CANDIDATES // c)]
        near, found = search(queries[rows], c)
        kept = (found >= 0) & ~exclusion.holds(found, rows)
        distances[rows], ids[rows] = _first(near, found, kept, k)
        short = (kept.sum(axis=1) < k) & (found >= 0).all(axis=1) & (c < most[rows])
        wanted[rows] = np.minimum(2 * c, most[rows])
        waiting = np.concatenate([np.setdiff1d(waiting, rows, assume_unique=True), rows[short]])
    return distances, ids


def _first(near: Float32, found: Int64, kept: npt.NDArray[np.bool_], k: int) -> tuple[Float32, Int64]:
    """The first k of every row that are kept, moved together."""
    distances, ids = np.full((len(found), k), MISSING_DISTANCE, np.float32), np.full((len(found), k), -1, np.int64)
    taken = kept & (np.cumsum(kept, axis=1, dtype=np.int32) <= k)
    filled = np.arange(k) < taken.sum(axis=1)[:, None]
    distances[filled], ids[filled] = near[taken], found[taken]  # both row by row
    return distances, ids


def _own(request: SearchRequest, datastore: Datastore) -> tuple[Int64, Int64]:
    """lows and highs of an Exclusion."""
    given, n = request.exclude_entries, len(request.queries)
    if given is None:
        return np.zeros(n, np.int64), np.zeros(n, np.int64)
    entries = datastore.entries
    wrong = given[(given < -1) | (given >= entries)]
    if len(wrong):
        raise InvalidRequest(f"exclude_entries must lie in [-1, {entries}), got {wrong[0]}", param="exclude_entries")
    lows, highs = given.copy(), given + 1
    named = given >= 0
    lows[~named] = highs[~named] = 0
    if request.options.exclude_own_documents and named.any():
        numbers, _ = datastore.document_of(given[named])
        lows[named], highs[named] = datastore.documents.spans(numbers)
    return lows, highs


def _documents(ids: Sequence[str], datastore: Datastore) -> tuple[Int64, Int64]:
    """starts and ends of an Exclusion."""
    numbers = [datastore.documents.numbers(name) for name in ids]
    for name, found in zip(ids, numbers, strict=True):
        if not len(found):
            raise InvalidRequest(
                f"exclude_documents names {name!r:.80}, which is no document of {datastore.manifest.domain} "
                f"{datastore.manifest.version}",
                param="exclude_documents",
            )
    if not numbers:  # without reading the table of documents
        return np.empty(0, np.int64), np.empty(0, np.int64)
    starts, ends = datastore.documents.spans(np.unique(np.concatenate(numbers)))
    some = ends > starts
    return starts[some], ends[some]


def _expected(wanted: Int64, removed: int, entries: int) -> Int64:
    """How many removed entries lie before the `wanted` (n,) nearest others if they are spread evenly, and some more."""
    others = max(entries - removed, 1)
    met: Int64 = np.ceil(wanted * (removed / others)).astype(np.int64)
    spread = np.ceil(DEVIATIONS * np.sqrt(met * (entries / others))).astype(np.int64)
    return np.where(removed, met + spread + MARGIN, 0)


def _power_of_two(counts: Int64) -> Int64:
    """The least one that is not below, 0 for 0."""
    powers = np.exp2(np.ceil(np.log2(np.maximum(counts, 1)))).astype(np.int64)
    return np.where(counts > 0, powers, 0)
