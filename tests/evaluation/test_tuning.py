"""Fitting, against brute force over dense grids."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.domains import knn_evidence
from knnlm.errors import InvalidRequest
from knnlm.evaluation.tuning import RELATIVE_TOLERANCE, Observations, fit, mean_loss, smallest_k, temperature_scale
from knnlm.messages import LmStatistics
from knnlm.neighbors import Neighbors, target_log_probs
from knnlm.rules import LARGEST_LAMBDA, RULES, best_lambda
from tests.toys import LEVEL, level  # noqa: F401  a fixture

FLT_MAX = float(np.finfo(np.float32).max)


def observe(seed: int = 0, n: int = 60, k: int = 12, scale: float = 30.0, vocabulary: int = 8) -> Observations:
    """Near neighbors often store the right token, far ones seldom; some queries found little or nothing."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(vocabulary, size=n).astype(np.int32)
    distances = np.sort(scale * rng.gamma(2.0, size=(n, k)), axis=1)
    right = rng.random((n, k)) < 0.7 * np.exp(-distances / (2 * scale))
    values = np.where(right, targets[:, None], rng.integers(vocabulary, size=(n, k)))
    missing = np.arange(k) >= rng.choice([0, k // 2, k], p=[0.1, 0.1, 0.8], size=n)[:, None]
    neighbors = Neighbors(
        np.where(missing, FLT_MAX, distances).astype(np.float32), np.where(missing, -1, values).astype(np.int32)
    )
    return Observations(np.log(rng.beta(1, 3, size=n)).astype(np.float32), targets, neighbors, documents=3)


def loss_by_hand(observations: Observations, temperature: float, lmbda: float) -> float:
    """The mixture written out token by token, in probabilities."""
    total = 0.0
    for i, target in enumerate(observations.targets):
        p = float(np.exp(np.float64(observations.lm_log_probs[i])))
        here = observations.neighbors.values[i] >= 0
        if here.any():
            distances = observations.neighbors.distances[i][here].astype(np.float64)
            weights = np.exp(-(distances - distances.min()) / temperature)
            hits = observations.neighbors.values[i][here] == target
            p = (1 - lmbda) * p + lmbda * float(weights[hits].sum() / weights.sum())
        total -= np.log(p)
    return total / len(observations.targets)


@pytest.mark.parametrize(("temperature", "lmbda"), [(1.0, 0.3), (40.0, 0.0), (400.0, 0.9)])
def test_loss_is_the_mixture_token_by_token(temperature: float, lmbda: float) -> None:
    observations = observe()
    assert mean_loss(observations, temperature, lmbda) == pytest.approx(
        loss_by_hand(observations, temperature, lmbda), rel=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40))
def test_lambda_is_the_best_of_a_dense_grid(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    lm = np.log(rng.beta(0.5, 2, size=n))
    knn = np.where(rng.random(n) < 0.3, -np.inf, np.log(rng.beta(0.5, rng.choice([0.3, 3]), size=n)))

    def loss(lmbda: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        p = (1 - lmbda)[:, None] * np.exp(lm) + lmbda[:, None] * np.exp(knn)
        result: npt.NDArray[np.float64] = -np.log(p).mean(axis=1)
        return result

    grid = np.linspace(0, LARGEST_LAMBDA, 2000)
    losses = loss(grid)
    found = best_lambda(lm, knn)
    # the solution is at least as good as every grid point, and lies beside the best one
    assert loss(np.array([found]))[0] <= losses.min() + 1e-12
    flat = grid[losses <= losses.min() + 1e-9]
    assert flat[0] - grid[1] <= found <= flat[-1] + grid[1]


def test_lambda_stays_below_one_when_neighbors_are_always_right() -> None:
    assert best_lambda(np.log([0.1, 0.2]), np.zeros(2)) == LARGEST_LAMBDA


def test_lambda_is_zero_when_neighbors_never_help() -> None:
    assert best_lambda(np.log([0.5, 0.6]), np.array([-np.inf, np.log(0.1)])) == 0.0
    assert best_lambda(np.empty(0), np.empty(0)) == 0.0


def test_lambda_survives_a_token_that_the_model_finds_impossible() -> None:
    found = best_lambda(np.array([-5000.0, -0.1]), np.array([-0.5, -np.inf]))
    assert 0 < found < LARGEST_LAMBDA
    assert found == pytest.approx(0.5, abs=1e-6)  # maximises log(lambda) + log(1 - lambda)


@pytest.mark.parametrize("seed", range(4))
def test_fit_equals_brute_force_over_a_dense_grid(seed: int) -> None:
    observations = observe(seed)
    scale = temperature_scale(observations.neighbors)
    lambdas = np.linspace(0, LARGEST_LAMBDA, 400)
    best = np.inf
    for temperature in scale * np.geomspace(2.0**-10, 2.0**10, 400):
        knn = target_log_probs(observations.neighbors, observations.targets, float(temperature))
        weights = np.where(observations.neighbors.present, lambdas[:, None], 0.0)  # (400, n)
        p = (1 - weights) * np.exp(observations.lm_log_probs.astype(np.float64)) + weights * np.exp(knn)
        best = min(best, float(np.exp(-np.log(p).mean(axis=1)).min()))
    found = fit(observations).tuning
    # the grid has a step of 3.5 % in temperature and .25 % in lambda, the fit is finer: it may only be better
    assert found.knn_perplexity <= best * (1 + 1e-5)
    assert found.knn_perplexity >= best * (1 - 1e-3)
    assert np.log(found.knn_perplexity) == pytest.approx(
        loss_by_hand(observations, found.temperature, found.lmbda), rel=1e-9
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 9), scale=st.sampled_from([1e-3, 1.0, 1e5]))
def test_fit_is_never_worse_than_the_model_alone(seed: int, k: int, scale: float) -> None:
    observations = observe(seed, n=20, k=k, scale=scale)
    result = smallest_k([fit(nearest(observations, 1)), fit(observations)])
    assert result.tuning.knn_perplexity <= result.tuning.lm_perplexity * (1 + 1e-12)
    assert 0 <= result.tuning.lmbda <= LARGEST_LAMBDA
    assert result.tuning.lm_perplexity == pytest.approx(float(np.exp(mean_loss(observations, 1.0, 0.0))), rel=1e-12)
    assert result.tuning.tokens == 20


def test_temperature_follows_the_unit_of_the_distances() -> None:
    observations = observe(1)
    neighbors = observations.neighbors
    present = neighbors.values >= 0
    # a power of two, so that float32 distances are scaled exactly
    scaled = np.where(present, np.where(present, neighbors.distances, 0) * np.float32(4096), neighbors.distances)
    other = fit(replace(observations, neighbors=Neighbors(scaled, neighbors.values))).tuning
    found = fit(observations).tuning
    # the search stops at a relative width of 6e-4, within which the loss is flat to rounding
    assert other.temperature == pytest.approx(4096 * found.temperature, rel=2e-3)
    assert other.lmbda == pytest.approx(found.lmbda, abs=1e-3)


def test_without_any_neighbor_the_model_is_left_alone() -> None:
    observations = observe()
    nothing = Neighbors(observations.neighbors.distances, np.full_like(observations.neighbors.values, -1))
    found = fit(replace(observations, neighbors=nothing)).tuning
    assert found.lmbda == 0
    assert found.knn_perplexity == pytest.approx(found.lm_perplexity, rel=1e-12)


def nearest(observations: Observations, k: int) -> Observations:
    """The same with the k nearest neighbors alone."""
    neighbors = observations.neighbors
    return replace(observations, neighbors=Neighbors(neighbors.distances[:, :k], neighbors.values[:, :k]))


def test_smallest_k_that_is_as_good_wins() -> None:
    observations = observe(2)
    neighbors = observations.neighbors
    far = np.full((len(observations.targets), 4), FLT_MAX / 2, np.float32)  # further neighbors that weigh nothing
    wide = Neighbors(
        np.concatenate([neighbors.distances, far], axis=1),
        np.concatenate([neighbors.values, np.zeros(far.shape, np.int32)], axis=1),
    )
    wider = fit(replace(observations, neighbors=wide))
    narrow, narrowest = fit(observations), fit(nearest(observations, 1))
    assert (wider.tuning.k, narrow.tuning.k, narrowest.tuning.k) == (16, 12, 1)
    assert smallest_k([wider, narrow]).tuning == narrow.tuning
    assert narrowest.tuning.knn_perplexity > narrow.tuning.knn_perplexity * (1 + RELATIVE_TOLERANCE)
    assert smallest_k([narrow, narrowest]).tuning == narrow.tuning


def test_every_k_is_in_the_curve() -> None:
    curve = smallest_k([fit(observe()), fit(nearest(observe(), 4))]).curve
    assert {point.k for point in curve} == {4, 12}
    temperatures = [point.temperature for point in curve if point.k == 4]
    assert temperatures == sorted(temperatures)
    assert len(temperatures) >= 21


def test_scale_falls_back_where_distances_do_not_differ() -> None:
    one = np.array([[7.0], [9.0], [11.0]], np.float32)
    assert temperature_scale(Neighbors(one, np.zeros((3, 1), np.int32))) == 9.0
    assert temperature_scale(Neighbors(0 * one, np.zeros((3, 1), np.int32))) == 1.0
    assert temperature_scale(Neighbors(one, np.full((3, 1), -1, np.int32))) == 1.0


def test_scale_ignores_padding() -> None:
    neighbors = Neighbors(np.array([[1.0, 3.0, FLT_MAX]], np.float32), np.array([[0, 0, -1]], np.int32))
    assert temperature_scale(neighbors) == 1.0  # the median of 0 and 2


def test_observations_must_agree_in_length() -> None:
    observations = observe()
    with pytest.raises(InvalidRequest, match="expected one or more observed tokens"):
        replace(observations, targets=observations.targets[1:])


@pytest.mark.usefixtures("level")
def test_another_rule_is_fitted_through_the_table_and_measured_as_it_is_served() -> None:
    observations = observe(5)
    with pytest.raises(InvalidRequest, match="looks at statistics of the LM"):
        fit(observations, LEVEL)
    rng = np.random.default_rng(1)
    n = len(observations.targets)
    statistics = LmStatistics(rng.uniform(0.1, 3, n), np.log(rng.uniform(0.1, 1, n)))
    found = fit(replace(observations, statistics=statistics), LEVEL).tuning
    assert found.rule == LEVEL
    neighbors, targets = observations.neighbors, observations.targets
    evidence = knn_evidence(neighbors, found.temperature, targets, RULES[LEVEL].features)
    weight = np.where(neighbors.present, RULES[LEVEL].weights(evidence, statistics, found.parameters), 0)
    knn = np.exp(target_log_probs(neighbors, targets, found.temperature))
    p = (1 - weight) * np.exp(observations.lm_log_probs.astype(np.float64)) + weight * knn
    np.testing.assert_allclose(found.knn_perplexity, np.exp(-np.log(p).mean()), rtol=1e-6)
    assert found.lmbda == fit_lambda(observations, found.temperature)
    assert fit(observations).tuning.parameters == {}


def fit_lambda(observations: Observations, temperature: float) -> float:
    knn = target_log_probs(observations.neighbors, observations.targets, temperature)
    present = observations.neighbors.present
    return best_lambda(observations.lm_log_probs[present], knn[present])
