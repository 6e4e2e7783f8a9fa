import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.index.rescore import nearest_first, rescored
from tests.index.helpers import brute_force, clustered

MISSING_DISTANCE = float(np.finfo(np.float32).max)
LARGE = 2**32 + 5  # more than half of a packed pair holds


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("n", [1, 3, 4, 9, 64])
def test_all_candidates_in_any_order_give_what_brute_force_gives(dtype: type[np.floating], n: int) -> None:
    keys, queries = clustered(200, 12).astype(dtype), clustered(n, 12, seed=1)
    rng = np.random.default_rng(0)
    candidates = np.stack([rng.permutation(200) for _ in range(n)])
    distances, ids = rescored(keys, queries, candidates, 30)
    expected, expected_ids = brute_force(keys, queries, 30)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)


def test_padding_among_candidates_comes_last() -> None:
    keys = clustered(20, 4)
    _, ids = rescored(keys, keys[:1], np.array([[-1, 3, -1, 0]]), 9)
    assert ids.tolist() == [[0, 3, -1, -1]]


def test_farther_than_float32_is_nearer_than_nothing() -> None:
    keys = np.ones((3, 4), np.float32)
    distances, ids = rescored(keys, np.full((1, 4), 3e38, np.float32), np.array([[-1, 2, 0]]), 3)
    assert ids.tolist() == [[0, 2, -1]]
    assert (distances == MISSING_DISTANCE).all()


@pytest.mark.parametrize("large", [0, LARGE])
def test_order_is_by_distance_then_id_with_padding_last(large: int) -> None:
    distances = np.array([[2, -1e-6, 3.4e38, 2, -0.0, 0, np.inf]], np.float32)
    ids = np.array([[7, 5, -1, 3, 9, 1, 8]]) + np.where([1, 1, 0, 1, 1, 1, 1], large, 0)
    kept, order = nearest_first(distances, ids, 7)
    assert order.tolist() == [[1 + large, 5 + large, 9 + large, 3 + large, 7 + large, 8 + large, -1]]
    assert kept.tolist() == [[0, 0, 0, 2, 2, MISSING_DISTANCE, MISSING_DISTANCE]]


@given(st.integers(0, 2**16), st.integers(0, 12), st.sampled_from([0, 2**32 - 3, LARGE]))
def test_both_ways_of_sorting_agree_with_a_plain_one(seed: int, k: int, large: int) -> None:
    """Ids that meet the largest packed one, and those beyond it, are sorted in another way."""
    rng = np.random.default_rng(seed)
    distances = rng.integers(0, 4, (3, 10)).astype(np.float32)
    ids = np.stack([rng.permutation(10) for _ in range(3)]) + large
    ids[rng.random((3, 10)) < 0.2] = -1
    expected: list[list[tuple[float, int]]] = [
        sorted(
            ((MISSING_DISTANCE if i < 0 else d, i) for d, i in zip(*row, strict=True)),
            key=lambda pair: (pair[1] < 0, pair),
        )[:k]
        for row in zip(distances.tolist(), ids.tolist(), strict=True)
    ]
    kept, order = nearest_first(distances, ids, k)
    assert [list(zip(*row, strict=True)) for row in zip(kept.tolist(), order.tolist(), strict=True)] == expected


def test_what_is_given_is_not_changed() -> None:
    distances: npt.NDArray[np.float32] = np.array([[2, 1, -1]], np.float32)
    ids = np.array([[0, 1, -1]])
    nearest_first(distances, ids, 2)
    assert (distances.tolist(), ids.tolist()) == ([[2, 1, -1]], [[0, 1, -1]])
