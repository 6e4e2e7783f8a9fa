"""Lambda rules: weights, fitting, and how several sources share what there is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.domains import knn_evidence
from knnlm.errors import InvalidRequest
from knnlm.evidence import Evidence
from knnlm.messages import LmStatistics
from knnlm.neighbors import Neighbors
from knnlm.rules import LARGEST_LAMBDA, RULES, Observed, Weighing, best_lambda, shared
from tests.toys import LEVEL, level  # noqa: F401  a fixture

NEIGHBORS = Neighbors(
    np.array([[1, 4], [3e38, 3e38], [2, 2]], np.float32), np.array([[0, 1], [-1, -1], [5, 5]], np.int32)
)
TARGETS = np.array([0, 0, 5], np.int32)
LM = LmStatistics(np.array([1.0, 2.0, 3.0]), np.log([0.5, 0.4, 0.3]))
OBSERVED = Observed(
    np.log([0.1, 0.2, 0.3]), knn_evidence(NEIGHBORS, 1.0, TARGETS, ("nearest", "count", "agreement")), LM
)


@pytest.mark.parametrize("name", [*RULES, LEVEL])
@pytest.mark.usefixtures("level")
def test_every_rule_weighs_with_what_it_fitted_and_nothing_where_nothing_was_found(name: str) -> None:
    parameters = RULES[name].fit(OBSERVED)
    weights = Weighing(name, parameters).weights(OBSERVED.evidence, LM)
    assert weights.shape == (3,)
    assert weights[1] == 0.0
    assert ((weights >= 0) & (weights <= 1)).all()


def test_the_fixed_rule_is_fitted_to_what_was_found() -> None:
    lmbda = RULES["fixed"].fit(OBSERVED)["lambda"]
    log_probs = OBSERVED.evidence.log_probs
    assert isinstance(log_probs, np.ndarray)
    assert lmbda == best_lambda(OBSERVED.lm_log_probs[[0, 2]], log_probs[[0, 2]])


def test_unknown_rule_lists_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="unknown rule 'x'; known: fixed") as caught:
        Weighing("x", {})
    assert caught.value.param == "rule"


def test_features_are_those_of_brute_force() -> None:
    features = OBSERVED.evidence.features
    np.testing.assert_array_equal(features["nearest"], [1, np.inf, 2])
    np.testing.assert_array_equal(features["count"], [2, 0, 2])
    np.testing.assert_allclose(features["agreement"], [1 / (1 + np.exp(-3.0)), 0, 1])
    with pytest.raises(InvalidRequest, match="neighbors have no 'colour'"):
        knn_evidence(NEIGHBORS, 1.0, TARGETS, ("colour",))


@given(st.lists(st.floats(0, LARGEST_LAMBDA), min_size=1, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4))
def test_weights_of_several_sources_leave_something_to_the_lm(weights: list[float], asked: list[bool]) -> None:
    asked = asked[: len(weights)]
    if sum(w for w, mine in zip(weights, asked, strict=True) if mine) > 1:
        return  # refused in the plan
    found = shared([np.array([w]) for w in weights], asked)
    total = sum(float(w[0]) for w in found)
    assert total <= 1 + 1e-9
    for w, mine, after in zip(weights, asked, found, strict=True):
        assert after[0] == w if mine else after[0] <= w
    if sum(weights) <= LARGEST_LAMBDA or all(asked):
        assert [float(w[0]) for w in found] == weights
    elif not any(asked):
        np.testing.assert_allclose(total, LARGEST_LAMBDA)
        for w, after in zip(weights, found, strict=True):  # all by the same factor
            np.testing.assert_allclose(after[0] * sum(weights), w * LARGEST_LAMBDA, rtol=1e-9, atol=1e-300)


def test_only_the_rows_that_are_crowded_are_shared_out() -> None:
    first, second = shared([np.array([0.3, 0.8]), np.array([0.4, 0.8])], [False, False])
    assert (first[0], second[0]) == (0.3, 0.4)
    np.testing.assert_allclose([first[1], second[1]], [LARGEST_LAMBDA / 2] * 2)


@given(
    st.lists(st.floats(0, LARGEST_LAMBDA), min_size=2, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.integers(0, 3),
)
def test_a_little_more_of_one_weight_changes_the_others_a_little(
    direction: list[float], asked: list[bool], changed: int
) -> None:
    """Also where the sum passes LARGEST_LAMBDA, which the weights are brought to here."""
    asked = asked[: len(direction)]
    if sum(direction) < 0.5:
        return
    before = [w * LARGEST_LAMBDA / sum(direction) for w in direction]
    step = 1e-6
    after = [w + step * (i == changed % len(direction)) for i, w in enumerate(before)]
    found = [np.concatenate(shared([np.array([w]) for w in weights], asked)) for weights in (before, after)]
    np.testing.assert_allclose(found[0], found[1], atol=2 * step)


def test_where_the_asked_weights_leave_nothing_the_fitted_have_none() -> None:
    first, second = shared([np.array([1.0, 0.99, 1.0]), np.array([0.5, 0.5, 0.0])], [True, False])
    np.testing.assert_array_equal(first, [1.0, 0.99, 1.0])
    np.testing.assert_array_equal(second, [0.0, 0.0, 0.0])


def test_a_rule_is_fitted_to_targets() -> None:
    with pytest.raises(TypeError, match="there are no targets"):
        RULES["fixed"].fit(Observed(OBSERVED.lm_log_probs, knn_evidence(NEIGHBORS, 1.0)))


def test_a_single_weight_of_one_stays_one() -> None:
    evidence = Evidence(np.array([True]), np.array([-1.0]))
    weights = Weighing("fixed", {"lambda": 1.0}, asked=True).weights(evidence, None)
    np.testing.assert_array_equal(shared([weights], [True])[0], [1.0])
