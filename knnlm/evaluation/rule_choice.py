"""Which lambda rule a domain gets: all are fitted to some of the documents and measured on the others, and the best is
taken where it is better than one lambda for everything, beyond what chance does to that many documents. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest
from knnlm.evaluation.tuning import Observations, losses, seen
from knnlm.mixture import Component, mix
from knnlm.rules import FIXED, GATE, RULES, Observed, Weighing, shared
from knnlm.tuning_records import RuleQuality
from knnlm.weights import fit_gates, fit_weights

FOLDS = 5  # parts of the documents, each measured with what was fitted to the others
DRAWS = 2000  # resamples of the documents
LEVEL = 0.95  # of the intervals


def compare(observations: Observations, temperature: float, names: Sequence[str] = tuple(RULES)) -> list[RuleQuality]:
    """The rules of these names by cross-validation over documents, at one temperature; one is chosen: the best of those
    whose whole interval lies below "fixed", else "fixed".

    Raises InvalidRequest for fewer than FOLDS documents, an unknown rule, and one that needs statistics of the LM when
    there are none.
    """
    found = held_out_losses(observations, temperature, names)
    return _compared({name: found[name] for name in names}, found[FIXED], _documents(observations))


def compare_together(components: Sequence[Observed]) -> list[RuleQuality]:
    """Several components beside each other by cross-validation over documents: "fixed", one weight for each, all fitted
    together, and "gate", a gate for each, fitted together; one is chosen as by `compare`. Raises as `fit_gates`."""
    found = held_out_losses_together(components)
    return _compared(found, found[FIXED], components[0].groups)


def held_out_losses_together(components: Sequence[Observed]) -> Mapping[str, npt.NDArray[np.float64]]:
    """(n,) by the rule of all components, "fixed" or "gate", as `held_out_losses`. components: what was seen of the
    same tokens, as knnlm.weights.fit_gates takes it."""
    _, number = np.unique(components[0].groups, return_inverse=True)
    found = {name: np.empty(len(number)) for name in (FIXED, GATE)}
    for fold in range(FOLDS):
        left_out = number % FOLDS == fold
        fitted_to, measured = [c.at(~left_out) for c in components], [c.at(left_out) for c in components]
        weights, _ = fit_weights(
            fitted_to[0].lm_log_probs,
            [c.evidence.of_targets for c in fitted_to],
            [c.evidence.present for c in fitted_to],
        )
        found[FIXED][left_out] = losses_together(measured, [Weighing(FIXED, {"lambda": float(w)}) for w in weights])
        gates = fit_gates(fitted_to, weights.tolist())
        found[GATE][left_out] = losses_together(measured, [Weighing(GATE, gate) for gate in gates])
    return found


def losses_together(components: Sequence[Observed], weighings: Sequence[Weighing]) -> npt.NDArray[np.float64]:
    """(n,) negative log-probabilities of the observed tokens in the mixture of all components, as it is served."""
    alone = [w.weights(c.evidence, c.lm) for c, w in zip(components, weighings, strict=True)]
    weights = shared(alone, [w.asked for w in weighings], [w.rule != FIXED for w in weighings])
    parts = [
        Component(str(i), c.evidence.of_targets, weight)
        for i, (c, weight) in enumerate(zip(components, weights, strict=True))
    ]
    return -mix(components[0].lm_log_probs, parts)


def held_out_losses(
    observations: Observations, temperature: float, names: Sequence[str]
) -> Mapping[str, npt.NDArray[np.float64]]:
    """(n,) by rule, the negative log-probability of each token with parameters fitted to documents without its own; the
    rule "fixed" is among them. Raises as `compare`."""
    documents = _documents(observations)
    _, number = np.unique(documents, return_inverse=True)
    if number.max() + 1 < FOLDS:
        raise InvalidRequest(
            f"rules are compared over documents: expected at least {FOLDS}, got {number.max() + 1}", param="rule"
        )
    names = list(dict.fromkeys([FIXED, *names]))
    observed = seen(observations, temperature, names)
    found = {name: np.empty(len(number)) for name in names}
    for fold in range(FOLDS):
        left_out = number % FOLDS == fold
        fitted_to, measured = observed.at(~left_out), observed.at(left_out)
        for name in names:
            parameters = RULES[name].fit(fitted_to)
            found[name][left_out] = losses(measured, Weighing(name, parameters))
    return found


def interval(
    differences: npt.NDArray[np.float64], documents: npt.NDArray[np.integer], *, seed: int = 0
) -> tuple[float, float]:
    """The LEVEL interval of the mean of n tokens' differences, when whole documents are drawn again and again.

    documents: (n,) the document of each token.
    """
    _, number = np.unique(documents, return_inverse=True)
    sums, tokens = np.bincount(number, differences), np.bincount(number)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(DRAWS, len(sums)))
    means = sums[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _compared(
    found: Mapping[str, npt.NDArray[np.float64]],
    fixed: npt.NDArray[np.float64],
    documents: npt.NDArray[np.integer],
) -> list[RuleQuality]:
    """A row for each; one is chosen."""
    rows = []
    for name, losses_of_it in found.items():
        difference = losses_of_it - fixed
        perplexity = float(np.exp(losses_of_it.mean()))
        rows.append(RuleQuality(name, perplexity, float(difference.mean()), *interval(difference, documents)))
    better = [row for row in rows if row.high < 0]
    best = min(better, key=lambda row: row.difference).name if better else FIXED
    return [replace(row, chosen=row.name == best) for row in rows]


def _documents(observations: Observations) -> npt.NDArray[np.int64]:
    if observations.document_of is None:
        raise InvalidRequest("rules are compared over documents, which are not known of these tokens", param="rule")
    return observations.document_of
