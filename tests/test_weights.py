"""Weights of several components, against a search of all of them and against the one that is solved."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.errors import InvalidRequest
from knnlm.evidence import Evidence
from knnlm.messages import LmStatistics
from knnlm.mixture import Component, mix
from knnlm.rules import LARGEST_LAMBDA, Observed, Weighing, best_lambda, softmax
from knnlm.weights import fit_gates, fit_weights

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


def test_where_the_lm_is_worth_less_than_it_keeps_the_best_weights_beside_that_are_found() -> None:
    """Of rare tokens the second component knows a little more than the LM, which has a hundredth all the same."""
    n, rare = 1000, np.arange(1000) < 20
    lm = np.log(np.where(rare, 0.2, 1e-9))
    found = [np.log(np.where(rare, 1e-9, 0.9)), np.log(np.where(rare, 0.25, 1e-9)), np.log(np.full(n, 1e-9))]
    present = [np.ones(n, np.bool_)] * 3
    weights, reached = fit_weights(lm, found, present)
    assert weights.sum() == pytest.approx(LARGEST_LAMBDA)
    assert reached == pytest.approx(loss(lm, found, present, tuple(weights.tolist())), abs=1e-9)
    grid = np.linspace(0, 0.1, 401).tolist()
    tried = {b: loss(lm, found, present, (LARGEST_LAMBDA - b, b, 0.0)) for b in grid}
    assert weights[1] == pytest.approx(min(grid, key=lambda b: tried[b]), abs=5e-4)
    assert reached <= min(tried.values()) + 1e-6
    in_proportion = LARGEST_LAMBDA * 0.02
    assert reached < loss(lm, found, present, (LARGEST_LAMBDA - in_proportion, in_proportion, 0.0)) - 1e-3


def test_gates_of_several_components_beat_their_weights_where_there_is_something_to_see() -> None:
    rng = np.random.default_rng(7)
    n = 3000
    lm = np.log(rng.beta(1, 3, n))
    statistics = LmStatistics(rng.uniform(0.1, 3, n), -rng.uniform(0.1, 3, n))
    seen = []
    for _ in range(2):
        nearest = rng.gamma(2.0, size=n)
        right = np.log(np.clip(np.exp(-nearest) + rng.uniform(0, 0.1, n), 1e-6, 1))
        features = {"nearest": nearest, "nearness": rng.uniform(size=n), "agreement": rng.uniform(size=n)}
        evidence = Evidence(rng.random(n) < 0.9, right, {**features, "distinct": np.ones(n)})
        seen.append(Observed(lm, evidence, statistics, np.arange(n) // 100))
    present = [s.evidence.present for s in seen]
    weights, fixed = fit_weights(lm, [s.evidence.of_targets for s in seen], present)
    gates = fit_gates(seen, weights.tolist())
    alone = [Weighing("gate", g).weights(s.evidence, statistics) for g, s in zip(gates, seen, strict=True)]
    components = [
        Component(str(i), s.evidence.of_targets, w) for i, (s, w) in enumerate(zip(seen, softmax(alone), strict=True))
    ]
    assert -float(mix(lm, components).mean()) < fixed - 0.05


def test_without_a_token_nothing_is_fitted() -> None:
    with pytest.raises(InvalidRequest, match="got none"):
        fit_weights(np.empty(0), [np.empty(0)], [np.empty(0, np.bool_)])
