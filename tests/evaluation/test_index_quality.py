"""What is said about an index's answers, against twins that go through queries and tokens one by one."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InvalidRequest
from knnlm.evaluation import index_quality
from knnlm.evaluation.collect import HeldOut
from knnlm.evaluation.index_quality import judge, recall, total_variation
from knnlm.evaluation.tuning import Observations, fit
from knnlm.neighbors import Neighbors


def some(rng: np.random.Generator, n: int, k: int, *, missing: float = 0.2) -> Neighbors:
    """Neighbors with few values, so that several store one token, and with padding."""
    ids = np.stack([rng.permutation(3 * k)[:k] for _ in range(n)]).astype(np.int64)
    values = (ids % 5).astype(np.int32)
    distances = np.sort(rng.uniform(0, 9, (n, k)), axis=1).astype(np.float32)
    gone = rng.random((n, k)) < missing
    return Neighbors(distances, np.where(gone, -1, values), np.where(gone, -1, ids))


def distribution(neighbors: Neighbors, row: int, temperature: float) -> dict[int, float]:
    weights: dict[int, float] = {}
    for distance, value in zip(neighbors.distances[row], neighbors.values[row], strict=True):
        if value >= 0:
            weights[int(value)] = weights.get(int(value), 0.0) + math.exp(-float(distance) / temperature)
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def brute_total_variation(found: Neighbors, exact: Neighbors, temperature: float) -> float:
    rows = []
    for row in range(len(found.values)):
        p, q = distribution(found, row, temperature), distribution(exact, row, temperature)
        if bool(p) != bool(q):
            rows.append(1.0)
        else:
            rows.append(sum(abs(p.get(t, 0.0) - q.get(t, 0.0)) for t in p.keys() | q.keys()) / 2)
    return sum(rows) / len(rows)


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 6), st.floats(0.2, 50))
def test_total_variation_equals_its_twin(seed: int, n: int, k: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    found, exact = some(rng, n, k), some(rng, n, k)
    expected = brute_total_variation(found, exact, temperature)
    assert total_variation(found, exact, temperature) == pytest.approx(expected, abs=1e-9)


def test_total_variation_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    found, exact = some(rng, 50, 4), some(rng, 50, 4)
    whole = total_variation(found, exact, 2.0)
    monkeypatch.setattr(index_quality, "CHUNK", 12)
    assert total_variation(found, exact, 2.0) == pytest.approx(whole, abs=1e-12)


def test_the_same_neighbors_vary_by_nothing_and_others_by_all() -> None:
    here = Neighbors(np.zeros((1, 2), np.float32), np.array([[1, 2]], np.int32))
    there = Neighbors(np.zeros((1, 2), np.float32), np.array([[3, 4]], np.int32))
    none = Neighbors(np.zeros((1, 2), np.float32), np.array([[-1, -1]], np.int32))
    assert total_variation(here, here, 1.0) == 0
    assert total_variation(here, there, 1.0) == pytest.approx(1)
    assert total_variation(here, none, 1.0) == total_variation(none, here, 1.0) == 1
    assert total_variation(none, none, 1.0) == 0


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 6))
def test_recall_equals_its_twin(seed: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    found, exact = some(rng, n, 6), some(rng, n, 6)
    assert found.ids is not None
    assert exact.ids is not None
    hits = total = 0
    for mine, theirs in zip(found.ids[:, :k], exact.ids[:, :k], strict=True):
        wanted = {int(i) for i in theirs if i >= 0}
        hits += len(wanted & {int(i) for i in mine})
        total += len(wanted)
    assert recall(found, exact, k) == pytest.approx(hits / total if total else 1.0)


def test_padding_on_both_sides_is_no_hit() -> None:
    ids = np.array([[7, -1, -1]], np.int64)
    here = Neighbors(np.zeros((1, 3), np.float32), ids.astype(np.int32), ids)
    other = Neighbors(np.zeros((1, 3), np.float32), ids.astype(np.int32), np.array([[8, -1, -1]]))
    assert recall(here, here, 3) == 1
    assert recall(here, other, 3) == 0


def test_recall_needs_ids() -> None:
    without = Neighbors(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int32))
    with pytest.raises(InvalidRequest, match="ids"):
        recall(without, without, 1)


def test_quality_has_the_perplexity_of_what_was_found_and_the_temperature_it_was_given() -> None:
    rng = np.random.default_rng(1)
    found, exact = some(rng, 200, 6), some(rng, 200, 6, missing=0)
    targets = np.where(rng.random(200) < 0.8, np.maximum(found.values[:, 0], 0), 4).astype(np.int32)
    held_out = HeldOut(np.zeros((200, 2), np.float32), np.full(200, -2.0, np.float32), targets, 3)
    quality = judge(found, exact, held_out, (2, 6), 3.0)
    tuning = fit(Observations(held_out.lm_log_probs, targets, found, 3)).tuning
    assert (quality.perplexity, quality.temperature, quality.lmbda) == (
        tuning.knn_perplexity, tuning.temperature, tuning.lmbda,
    )  # fmt: skip
    assert quality.perplexity < tuning.lm_perplexity
    assert quality.recalls == {2: recall(found, exact, 2), 6: recall(found, exact, 6)}
    assert quality.total_variation == total_variation(found, exact, 3.0)
