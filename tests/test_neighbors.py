"""Neighbors to distributions, against loops that follow the formula word by word."""

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InvalidRequest
from knnlm.neighbors import (
    Neighbors,
    merge,
    neighbor_log_probs,
    target_log_probs,
)

FAISS_FAR = np.finfo(np.float32).max


def make(rows: list[list[tuple[float, int]]], k: int) -> Neighbors:
    """Rows of (distance, value), padded to k as FAISS pads."""
    distances = np.full((len(rows), k), FAISS_FAR, np.float32)
    values = np.full((len(rows), k), -1, np.int32)
    for i, row in enumerate(rows):
        for j, (distance, value) in enumerate(sorted(row)):
            distances[i, j], values[i, j] = distance, value
    return Neighbors(distances, values)


def brute_force(row: list[tuple[float, int]], temperature: float) -> dict[int, float]:
    """p_kNN by its definition, shifted by the smallest distance so that it can be computed at all."""
    nearest = min(np.float64(np.float32(d)) for d, _ in row)
    total: dict[int, float] = defaultdict(float)
    for distance, value in row:
        total[value] += math.exp(-(np.float64(np.float32(distance)) - nearest) / temperature)
    norm = math.fsum(total.values())
    return {value: mass / norm for value, mass in total.items()}


distances = st.floats(0, 2000, width=32)
row = st.lists(st.tuples(distances, st.integers(0, 6)), min_size=1, max_size=12)
rows = st.lists(st.one_of(row, st.just([])), min_size=1, max_size=4)
temperatures = st.floats(0.05, 1e4)


@given(rows, temperatures)
def test_distribution_equals_brute_force(rows: list[list[tuple[float, int]]], temperature: float) -> None:
    probs = np.exp(neighbor_log_probs(make(rows, 12), temperature).dense(7))
    for i, r in enumerate(rows):
        expected = brute_force(r, temperature) if r else {}
        np.testing.assert_allclose(probs[i], [expected.get(w, 0.0) for w in range(7)], rtol=1e-9, atol=1e-15)


@given(rows, temperatures)
def test_rows_sum_to_one_or_are_empty(rows: list[list[tuple[float, int]]], temperature: float) -> None:
    neighbors = make(rows, 12)
    sums = np.exp(neighbor_log_probs(neighbors, temperature).dense(7)).sum(axis=1)
    np.testing.assert_allclose(sums, neighbors.present.astype(float), rtol=1e-12)


@given(row, temperatures, st.permutations(range(12)))
def test_order_of_neighbors_is_irrelevant(r: list[tuple[float, int]], temperature: float, order: list[int]) -> None:
    neighbors = make([r], 12)
    shuffled = Neighbors(neighbors.distances[:, order], neighbors.values[:, order])
    np.testing.assert_allclose(
        neighbor_log_probs(neighbors, temperature).dense(7),
        neighbor_log_probs(shuffled, temperature).dense(7),
        rtol=1e-12,
    )


@given(rows, temperatures, st.integers(0, 6))
def test_target_shortcut_equals_the_distribution(
    rows: list[list[tuple[float, int]]], temperature: float, target: int
) -> None:
    neighbors = make(rows, 12)
    targets = np.full(len(rows), target)
    full = neighbor_log_probs(neighbors, temperature)
    np.testing.assert_allclose(target_log_probs(neighbors, targets, temperature), full.of(targets), rtol=1e-9)


