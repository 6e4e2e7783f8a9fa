"""Weights of several components, against a search of all of them and against the one that is solved."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.errors import InvalidRequest
from knnlm.mixture import Component, mix
from knnlm.rules import LARGEST_LAMBDA, best_lambda
from knnlm.weights import fit_weights

Floats = npt.NDArray[np.float64]


def observed(n: int, c: int, seed: int) -> tuple[Floats, list[Floats], list[npt.NDArray[np.bool_]]]:
    """Log-probabilities of n tokens: each component is good at other ones, knows nothing of some, and is absent at
    others."""
    rng = np.random.default_rng(seed)
    lm = np.log(rng.uniform(0.01, 0.6, n))
    found = []
    for _ in range(c):
        log_probs = np.log(rng.uniform(0.001, 0.9, n))
        log_probs[rng.random(n) < 0.2] = -np.inf
        found.append(log_probs)
    return lm, found, [rng.random(n) < 0.9 for _ in range(c)]


def loss(lm: Floats, found: list[Floats], present: list[npt.NDArray[np.bool_]], weights: tuple[float, ...]) -> float:
    """In nats, as serving mixes."""
    components = [
        Component(str(i), np.where(there, log_probs, -np.inf), np.where(there, weight, 0.0))
        for i, (log_probs, there, weight) in enumerate(zip(found, present, weights, strict=True))
    ]
    return -float(mix(lm, components).mean())


@pytest.mark.parametrize("seed", range(3))
def test_two_components_are_weighed_as_by_trying_all_weights(seed: int) -> None:
    given = observed(300, 2, seed)
    weights, found = fit_weights(*given)
    grid = np.linspace(0, LARGEST_LAMBDA, 100)
    tried = {w: loss(*given, w) for w in itertools.product(grid.tolist(), repeat=2) if sum(w) <= LARGEST_LAMBDA}
    best = min(tried, key=lambda w: tried[w])
    assert found <= tried[best] + 1e-9
    assert found == pytest.approx(loss(*given, tuple(weights.tolist())), abs=1e-12)
    np.testing.assert_allclose(weights, best, atol=0.011)


@pytest.mark.parametrize("seed", range(3))
def test_one_component_weighs_what_is_solved(seed: int) -> None:
    lm, found, _ = observed(500, 1, seed)
    weights, _ = fit_weights(lm, found, [np.ones(500, np.bool_)])
    assert weights[0] == pytest.approx(best_lambda(lm, found[0]), abs=1e-3)


def test_a_component_that_says_what_another_says_gets_a_share_of_it() -> None:
    lm, (one,), (there,) = observed(400, 1, 5)
    alone, before = fit_weights(lm, [one], [there])
    both, after = fit_weights(lm, [one, one], [there, there])
    assert both.sum() == pytest.approx(float(alone[0]), abs=1e-3)
    assert after == pytest.approx(before, abs=1e-6)


def test_what_does_not_help_weighs_nothing_and_what_knows_all_leaves_the_lm_a_little() -> None:
    n = 200
    lm, everywhere = np.log(np.full(n, 0.5)), np.ones(n, np.bool_)
    useless, perfect = np.log(np.full(n, 0.1)), np.zeros(n)
    weights, found = fit_weights(lm, [useless, perfect], [everywhere, everywhere])
    np.testing.assert_allclose(weights, [0, LARGEST_LAMBDA], atol=1e-6)
    assert found == pytest.approx(-np.log(0.99 + 0.005), abs=1e-6)
    assert fit_weights(lm, [], [])[1] == pytest.approx(np.log(2))


def test_without_a_token_nothing_is_fitted() -> None:
    with pytest.raises(InvalidRequest, match="got none"):
        fit_weights(np.empty(0), [np.empty(0)], [np.empty(0, np.bool_)])
