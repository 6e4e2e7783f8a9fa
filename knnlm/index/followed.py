"""Entries that come next in their documents, as candidates that no index has to find.

What was near one place of a text is often near the next one a token further on (RetoMaton, Alon et al. 2022, arXiv
2201.12431): a search that is asked to follow entries looks at those behind them alone, by distances to stored keys.
"""

import numpy as np

from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest
from knnlm.index.contract import MISSING_DISTANCE, Float32, Int64
from knnlm.index.exclusion import Exclusion
from knnlm.index.kernels import squared_distances
from knnlm.index.rescore import nearest_first

__all__ = ["followed"]


def followed(
    datastore: Datastore, queries: Float32, follow: Int64, k: int, exclusion: Exclusion | None
) -> tuple[Float32, Int64]:
    """Distances and ids (n, min(k, c)) of the entries behind those of follow (n, c), nearest first, padded with id -1.

    The last entry of a document leads nowhere. Raises InvalidRequest for an entry that does not exist, or comes twice.
    """
    entries = datastore.entries
    wrong = follow[(follow < -1) | (follow >= entries)]
    if len(wrong):
        raise InvalidRequest(f"follow must lie in [-1, {entries}), got {wrong[0]}", param="follow")
    ordered = np.sort(follow, axis=1)
    if np.any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)):
        raise InvalidRequest("follow names an entry twice for one query", param="follow")
    ids = np.where(follow >= 0, follow + 1, np.int64(-1))
    ids[ids >= entries] = -1
    there = ids >= 0
    same = datastore.document_of(ids[there])[0] == datastore.document_of(follow[there])[0]
    ids[there] = np.where(same, ids[there], -1)
    if exclusion is not None:
        ids[exclusion.holds(ids, np.arange(len(ids)))] = -1
    distances = np.full(ids.shape, MISSING_DISTANCE, np.float32)
    for first, keys in datastore.parts_of_keys():
        here = (ids >= first) & (ids < first + len(keys))
        if here.any():
            distances = np.minimum(distances, squared_distances(keys, queries, np.where(here, ids - first, -1)))
    return nearest_first(distances, ids, k)