def test_target_shortcut_across_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with padding, without it and without any neighbor, in blocks of two rows and a last one of one."""
    monkeypatch.setattr("knnlm.neighbors.BLOCK_BYTES", 2 * 4 * 8)
    full_row = [(1.0, 1), (2.0, 2), (3.0, 1), (4.0, 3)]
    neighbors = make([full_row, full_row[:1], [], full_row[1:], full_row], 4)
    targets = np.array([1, 1, 1, 2, 3])
    expected = neighbor_log_probs(neighbors, 1.5).of(targets)
    np.testing.assert_allclose(target_log_probs(neighbors, targets, 1.5), expected, rtol=1e-12)
    assert np.isneginf(target_log_probs(neighbors, targets, 1.5)[2])


def test_target_shortcut_where_exp_underflows() -> None:
    neighbors = make([[(0.0, 1), (700.0, 2), (750.0, 3), (751.0, 3), (9000.0, 4)]], 6)
    for target, expected in ((2, -700.0), (3, -750.0 + math.log1p(math.exp(-1.0))), (4, -9000.0), (5, -math.inf)):
        assert target_log_probs(neighbors, np.array([target]), 1.0)[0] == pytest.approx(expected, rel=1e-12)


def test_padding_is_no_neighbor_and_never_a_hit() -> None:
    near_padding = Neighbors(np.array([[0.0, 5.0], [0.0, 0.0]], np.float32), np.array([[-1, 1], [-1, -1]], np.int32))
    np.testing.assert_array_equal(target_log_probs(near_padding, np.array([1, 1]), 1.0), [0.0, -np.inf])
    np.testing.assert_array_equal(target_log_probs(near_padding, np.array([-1, -1]), 1.0), [-np.inf, -np.inf])


def test_far_neighbors_keep_a_finite_log_probability() -> None:
    """exp(-d / T) underflows in float64 beyond 745 T: log space must not."""
    log_probs = neighbor_log_probs(make([[(0.0, 1), (5000.0, 2)]], 2), 1.0).dense(3)
    np.testing.assert_allclose(log_probs[0, 1:], [0.0, -5000.0])
    np.testing.assert_allclose(target_log_probs(make([[(0.0, 1), (5000.0, 2)]], 2), np.array([2]), 1.0), [-5000.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 100.0])
def test_padding_weighs_nothing(temperature: float) -> None:
    """The trap: 3.4e38 / 0.5 overflows, and value -1 gathered from an array is its last element."""
    padded, exact = make([[(3.0, 0), (4.0, 1)]], 5), make([[(3.0, 0), (4.0, 1)]], 2)
    np.testing.assert_array_equal(
        neighbor_log_probs(padded, temperature).dense(2), neighbor_log_probs(exact, temperature).dense(2)
    )


def test_no_neighbor_gives_no_distribution() -> None:
    nothing = make([[], [(1.0, 3)]], 4)
    np.testing.assert_array_equal(nothing.present, [False, True])
    log_probs = neighbor_log_probs(nothing, 0.5).dense(4)
    assert np.all(np.isneginf(log_probs[0]))
    np.testing.assert_array_equal(target_log_probs(nothing, np.array([3, 3]), 0.5), [-np.inf, 0.0])


def test_zero_queries_and_zero_columns() -> None:
    empty = Neighbors(np.empty((0, 4), np.float32), np.empty((0, 4), np.int32))
    assert len(neighbor_log_probs(empty, 1.0)) == 0
    narrow = Neighbors(np.empty((2, 0), np.float32), np.empty((2, 0), np.int32))
    assert np.all(np.isneginf(target_log_probs(narrow, np.array([0, 1]), 1.0)))
    assert np.all(np.isneginf(neighbor_log_probs(narrow, 1.0).dense(3)))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_must_be_positive_and_finite(temperature: float) -> None:
    with pytest.raises(InvalidRequest, match="temperature must be > 0, got"):
        neighbor_log_probs(make([[(1.0, 0)]], 1), temperature)


def test_shapes_must_agree() -> None:
    with pytest.raises(InvalidRequest, match="one shape"):
        Neighbors(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.int32))
    with pytest.raises(InvalidRequest, match="ids"):
        Neighbors(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int32), np.zeros((2, 2), np.int64))


def with_ids(distances: np.ndarray, ids: np.ndarray) -> Neighbors:
    """Entries whose value is their id modulo 5."""
    values = np.where(ids >= 0, ids % 5, -1).astype(np.int32)
    return Neighbors(distances.astype(np.float32), values, ids.astype(np.int64))


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 8))
def test_merged_shards_equal_the_whole(seed: int, shards: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    all_distances = rng.integers(0, 6, (2, 12)).astype(np.float32)  # small integers: many ties

    def nearest(ids: np.ndarray) -> Neighbors:
        part = all_distances[:, ids]
        order = np.lexsort((np.broadcast_to(ids, part.shape), part), axis=1)[:, :k]
        found = np.full((2, k), -1)
        far = np.full((2, k), FAISS_FAR)
        found[:, : order.shape[1]] = ids[order]
        far[:, : order.shape[1]] = np.take_along_axis(part, order, axis=1)
        return with_ids(far, found)

    whole = nearest(np.arange(12))
    merged = merge([nearest(np.arange(12)[s::shards]) for s in range(shards)], k)
    np.testing.assert_array_equal(merged.distances, whole.distances)
    np.testing.assert_array_equal(merged.values, whole.values)
    assert merged.ids is not None
    np.testing.assert_array_equal(merged.ids, whole.ids)


def test_an_id_found_twice_counts_once() -> None:
    one = with_ids(np.array([[1.0, 2.0]]), np.array([[7, 3]]))
    two = with_ids(np.array([[1.0, FAISS_FAR]]), np.array([[7, -1]]))
    merged = merge([one, two], 4)
    assert merged.ids is not None
    np.testing.assert_array_equal(merged.ids, [[7, 3, -1, -1]])
    np.testing.assert_array_equal(merged.values, [[2, 3, -1, -1]])


def test_nothing_cannot_be_merged() -> None:
    with pytest.raises(InvalidRequest):
        merge([], 3)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 50.0])
def test_counting_into_a_table_equals_sorting(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the low temperature far neighbors' weights underflow: their logarithms stay exact."""
    rng = np.random.default_rng(1)
    neighbors = Neighbors(rng.random((7, 50), np.float32) * 40, rng.integers(-1, 12, (7, 50)).astype(np.int32))
    counted = neighbor_log_probs(neighbors, temperature)
    monkeypatch.setattr("knnlm.neighbors.COUNTED_PLACES", 0)
    by_sorting = neighbor_log_probs(neighbors, temperature)
    np.testing.assert_array_equal(counted.offsets, by_sorting.offsets)
    np.testing.assert_array_equal(counted.tokens, by_sorting.tokens)
    np.testing.assert_allclose(counted.log_masses, by_sorting.log_masses, rtol=1e-12, atol=1e-12)
    assert np.isfinite(counted.log_masses).all()
