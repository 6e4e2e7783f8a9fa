"""Candidates of an index to true distances: squared L2 to the stored keys, nearest first.

Each distance is summed over the dimensions in one fixed order, whatever else is in the batch: a query's answer does not
depend on the queries that happen to be searched with it. One query is worked on at a time, so that its candidates stay
in the processor's cache, and the queries of a batch on all processors: numpy lets go of the interpreter meanwhile.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from knnlm.index.contract import Float32, Int64, Keys

__all__ = ["FAR", "nearest_first", "rescore"]

FAR = np.finfo(np.float32).max  # the distance beside an id of -1
FEW = 8  # queries that are not worth a second thread


def rescore(keys: Keys, queries: Float32, ids: Int64) -> Float32:
    """(n, c) squared L2 between queries (n, d) and keys[ids], ids being (n, c) with -1 for padding, which stays FAR."""
    distances = np.full(ids.shape, FAR, np.float32)
    raw = np.asarray(keys)  # a memmap's own indexing costs more than the gather

    def one(row: int) -> None:
        found = np.flatnonzero(ids[row] >= 0)
        difference = _float32(raw[ids[row, found]])  # (found, d)
        difference -= queries[row]
        with np.errstate(over="ignore"):  # too far for float32 is FAR
            distances[row, found] = np.minimum(np.einsum("cd,cd->c", difference, difference), FAR)

    threads = min(os.cpu_count() or 1, len(queries) // FEW)
    if threads < 2:
        for row in range(len(queries)):
            one(row)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(one, range(len(queries))):
                pass
    return distances


def nearest_first(distances: Float32, ids: Int64, k: int) -> tuple[Float32, Int64]:
    """The k nearest of every row of (n, c), padding last; of equal distances the lower id comes first."""
    far = np.where(ids >= 0, distances, np.inf)
    order = np.lexsort((ids, far), axis=1)[:, :k]
    ids = np.take_along_axis(ids, order, axis=1)
    # FAISS expands |q - x|^2 for large batches: cancellation can leave a distance just below zero
    distances = np.clip(np.take_along_axis(distances, order, axis=1), 0, FAR)
    return np.where(ids >= 0, distances, FAR).astype(np.float32), ids


def _float32(keys: Keys) -> Float32:
    """numpy converts halves one by one in software; a table of all 65,536 is twice as fast."""
    if keys.dtype == np.float16:
        return np.take(_halves(), keys.view(np.uint16))
    return keys.astype(np.float32)


@cache
def _halves() -> Float32:
    """(65536,) float32: the value of every float16 by its bits."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
