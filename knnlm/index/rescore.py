"""Candidates of an index to the nearest of them by squared L2: to stored keys, reduced ones, or centroids of lists.

Each distance is summed over the dimensions in one fixed order, and equal ones are ordered by id: what a query is
answered does not depend on the queries that happen to be searched with it.
"""

import numpy as np

from knnlm.index.contract import MISSING_DISTANCE, Float32, Int64, Keys
from knnlm.index.kernels import squared_distances, with_shifted_estimates
from knnlm.index.parallel import in_slices

__all__ = ["nearest_first", "partly_rescored", "rescored"]

LOW = np.uint64(0xFFFFFFFF)  # the half of a packed pair that holds the id
HALF = np.uint64(32)


def rescored(keys: Keys, queries: Float32, candidates: Int64, k: int) -> tuple[Float32, Int64]:
    """The min(k, c) nearest of every query's c candidates, as `nearest_first` gives them.

    keys: (entries, d) float16 or float32. queries: (n, d) float32. candidates: (n, c) int64, distinct rows of keys,
    -1 = none.
    """
    k = min(k, candidates.shape[1])
    distances, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)

    def work(lo: int, hi: int) -> None:
        found = squared_distances(keys, queries[lo:hi], candidates[lo:hi])
        distances[lo:hi], ids[lo:hi] = nearest_first(found, candidates[lo:hi], k)

    in_slices(work, len(queries))
    return distances, ids


def partly_rescored(
    keys: Keys, queries: Float32, estimates: Float32, candidates: Int64, k: int, nearest: int | None
) -> tuple[Float32, Int64]:
    """The min(k, c) nearest of every query's c candidates, as `nearest_first` gives them: the first `nearest`
    candidates by their distances to keys, the others by their estimates. `nearest` None is `rescored`.

    estimates: (n, c) float32, ascending: an index's distances of the candidates. Those that are used are shifted by
    what the query's estimates miss in the mean over the farther half of the rescored candidates: dimensions that an
    index leaves out, above all.
    """
    if nearest is None:
        return rescored(keys, queries, candidates, k)
    k = min(k, candidates.shape[1])
    distances, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)

    def work(lo: int, hi: int) -> None:
        near = np.ascontiguousarray(candidates[lo:hi, :nearest])
        exact = squared_distances(keys, queries[lo:hi], near)
        found = with_shifted_estimates(exact, estimates[lo:hi], candidates[lo:hi])
        distances[lo:hi], ids[lo:hi] = nearest_first(found, candidates[lo:hi], k)

    in_slices(work, len(queries))
    return distances, ids


def nearest_first(distances: Float32, ids: Int64, k: int) -> tuple[Float32, Int64]:
    """The min(k, c) nearest of every row of distances (n, c) float32 and ids (n, c) int64, padding (id -1) last at
    MISSING_DISTANCE; of equal distances the lower id comes first.

    Distances below zero, which an index may find by cancellation, are zero.
    """
    # + 0: there are two zeros, and the bits of the negative one would sort behind everything
    distances = np.where(ids >= 0, np.clip(distances, 0, MISSING_DISTANCE) + np.float32(0), MISSING_DISTANCE)
    if ids.max(initial=0) < LOW:
        return _sorted_as_bits(distances, ids, k)
    order = np.lexsort((ids.view(np.uint64), distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _sorted_as_bits(distances: Float32, ids: Int64, k: int) -> tuple[Float32, Int64]:
    """Floats that are not negative are ordered as their bits are: a distance and an id make one number to sort."""
    pairs = distances.view(np.uint32).astype(np.uint64) << HALF
    pairs |= ids.view(np.uint64) & LOW  # -1 becomes the largest
    pairs.sort(axis=1)
    pairs = pairs[:, :k]
    sorted_ids = (pairs & LOW).view(np.int64)
    sorted_ids[sorted_ids == np.int64(LOW)] = -1
    return (pairs >> HALF).astype(np.uint32).view(np.float32), sorted_ids
