"""Exact search of a whole version in bounded memory: the measure of every index, for a sample of queries.

Unlike the index "flat" it holds no keys: they pass by once, a block at a time, so that a version of any size can be
measured. It is no way to serve: a query costs a product with every key.
"""

from collections.abc import Callable

import numpy as np

from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest
from knnlm.index.contract import Float32, Int64, Keys, to_float32
from knnlm.index.flat import Flat
from knnlm.index.requests import SPARE_CANDIDATES
from knnlm.index.rescore import nearest_first, rescored
from knnlm.neighbors import Neighbors

__all__ = ["exact_neighbors"]

BLOCK_BYTES = 1 << 27  # of keys as float32


def exact_neighbors(
    datastore: Datastore, queries: Keys, k: int, *, on_progress: Callable[[int], None] | None = None
) -> Neighbors:
    """The k nearest entries of each query (n, d), with ids, by squared L2 to the stored keys.

    Added entries count, removed ones do not. on_progress: called with the keys done so far. Memory: BLOCK_BYTES, and
    some 50 bytes per query and neighbor. Raises InvalidRequest for queries of another dimension or k < 1.
    """
    if k < 1 or queries.ndim != 2 or queries.shape[1] != datastore.manifest.key_dim:
        raise InvalidRequest(
            f"expected k >= 1 and queries (n, {datastore.manifest.key_dim}), got {k} and {queries.shape}"
        )
    asked = to_float32(queries)
    removed = np.zeros(datastore.entries, np.bool_)
    for start, end in zip(*(edges.tolist() for edges in datastore.removed), strict=True):
        removed[start:end] = True
    distances, ids = np.empty((len(asked), 0), np.float32), np.empty((len(asked), 0), np.int64)
    for first, keys in datastore.parts_of_keys():
        near, found = _scanned(keys, asked, k, removed[first : first + len(keys)], first, on_progress)
        found[found >= 0] += first
        both = np.concatenate([distances, near], axis=1), np.concatenate([ids, found], axis=1)
        distances, ids = nearest_first(*both, k)
    return Neighbors(distances, datastore.values_of(ids), ids)


def _scanned(
    keys: Keys, queries: Float32, k: int, removed: np.ndarray, done: int, on_progress: Callable[[int], None] | None
) -> tuple[Float32, Int64]:
    """The k nearest rows of keys (m, d) that are not removed (m,): distances and rows, both (n, k') with k' <= k."""
    wanted = k + SPARE_CANDIDATES  # products of matrices round: the true distances may rank the last ones otherwise
    near, found = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    step = max(1, BLOCK_BYTES // (4 * keys.shape[1]))
    for start in range(0, len(keys), step):
        rows = start + np.flatnonzero(~removed[start : start + step])
        if len(rows):
            block = Flat().opened(keys[start : start + step] if len(rows) == step else keys[rows])
            distances, ids = block.search(queries, min(wanted, len(rows)))
            block.close()
            both = np.concatenate([near, distances], axis=1), np.concatenate([found, rows[ids]], axis=1)
            near, found = nearest_first(*both, wanted)
        if on_progress is not None:
            on_progress(done + min(start + step, len(keys)))
    return rescored(keys, queries, found, k)
