"""Lambda rules: weights, fitting, and how several sources share what there is."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from knnlm import rules
from knnlm.domains import FEATURES, knn_evidence
from knnlm.errors import InvalidRequest
from knnlm.evidence import Evidence
from knnlm.messages import LmStatistics
from knnlm.neighbors import Neighbors
from knnlm.rules import LARGEST_LAMBDA, RULES, Observed, Weighing, best_lambda, buckets, shared, skipping
from tests.toys import LEVEL, level  # noqa: F401  a fixture

NEIGHBORS = Neighbors(
    np.array([[1, 4], [3e38, 3e38], [2, 2]], np.float32), np.array([[0, 1], [-1, -1], [5, 5]], np.int32)
)
TARGETS = np.array([0, 0, 5], np.int32)
LM = LmStatistics(np.array([1.0, 2.0, 3.0]), np.log([0.5, 0.4, 0.3]))
OBSERVED = Observed(np.log([0.1, 0.2, 0.3]), knn_evidence(NEIGHBORS, 1.0, TARGETS, tuple(FEATURES)), LM)


def observed(seed: int, n: int, documents: int = 10) -> Observed:
    """Of n tokens: near neighbors are often right, the more so where the LM is unsure; some queries found nothing."""
    rng = np.random.default_rng(seed)
    nearest, entropy = rng.gamma(2.0, size=n), rng.uniform(0.1, 5, n)
    distances = np.sort(nearest[:, None] + rng.gamma(1.0, size=(n, 6)), axis=1).astype(np.float32)
    targets = rng.integers(8, size=n).astype(np.int32)
    right = rng.random((n, 6)) < (0.9 * np.exp(-nearest / 2) * entropy / 5)[:, None]
    values = np.where(right, targets[:, None], rng.integers(8, size=(n, 6))).astype(np.int32)
    values[rng.random(n) < 0.1] = -1
    lm = LmStatistics(entropy, -entropy / 2)
    evidence = knn_evidence(Neighbors(distances, values), 1.0, targets, tuple(FEATURES))
    log_probs = np.log(rng.beta(1, 2, n)) - entropy / 3
    return Observed(log_probs, evidence, lm, np.arange(n) * documents // max(n, 1))


def loss(name: str, parameters: rules.Parameters, seen: Observed) -> float:
    """By hand, in probabilities."""
    weights = Weighing(name, parameters).weights(seen.evidence, seen.lm)
    p = (1 - weights) * np.exp(seen.lm_log_probs) + weights * np.exp(seen.evidence.of_targets)
    return -float(np.log(p).mean())


@pytest.mark.parametrize("name", [*RULES, LEVEL])
@pytest.mark.usefixtures("level")
def test_every_rule_weighs_with_what_it_fitted_and_nothing_where_nothing_was_found(name: str) -> None:
    parameters = RULES[name].fit(OBSERVED)
    weights = Weighing(name, parameters).weights(OBSERVED.evidence, LM)
    assert weights.shape == (3,)
    assert weights[1] == 0.0
    assert ((weights >= 0) & (weights <= 1)).all()


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.sampled_from([0, 1, 7, 60, 1000]))
@example(seed=1, n=1)  # a gate that stands at its end: slopes whose squares are zero
def test_no_rule_is_worse_than_one_lambda_on_what_it_was_fitted_to(name: str, seed: int, n: int) -> None:
    seen = observed(seed, n)
    if not n:
        RULES[name].fit(seen)  # nothing to see is no error
        return
    parameters = RULES[name].fit(seen)
    fixed = RULES["fixed"].fit(seen)
    assert loss(name, parameters, seen) <= loss("fixed", fixed, seen) + 1e-9
    assert parameters == RULES[name].fit(seen)  # and it finds the same again


@pytest.mark.parametrize("name", ["bins", "relative", "gate", "gate_lm"])
def test_rules_that_look_are_better_on_new_documents_where_there_is_something_to_see(name: str) -> None:
    old, new = observed(0, 4000), observed(1, 4000)
    fixed = loss("fixed", RULES["fixed"].fit(old), new)
    assert loss(name, RULES[name].fit(old), new) < fixed - 0.005


def test_buckets_are_the_best_falling_lambdas_of_a_dense_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "PRIOR_TOKENS", 0)
    grid = np.linspace(0, LARGEST_LAMBDA, 60)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        nearest, ratio = np.sort(rng.gamma(2.0, size=40)), np.expm1(rng.normal(0, 2, 40))
        edges, lambdas = buckets(nearest, ratio, 3)
        assert (np.diff(lambdas) <= 0).all()
        of = np.searchsorted(edges, nearest)
        losses = np.stack([-np.log1p(grid[:, None] * ratio[of == b]).sum(axis=1) for b in range(3)])  # (3, grid)
        falling = np.tril(np.ones((60, 60), np.bool_))  # [i, j]: grid[i] >= grid[j]
        total = np.where(
            falling[:, :, None] & falling[None], losses[0][:, None, None] + losses[1][:, None] + losses[2], np.inf
        )
        ours = -float(np.log1p(lambdas[of] * ratio).sum())
        assert total.min() - 0.05 < ours < total.min() + 1e-9


def test_small_buckets_lean_towards_the_lambda_of_all_and_large_ones_may_rise() -> None:
    nearest = np.arange(8000.0)
    ratio = np.where(nearest < 4000, -0.5, 3.0)  # retrieval helps far away only
    _, lambdas = buckets(nearest[2000:6000], ratio[2000:6000], 4)
    assert len(set(lambdas)) == 1
    edges, lambdas = buckets(nearest, ratio, 2)
    overall = best_lambda(np.zeros(8000), np.log1p(ratio))
    np.testing.assert_allclose(lambdas, (4000 * np.array([0, LARGEST_LAMBDA]) + 200 * overall) / 4200)
    assert edges.tolist() == [3999.5]


def test_the_weight_of_relative_falls_with_the_distance_of_the_nearest_neighbor() -> None:
    seen = observed(0, 4000)
    weights = Weighing("relative", RULES["relative"].fit(seen)).weights(seen.evidence, None)
    there = seen.evidence.present
    order = np.argsort(seen.evidence.features["nearness"][there])
    assert (np.diff(weights[there][order]) <= 0).all()
    assert weights[there].max() <= LARGEST_LAMBDA


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_a_rule_that_decides_early_can_leave_out_a_share_of_the_searches(share: float) -> None:
    seen = observed(0, 2000)
    parameters = RULES["gate_lm"].fit(seen)
    weighing = Weighing("gate_lm", skipping("gate_lm", parameters, seen, share))
    wanted = weighing.wanted(seen.lm)
    assert wanted is not None
    assert 1 - wanted.mean() == pytest.approx(share, abs=1e-3)
    assert 1 - wanted.mean() <= share + 1e-12
    np.testing.assert_array_equal(weighing.weights(seen.evidence, seen.lm) > 0, wanted & seen.evidence.present)
    assert weighing.wanted(None) is None
    if share:  # what is left out is what would gain least
        gained = np.log1p(Weighing("gate_lm", parameters).weights(seen.evidence, seen.lm) * seen.ratio)
        assert gained[~wanted].mean() < gained[wanted].mean()
    kept = Weighing("gate_lm", parameters).weights(seen.evidence, seen.lm)[wanted]
    np.testing.assert_array_equal(weighing.weights(seen.evidence, seen.lm)[wanted], kept)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_rule_that_decides_early_sees_in_the_key_where_retrieval_helps(share: float) -> None:
    def with_keys(seed: int) -> Observed:
        seen = observed(seed, 3000)
        assert seen.lm is not None
        near = np.where(seen.evidence.present, seen.evidence.features["nearest"], 0.0)
        noise = np.random.default_rng(seed).standard_normal((3000, 20))
        keys = np.concatenate([near[:, None], noise], axis=1).astype(np.float32)
        return replace(seen, lm=replace(seen.lm, keys=keys))

    fitted_to, new = with_keys(0), with_keys(1)
    assert new.lm is not None
    blind = replace(fitted_to, lm=replace(fitted_to.lm, keys=None)) if fitted_to.lm is not None else fitted_to
    found = []
    for seen in (fitted_to, blind):
        parameters = skipping("gate_lm", RULES["gate_lm"].fit(seen), seen, share)
        wanted = Weighing("gate_lm", parameters).wanted(new.lm)
        assert wanted is not None
        assert 1 - wanted.mean() == pytest.approx(share, abs=0.05)
        found.append(loss("gate_lm", parameters, new))
    assert found[0] < found[1] - 0.01


def test_a_rule_that_decides_after_the_search_skips_none() -> None:
    seen = observed(0, 50)
    parameters = RULES["gate"].fit(seen)
    assert Weighing("gate", parameters).wanted(seen.lm) is None
    assert skipping("gate", parameters, seen, 0.0) == parameters
    with pytest.raises(InvalidRequest, match=r"skip goes with a rule that .* \(gate_lm\), got gate"):
        skipping("gate", parameters, seen, 0.5)
    with pytest.raises(InvalidRequest, match=r"skip must lie in \[0, 1\), got 1"):
        skipping("gate_lm", parameters, seen, 1)


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
    np.testing.assert_array_equal(features["nearness"], [1 / 4, 1, 1])
    np.testing.assert_array_equal(features["distinct"], [2, 0, 1])
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


@given(
    st.lists(st.floats(0, LARGEST_LAMBDA), min_size=2, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_weights_that_look_make_one_softmax_with_the_lm(
    weights: list[float], asked: list[bool], looking: list[bool]
) -> None:
    asked, looking = asked[: len(weights)], looking[: len(weights)]
    if sum(w for w, mine in zip(weights, asked, strict=True) if mine) > 1:
        return  # refused in the plan
    found = [float(w[0]) for w in shared([np.array([w]) for w in weights], asked, looking)]
    assert sum(found) <= 1 + 1e-9
    assert [w for w, mine in zip(found, asked, strict=True) if mine] == [
        w for w, mine in zip(weights, asked, strict=True) if mine
    ]
    fitted = [i for i, mine in enumerate(asked) if not mine]
    if len(fitted) < 2 or not any(looking[i] for i in fitted):
        assert found == [float(w[0]) for w in shared([np.array([w]) for w in weights], asked)]
        return
    odds = {i: weights[i] / (1 - weights[i]) for i in fitted}
    expected = {i: odds[i] / (1 + sum(odds.values())) for i in fitted}
    room = LARGEST_LAMBDA - sum(w for w, mine in zip(weights, asked, strict=True) if mine)
    scale = min(1.0, max(room, 0.0) / max(sum(expected.values()), 1e-300))
    np.testing.assert_allclose([found[i] for i in fitted], [scale * expected[i] for i in fitted], rtol=1e-9, atol=1e-12)


@given(st.floats(0, 1))
def test_a_gate_beside_what_weighs_nothing_stays_as_it_is_bit_for_bit(weight: float) -> None:
    first, second = rules.softmax([np.array([weight]), np.array([0.0])])
    assert (first[0], second[0]) == (weight, 0.0)
    assert shared([np.array([weight])], [False], [True])[0][0] == weight
