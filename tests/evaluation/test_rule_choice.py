"""Rules compared by cross-validation over documents, and the intervals of their differences."""

from dataclasses import replace

import numpy as np
import pytest

from knnlm.domains import knn_evidence
from knnlm.errors import InvalidRequest
from knnlm.evaluation.rule_choice import (
    FOLDS,
    compare,
    compare_together,
    held_out_losses,
    held_out_losses_together,
    interval,
)
from knnlm.evaluation.tuning import Observations, fit, with_rule
from knnlm.messages import LmStatistics
from knnlm.neighbors import Neighbors
from knnlm.rules import LOOKING, RULES, Observed, Weighing
from knnlm.weights import fit_weights


def observations(seed: int = 0, n: int = 3000, documents: int = 15, told: float = 1.0) -> Observations:
    """Near neighbors are right more often; told: how much of that the nearest distance tells."""
    rng = np.random.default_rng(seed)
    quality = rng.gamma(2.0, size=n)
    nearest = told * quality + (1 - told) * rng.gamma(2.0, size=n)
    distances = np.sort(nearest[:, None] + rng.gamma(1.0, size=(n, 6)), axis=1).astype(np.float32)
    targets = rng.integers(8, size=n).astype(np.int32)
    right = rng.random((n, 6)) < 0.9 * np.exp(-quality / 2)[:, None]
    values = np.where(right, targets[:, None], rng.integers(8, size=(n, 6))).astype(np.int32)
    lm = LmStatistics(rng.uniform(0.1, 3, n), -rng.uniform(0.1, 3, n))
    log_probs = np.log(rng.beta(1, 3, n)).astype(np.float32)
    return Observations(
        log_probs, targets, Neighbors(distances, values), documents, lm, np.sort(rng.integers(documents, size=n))
    )


def test_each_document_is_measured_with_what_was_fitted_to_others() -> None:
    some = observations()
    found = held_out_losses(some, 1.0, ["bins"])
    assert set(found) == {"fixed", "bins"}
    evidence = knn_evidence(some.neighbors, 1.0, some.targets)
    assert some.document_of is not None
    fold = some.document_of % FOLDS == 2
    parameters = RULES["fixed"].fit(
        Observed(some.lm_log_probs[~fold], knn_evidence(_rows(some, ~fold), 1.0, some.targets[~fold]))
    )
    weights = Weighing("fixed", parameters).weights(evidence, None)[fold]
    p = (1 - weights) * np.exp(some.lm_log_probs[fold].astype(np.float64)) + weights * np.exp(evidence.of_targets[fold])
    np.testing.assert_allclose(found["fixed"][fold], -np.log(p), rtol=1e-6)


def _rows(some: Observations, rows: np.ndarray) -> Neighbors:
    return Neighbors(some.neighbors.distances[rows], some.neighbors.values[rows])


def test_the_best_rule_is_chosen_where_it_is_better_beyond_chance() -> None:
    rows = {row.name: row for row in compare(observations(), 1.0)}
    assert list(rows) == list(RULES)
    assert (rows["fixed"].difference, rows["fixed"].low, rows["fixed"].high) == (0, 0, 0)
    chosen = [row for row in rows.values() if row.chosen]
    assert len(chosen) == 1
    assert chosen[0].name in {"bins", "gate"}
    assert chosen[0].high < 0
    assert chosen[0].difference == min(row.difference for row in rows.values() if row.high < 0)
    for row in rows.values():
        assert row.low <= row.difference <= row.high
        assert np.log(row.perplexity / rows["fixed"].perplexity) == pytest.approx(row.difference)


def test_fixed_stays_where_nothing_tells_more() -> None:
    rows = compare(observations(told=0.0, n=600, documents=6), 1.0, ["fixed", "bins", "gate_lm"])
    assert [row.name for row in rows if row.chosen] == ["fixed"]


def test_the_interval_is_that_of_drawn_documents() -> None:
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(40), 25)
    effects = rng.normal(size=40)
    differences = effects[documents] + 0.1 * rng.normal(size=1000)
    low, high = interval(differences, documents)
    error = effects.std() / np.sqrt(40)
    assert low == pytest.approx(differences.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(differences.mean() + 1.96 * error, abs=0.2 * error)
    tokens = interval(differences, np.arange(1000))  # as if tokens were independent, which they are not
    assert high - low > 3 * (tokens[1] - tokens[0])


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="expected at least 5, got 4"):
        compare(observations(documents=4), 1.0)
    with pytest.raises(InvalidRequest, match="which are not known"):
        compare(replace(observations(), document_of=None), 1.0)


@pytest.mark.parametrize("name", [name for name in RULES if name != "fixed"])
def test_a_rule_is_fitted_at_the_temperature_of_one_lambda(name: str) -> None:
    some = observations(n=800)
    fixed = fit(some).tuning
    found = fit(some, name).tuning
    assert (found.temperature, found.lmbda, found.k) == (fixed.temperature, fixed.lmbda, fixed.k)
    assert found.knn_perplexity <= fixed.knn_perplexity + 1e-9
    assert with_rule(fixed, some, name) == found


def test_skipping_costs_what_the_tuning_says() -> None:
    some = observations(n=800)
    assert some.statistics is not None
    sure = some.statistics.entropy < 1.5
    some = replace(some, lm_log_probs=np.log(np.where(sure, np.float32(0.9), np.float32(0.01))))
    fitted = fit(some, "gate_lm").tuning
    skipped = fit(some, "gate_lm", skip=0.5).tuning
    assert skipped.parameters["skip_below"]
    assert fitted.knn_perplexity < skipped.knn_perplexity < skipped.lm_perplexity
    with pytest.raises(InvalidRequest, match="skip goes with a rule that decides before the search"):
        fit(some, "bins", skip=0.5)


def together(told: float) -> list[Observed]:
    """Two components, each right at other tokens; told: how much of that its nearest distance tells."""
    found = []
    lm = observations().lm_log_probs
    for seed in (0, 1):
        some = observations(seed, told=told)
        evidence = knn_evidence(some.neighbors, 1.0, some.targets, LOOKING.features)
        found.append(Observed(lm, evidence, observations().statistics, observations().document_of))
    return found


def test_gates_together_are_chosen_where_they_are_better_beyond_chance() -> None:
    rows = compare_together(together(1.0))
    assert [(row.name, row.chosen) for row in rows] == [("fixed", False), ("gate", True)]
    assert rows[1].high < 0
    seen = together(1.0)
    documents = seen[0].groups
    losses = held_out_losses_together(seen)
    assert (rows[1].low, rows[1].high) == interval(losses["gate"] - losses["fixed"], documents)
    fold = documents % FOLDS == 3
    some = [one.at(~fold) for one in seen]
    targets, present = [one.evidence.of_targets for one in some], [one.evidence.present for one in some]
    weights, _ = fit_weights(some[0].lm_log_probs, targets, present)
    p = (1 - weights.sum()) * np.exp(seen[0].lm_log_probs[fold].astype(np.float64))
    p += sum(w * np.exp(one.evidence.of_targets[fold]) for w, one in zip(weights, seen, strict=True))
    np.testing.assert_allclose(losses["fixed"][fold], -np.log(p), rtol=1e-6)


def test_weights_stay_where_gates_see_nothing() -> None:
    rng = np.random.default_rng(0)
    seen = []
    for one in together(0.0):
        noise = {name: rng.uniform(size=3000) for name in LOOKING.features}
        seen.append(replace(one, evidence=replace(one.evidence, features=noise)))
    assert [row.name for row in compare_together(seen) if row.chosen] == ["fixed"]
