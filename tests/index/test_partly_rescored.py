"""Far candidates keep the distances of their codes, where the index says so; beside brute force."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.datastore.manifest import Manifest
from knnlm.index.build import build_index
from knnlm.index.ivf import RESCORED
from knnlm.index.requests import SPARE_CANDIDATES, Candidates
from knnlm.index.rescore import partly_rescored
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from tests.index.helpers import brute_force, clustered, datastore

N, DIM, K, SHIFT = 3000, 16, 400, 5.0
RECIPE = "pcar8,ivf8,pq4x4fs"  # as the default index: half of the dimensions, a code for two of them


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = datastore(tmp_path_factory.mktemp("partly"), keys())
    build_index(path, RECIPE)
    return path


@pytest.fixture
def searcher(built: Path) -> Iterator[Searcher]:
    opened = Searcher.open(built)
    yield opened
    opened.close()


def keys() -> npt.NDArray[np.float32]:
    scale = np.linspace(1.5, 0.3, DIM, dtype=np.float32)
    return np.asarray(clustered(N, DIM) * scale, np.float32)


def asked(n: int = 12) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(5)
    return np.asarray(keys()[rng.integers(0, N, n)] + rng.normal(size=(n, DIM)) / 4, np.float32)


def search(searcher: Searcher, queries: npt.NDArray[np.float32], **options: object) -> tuple[np.ndarray, np.ndarray]:
    found = searcher.search(
        SearchRequest("toy", queries, SearchOptions.of({"k": K, "nprobe": 8, **options}), ids=True)
    ).neighbors
    assert found.ids is not None
    return found.distances, found.ids


def true_distances(queries: npt.NDArray[np.float32], ids: np.ndarray) -> npt.NDArray[np.float64]:
    distances: npt.NDArray[np.float64] = np.square(queries[:, None].astype(np.float64) - keys()[ids]).sum(axis=2)
    return distances


def test_far_estimates_are_shifted_by_what_near_ones_miss() -> None:
    """Estimates that miss the same everywhere give the true distances, and so the neighbors of brute force."""
    queries = asked()
    expected, ids = brute_force(keys(), queries, N)
    estimates = (expected - SHIFT).astype(np.float32)
    distances, found = partly_rescored(keys(), queries, estimates, ids, K, 64)
    np.testing.assert_array_equal(found, ids[:, :K])
    np.testing.assert_allclose(distances, expected[:, :K], rtol=1e-4)


def test_padding_and_estimates_beyond_float32_come_last() -> None:
    candidates = np.array([[3, 0, 7, 9, -1, -1]])
    estimates = np.array([[1, 2, np.inf, np.nan, np.inf, np.nan]], np.float32)
    distances, ids = partly_rescored(keys(), asked(1), estimates, candidates, 9, 2)
    assert sorted(ids[0, :2].tolist()) == [0, 3]
    assert ids[0, 2:].tolist() == [7, 9, -1, -1]
    assert (distances[0, 2:] == np.finfo(np.float32).max).all()


def test_the_nearest_are_at_their_true_distances_and_the_others_nearly(searcher: Searcher) -> None:
    queries = asked()
    distances, ids = search(searcher, queries)
    true = true_distances(queries, ids)
    errors = np.abs(distances - true) / true
    assert (np.sum(errors < 1e-5, axis=1) >= RESCORED - SPARE_CANDIDATES).all()
    assert (errors[:, :50] < 1e-5).all()
    far = errors > 1e-5
    assert far.any()
    assert abs(float((distances - true)[far].mean() / true[far].mean())) < 0.02


def test_what_far_neighbors_say_together_is_what_their_true_distances_say(searcher: Searcher) -> None:
    queries = asked()
    values = np.arange(N) % 10
    given, codes, expected = [
        _mass(search(searcher, queries, **options), values) for options in ({}, {"rescore": False}, {"rescore": True})
    ]
    assert np.abs(given - expected).sum(axis=1).mean() / 2 < 0.03
    assert np.abs(given - expected).sum() < np.abs(codes - expected).sum()


def _mass(found: tuple[np.ndarray, np.ndarray], values: np.ndarray) -> np.ndarray:
    """(n, 10) of p_kNN, at a temperature at which far neighbors count."""
    distances, ids = found
    weights = np.exp(-distances / distances.mean())
    weights /= weights.sum(axis=1, keepdims=True)
    return np.stack([np.where(values[ids] == value, weights, 0).sum(axis=1) for value in range(10)], axis=1)


def test_an_answer_is_the_same_alone_and_in_any_batch(searcher: Searcher) -> None:
    queries = asked(24)
    distances, ids = search(searcher, queries)
    for rows in ([0], [5, 3], list(range(7, 24))):
        again, same = search(searcher, queries[rows])
        np.testing.assert_array_equal(again, distances[rows])
        np.testing.assert_array_equal(same, ids[rows])


@pytest.mark.parametrize("options", [{"rescore": True}, {"overfetch": 1.5}, {"k": RESCORED // 2}])
def test_all_are_rescored_where_that_is_asked_for_and_where_few_are(
    searcher: Searcher, options: dict[str, object]
) -> None:
    queries = asked()
    distances, ids = search(searcher, queries, **options)
    np.testing.assert_allclose(distances, true_distances(queries, ids), rtol=1e-5)


@pytest.mark.parametrize("k", [1, 204, 205, 256, 257, 1024])
def test_no_fewer_candidates_than_are_rescored(searcher: Searcher, k: int) -> None:
    candidates = Candidates.of(k, SearchOptions(), searcher.index)
    assert candidates.wanted >= min(max(k, RESCORED), 1.25 * k)
    assert (candidates.rescored is None) == (k <= 204)


def test_every_factor_of_candidates_can_be_asked_for(searcher: Searcher) -> None:
    """Up to the largest that a float can be."""
    distances, ids = search(searcher, asked(2), overfetch=1e308)
    expected, nearest = brute_force(keys(), asked(2), K)
    np.testing.assert_array_equal(ids, nearest)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)


def test_what_rows_exclude_changes_no_other_row(searcher: Searcher) -> None:
    """All candidates are rescored because entries may be excluded, not because one row does."""
    queries, none = asked(), np.full(12, -1)
    some = none.copy()
    some[0] = 7
    expected, given = [
        searcher.search(SearchRequest("toy", queries, SearchOptions(k=K), ids=True, exclude_entries=own)).neighbors
        for own in (none, some)
    ]
    np.testing.assert_array_equal(given.distances[1:], expected.distances[1:])
    assert given.ids is not None
    assert expected.ids is not None
    np.testing.assert_array_equal(given.ids[1:], expected.ids[1:])


def test_all_are_rescored_beside_excluded_ones(searcher: Searcher) -> None:
    """Those that would have been rescored may be the excluded ones."""
    queries, own = asked(), np.arange(12)
    found = searcher.search(
        SearchRequest("toy", queries, SearchOptions(k=K, nprobe=8), ids=True, exclude_entries=own)
    ).neighbors
    assert found.ids is not None
    np.testing.assert_allclose(found.distances, true_distances(queries, found.ids), rtol=1e-5)


@pytest.mark.parametrize(
    "recipe", ["ivf8,pq16", "pcar8,ivf8,pq4x4fs+fp16", "pq8x4fs", "ivf8,sq8", "ivf8,rabitqfs", "ivf8,pq1x4fs"]
)
def test_other_indexes_rescore_all(recipe: str, tmp_path: Path) -> None:
    path = datastore(tmp_path, keys()[:600])
    build_index(path, recipe)
    searcher = Searcher.open(path)
    assert searcher.index.rescored is None
    searcher.close()


def test_an_index_that_was_built_before_rescores_all(built: Path) -> None:
    manifest = Manifest.load(built)
    assert manifest.index.parameters["rescored"] == RESCORED
    parameters = {name: value for name, value in manifest.index.parameters.items() if name != "rescored"}
    manifest.model_copy(update={"index": manifest.index.model_copy(update={"parameters": parameters})}).save(built)
    try:
        former = Searcher.open(built)
        queries = asked()
        distances, ids = search(former, queries)
        np.testing.assert_allclose(distances, true_distances(queries, ids), rtol=1e-5)
        former.close()
    finally:
        manifest.save(built)
