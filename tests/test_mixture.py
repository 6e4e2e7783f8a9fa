"""Interpolation, against the formula in probability space."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InvalidRequest
from knnlm.mixture import Component, mix
from knnlm.neighbors import Neighbors, neighbor_log_probs


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def whole(mixed: Component) -> np.ndarray:
    assert isinstance(mixed.log_probs, np.ndarray)
    return mixed.log_probs


def random_log_probs(seed: int, n: int = 3, vocab: int = 6) -> np.ndarray:
    return log_softmax(np.random.default_rng(seed).normal(size=(n, vocab)) * 4)


def component(seed: int, weight: float, n: int = 3) -> Component:
    return Component(f"c{seed}", random_log_probs(seed, n), np.full(n, weight))


@given(st.lists(st.floats(0, 1), max_size=4))
def test_mixture_equals_the_formula_and_sums_to_one(weights: list[float]) -> None:
    total = sum(weights)
    weights = [w / total * 0.99 for w in weights] if total > 0.99 else weights
    lm = random_log_probs(0)
    parts = [component(i + 1, w) for i, w in enumerate(weights)]
    expected = (1 - sum(weights)) * np.exp(lm) + sum(w * np.exp(whole(c)) for w, c in zip(weights, parts, strict=True))
    mixed = mix(lm, parts)
    np.testing.assert_allclose(np.exp(mixed), expected, rtol=1e-12)
    np.testing.assert_allclose(np.exp(mixed).sum(axis=1), 1, rtol=1e-12)


def test_lambda_zero_is_exactly_the_lm() -> None:
    lm = random_log_probs(0)
    np.testing.assert_array_equal(mix(lm, [component(1, 0.0)]), lm)
    np.testing.assert_array_equal(mix(lm, []), lm)


def test_lambda_one_is_exactly_the_component() -> None:
    knn = Component("knn", np.array([[-np.inf, 0.0, -np.inf]]), np.ones(1))
    np.testing.assert_array_equal(mix(random_log_probs(0, 1, 3), [knn]), knn.log_probs)


def test_a_token_without_neighbors_keeps_the_lm_share_only() -> None:
    lm = np.log(np.array([[0.5, 0.5]]))
    knn = Component("knn", np.array([[0.0, -np.inf]]), np.array([0.25]))
    np.testing.assert_allclose(np.exp(mix(lm, [knn])), [[0.625, 0.375]], rtol=1e-15)


def test_targets_mix_as_distributions_do() -> None:
    lm, knn = random_log_probs(0), component(1, 0.3)
    targets = np.array([2, 0, 5])
    rows = np.arange(3)
    one = mix(lm[rows, targets], [Component("c", whole(knn)[rows, targets], knn.weight)])
    np.testing.assert_allclose(one, mix(lm, [knn])[rows, targets], rtol=1e-15)


@pytest.mark.parametrize("weight", [-0.1, 1.1, np.nan])
def test_weights_outside_the_unit_interval_are_refused(weight: float) -> None:
    with pytest.raises(InvalidRequest, match=r"lambda of c1 must lie in \[0, 1\]"):
        mix(random_log_probs(0), [component(1, weight)])


def test_weights_over_one_together_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"add up to 1\.2"):
        mix(random_log_probs(0), [component(1, 0.6), component(2, 0.6)])


def test_shapes_must_agree() -> None:
    with pytest.raises(InvalidRequest, match="expected"):
        mix(random_log_probs(0), [component(1, 0.5, n=2)])


def test_masses_are_mixed_as_the_rows_that_they_stand_for() -> None:
    rng = np.random.default_rng(3)
    neighbors = Neighbors(rng.random((6, 20), np.float32), rng.integers(-1, 6, (6, 20)).astype(np.int32))
    masses = neighbor_log_probs(neighbors, 0.5)
    lm, weight = random_log_probs(0, 6), rng.random(6)
    weight[:2] = 0, 1
    sparse = mix(lm, [Component("knn", masses, weight)])
    np.testing.assert_array_equal(sparse, mix(lm, [Component("knn", masses.dense(6), weight)]))
    with pytest.raises(InvalidRequest, match="expected"):
        mix(lm[:5], [Component("knn", masses, weight)])
