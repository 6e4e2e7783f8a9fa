"""Exact search in blocks, against distances written out."""

from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest
from knnlm.index import exact
from knnlm.index.exact import exact_neighbors
from knnlm.testing import ToyLanguageModel
from tests.grown import base, grow, some_documents

LM = ToyLanguageModel(key_dim=16)
QUERIES = np.random.default_rng(0).uniform(-1, 1, (20, 16)).astype(np.float32)


@pytest.fixture(params=["built", "grown"])
def datastore(request: pytest.FixtureRequest, tmp_path: Path) -> Datastore:
    path = base(tmp_path / "store", some_documents("base", [200, 150, 250], seed=0), LM)
    if request.param == "grown":
        path = grow(path, LM, [some_documents("added", [120, 90], seed=1)], [1, 4])
    return Datastore.open(path)


def by_hand(datastore: Datastore, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and ids of the k nearest that were not removed; of equal distances the lower id comes first."""
    keys = np.concatenate([datastore.keys, datastore.added_keys()]).astype(np.float64)
    squared = ((QUERIES[:, None].astype(np.float64) - keys[None]) ** 2).sum(axis=2)
    for start, end in zip(*datastore.removed, strict=True):
        squared[:, start:end] = np.inf
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(squared, order, axis=1), order


@pytest.mark.parametrize("k", [1, 7, 64])
def test_blocks_together_give_the_nearest_of_all(datastore: Datastore, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BLOCK_BYTES", 4 * 16 * 50)  # 50 keys
    seen: list[int] = []
    found = exact_neighbors(datastore, QUERIES, k, on_progress=seen.append)
    distances, ids = by_hand(datastore, k)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-5)
    assert found.ids is not None
    # rounding may order two that are equally near otherwise
    same = found.ids == ids
    np.testing.assert_allclose(found.distances[~same], distances[~same], rtol=1e-6)
    assert same.mean() > 0.99
    np.testing.assert_array_equal(found.values, datastore.values_of(found.ids))
    assert seen == sorted(seen)
    assert seen[-1] == datastore.entries


def test_more_neighbors_than_entries_are_all_that_are_there(datastore: Datastore) -> None:
    found = exact_neighbors(datastore, QUERIES, 10_000)
    assert (np.count_nonzero(found.values >= 0, axis=1) == datastore.manifest.live_entries).all()


def test_what_cannot_be_searched_for_is_refused(datastore: Datastore) -> None:
    for queries, k in ((QUERIES, 0), (QUERIES[:, :8], 3), (QUERIES[0], 3)):
        with pytest.raises(InvalidRequest, match="expected k >= 1"):
            exact_neighbors(datastore, queries, k)
