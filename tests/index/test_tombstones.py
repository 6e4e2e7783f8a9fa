"""Removed entries: the bits are those of their ranges, and a search finds the nearest of the rest at little cost."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from knnlm.index.exclusion import Exclusion, without
from knnlm.index.tombstones import NO_TOMBSTONES, Tombstones
from tests.index.helpers import clustered
from tests.index.test_exclusion import DIM, Exact, Float32, cases, excluding, twin


def as_removed(exclusion: Exclusion, entries: int) -> Exclusion:
    """What it excludes for every query, as removed from a version of so many entries."""
    removed = Tombstones.of((exclusion.starts, exclusion.ends), entries)
    nothing = np.empty(0, np.int64)
    return replace(exclusion, starts=nothing, ends=nothing, removed=removed)


@pytest.mark.parametrize("entries", [1, 7, 8, 9, 100])
def test_bits_are_those_of_the_ranges(entries: int) -> None:
    rng = np.random.default_rng(entries)
    for _ in range(20):
        edges = np.unique(rng.integers(0, entries + 1, 6))
        edges = edges[: len(edges) // 2 * 2].astype(np.int64)
        expected = np.zeros(entries, np.bool_)
        for start, end in edges.reshape(-1, 2):
            expected[start:end] = True
        removed = Tombstones.of((edges[::2], edges[1::2]), entries)
        np.testing.assert_array_equal(removed.holds(np.arange(entries)), expected)
        assert removed.count == expected.sum()


def test_nothing_is_not_removed() -> None:
    everything = Tombstones.of((np.array([0]), np.array([16])), 16)
    np.testing.assert_array_equal(everything.holds(np.array([[-1, 0], [15, -1]])), [[False, True], [True, False]])
    assert not NO_TOMBSTONES.holds(np.array([[0, -1]])).any()


@given(cases())
def test_removed_entries_are_left_out_however_near_they_lie(case: tuple[Float32, Float32, int, Exclusion]) -> None:
    """All that is shared counts as removed, of which only the expected number is asked for at first."""
    keys, queries, k, exclusion = case
    removing = as_removed(exclusion, len(keys))
    k = min(k, len(keys) - removing.removed.count)
    np.testing.assert_array_equal(removing.counts(), exclusion.counts())
    search = Exact(keys)
    found = without(search, queries, k, removing, len(keys))
    expected = twin(keys, queries, k, exclusion)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_a_tenth_that_was_removed_costs_about_a_tenth() -> None:
    rng = np.random.default_rng(0)
    keys, queries = rng.standard_normal((5000, DIM)).astype(np.float32), clustered(20, DIM, seed=1)
    starts = np.arange(0, 5000, 50)
    removed = excluding([(0, 0)] * 20, [(int(s), int(s) + 5) for s in starts])
    search = Exact(keys)
    found = without(search, queries, 200, as_removed(removed, 5000), 5000)
    np.testing.assert_array_equal(found[1], twin(keys, queries, 200, removed)[1])
    first = {wanted[0] for wanted in search.wanted.values()}
    assert first == {200 + 23 + 16 + 4}  # expected: 200 / 9; three deviations; the margin
    assert sum(len(wanted) for wanted in search.wanted.values()) == 20  # nobody asks again


def test_removed_entries_that_are_all_that_is_near_are_looked_behind() -> None:
    keys = np.concatenate([np.ones((100, DIM), np.float32), np.zeros((100, DIM), np.float32)])
    removed = excluding([(0, 0)], [(100, 200)])
    search = Exact(keys)
    query = np.zeros((1, DIM), np.float32)
    _, ids = without(search, query, 8, as_removed(removed, 200), 200)
    np.testing.assert_array_equal(ids, [np.arange(8)])
    assert search.wanted[query.tobytes()] == [8 + 8 + 12 + 4, 64, 108]
