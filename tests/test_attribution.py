"""Carriers of tokens and shares of documents, against loops over every neighbor."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm import attribution
from knnlm.attribution import Carrier, Carriers, carriers, document_shares
from knnlm.errors import InvalidRequest
from knnlm.messages import Passage
from knnlm.neighbors import Neighbors

NONE = np.empty(0, np.int32)


def neighbors(n: int, k: int, rng: np.random.Generator) -> Neighbors:
    """Of few tokens and few distances, so that there are ties; padded here and there."""
    values = rng.integers(-1, 4, (n, k)).astype(np.int32)
    distances = np.sort(rng.integers(0, 6, (n, k)), axis=1).astype(np.float32)
    distances[values < 0] = np.finfo(np.float32).max
    ids = np.where(values >= 0, rng.permutation(10 * n * k)[: n * k].reshape(n, k), -1)
    return Neighbors(distances, values, ids)


def by_hand(parts: list[Neighbors], targets: Any, temperature: float, count: int) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for i, target in enumerate(targets):
        storing = [
            (float(part.distances[i, j]), p, int(part.ids[i, j]))
            for p, part in enumerate(parts)
            if part.ids is not None
            for j in range(part.values.shape[1])
            if part.values[i, j] == target
        ]
        total = sum(np.exp(-distance / temperature) for distance, _, _ in storing)
        nearest = sorted(storing, key=lambda s: s[0])[:count]
        rows += [(i, p, entry, d, np.exp(-d / temperature) / total) for d, p, entry in nearest]
    return rows


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 7), st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(1, 4))
def test_carriers_equal_a_loop_over_every_neighbor(seed: int, n: int, widths: list[int], count: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [neighbors(n, k, rng) for k in widths]
    targets = rng.integers(0, 5, n).astype(np.int32)
    found = carriers(parts, targets, 1.5, count)
    expected = by_hand(parts, targets, 1.5, count)
    assert found.entries.dtype == np.int64
    shown = list(zip(*(column.tolist() for column in vars(found).values()), strict=True))
    assert [row[:4] for row in shown] == [row[:4] for row in expected]
    np.testing.assert_allclose(found.shares, [row[4] for row in expected], rtol=1e-12)


def test_rows_are_looked_at_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    parts, targets = [neighbors(50, 7, rng), neighbors(50, 2, rng)], rng.integers(0, 4, 50).astype(np.int32)
    whole = carriers(parts, targets, 2.0, 2)
    monkeypatch.setattr(attribution, "BLOCK_NUMBERS", 30)
    for name, column in vars(carriers(parts, targets, 2.0, 2)).items():
        np.testing.assert_array_equal(column, getattr(whole, name))


def test_shares_survive_far_and_near_temperatures() -> None:
    some = Neighbors(
        np.array([[3e5, 3e5, 4e5, 3e38]], np.float32), np.array([[7, 7, 7, 7]], np.int32), np.array([[1, 2, 3, 4]])
    )
    for temperature in (1e-100, 1e-3, 1e3):
        found = carriers([some], np.array([7]), temperature, 4)
        np.testing.assert_allclose(found.shares, [0.5, 0.5, 0, 0], atol=1e-12)
    np.testing.assert_allclose(carriers([some], np.array([7]), 1e100, 4).shares, 0.25)


def test_neighbors_without_ids_are_refused() -> None:
    some = Neighbors(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int32))
    with pytest.raises(InvalidRequest, match="neighbors have no ids"):
        carriers([some], np.array([0]), 1.0, 1)


def test_nothing_is_carried_where_nothing_was_found() -> None:
    nothing = Neighbors(np.empty((3, 0), np.float32), np.empty((3, 0), np.int32), np.empty((3, 0), np.int64))
    found: Carriers = carriers([nothing], np.array([1, 2, 3]), 1.0, 2)
    assert [len(column) for column in vars(found).values()] == [0] * 5


def carrier(document: str, share: float, domain: str = "law") -> Carrier:
    return Carrier(domain, Passage(document, 0, 1, NONE, NONE), 1.0, share)


def test_documents_are_summed_over_tokens_and_components() -> None:
    """Token 0: 0.5 x 0.4 and 0.1 x 0.2; token 1: 0.5 x 0.1, half of which nobody asked about; token 2: nothing."""
    law = (
        np.array([0.5, 0.5, 0.0]),
        np.log(np.array([0.4, 0.1, 1.0])),
        [[carrier("a", 0.75), carrier("b", 0.25)], [carrier("b", 0.3), carrier("b", 0.2)], []],
    )
    with np.errstate(divide="ignore"):
        news = (np.array([0.1, 0.1, 0.1]), np.log([0.2, 0, 0]), [[carrier("a", 1.0, "news")], [], []])
    shares = document_shares([law, news])
    assert [(s.domain, s.document, s.tokens) for s in shares] == [("law", "a", 1), ("law", "b", 2), ("news", "a", 1)]
    np.testing.assert_allclose([s.probability for s in shares], [0.15, 0.05 + 0.025, 0.02])
    np.testing.assert_allclose([s.share for s in shares], np.array([0.15, 0.075, 0.02]) / 0.27)
    assert document_shares([]) == []


def test_documents_that_gave_nothing_have_no_share() -> None:
    (only,) = document_shares([(np.zeros(1), np.zeros(1), [[carrier("a", 1.0)]])])
    assert (only.probability, only.share, only.tokens) == (0.0, 0.0, 1)
