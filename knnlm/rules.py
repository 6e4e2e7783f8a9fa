"""Lambda rules: from what a source and the LM say of each prediction to the weight of the source. Pure.

A rule is one class and one row of RULES: it weighs, it is fitted, and it says which numbers it looks at. What `fit`
gives is stored with a domain's tuning and given to `weights` again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest
from knnlm.evidence import Evidence
from knnlm.messages import LmStatistics

Parameters = Mapping[str, float | Sequence[float]]
Weights = npt.NDArray[np.float64]

FIXED = "fixed"
# One unseen token that no neighbor stores has probability zero at lambda 1, whatever the fitting documents said.
LARGEST_LAMBDA = 0.99
BISECTIONS = 50


@dataclass(frozen=True)
class Observed:
    """What was seen of n held-out tokens. lm_log_probs: (n,) of those tokens; evidence: of them; lm: for rules that
    ask for statistics."""

    lm_log_probs: npt.NDArray[np.floating]
    evidence: Evidence
    lm: LmStatistics | None = None


class Rule(Protocol):
    """One way to weigh a source. statistics: whether it looks at the LM's own. features: names of the evidence's
    features that it looks at."""

    statistics: bool
    features: Sequence[str]

    def weights(self, evidence: Evidence, lm: LmStatistics | None, parameters: Parameters) -> Weights:
        """(n,) in [0, 1]. Where the source is absent the weight does not count. Raises KeyError for parameters that
        `fit` of this rule did not give."""
        ...

    def fit(self, observed: Observed) -> Parameters:
        """The parameters that make the observed tokens likeliest. Raises TypeError for whole distributions."""
        ...


class Fixed:
    """The same weight everywhere (Khandelwal et al. 2020, arXiv 1911.00172)."""

    statistics = False
    features: Sequence[str] = ()

    def weights(self, evidence: Evidence, lm: LmStatistics | None, parameters: Parameters) -> Weights:
        del lm
        return np.full(len(evidence.present), parameters["lambda"])

    def fit(self, observed: Observed) -> Parameters:
        present = observed.evidence.present  # elsewhere the LM has all the weight, whatever lambda is
        log_probs = observed.evidence.of_targets
        return {"lambda": best_lambda(observed.lm_log_probs[present], log_probs[present])}


RULES: dict[str, Rule] = {FIXED: Fixed()}


def rule(name: str) -> Rule:
    """The rule of that name. Raises InvalidRequest, naming the known ones."""
    if name not in RULES:
        raise InvalidRequest(f"unknown rule {name!r}; known: {', '.join(RULES)}", param="rule")
    return RULES[name]


@dataclass(frozen=True)
class Weighing:
    """A rule with its parameters. asked: whether the caller gave them, rather than a tuning."""

    rule: str
    parameters: Parameters
    asked: bool = False

    def __post_init__(self) -> None:
        rule(self.rule)

    @property
    def statistics(self) -> bool:
        return rule(self.rule).statistics

    def weights(self, evidence: Evidence, lm: LmStatistics | None) -> Weights:
        """(n,) the weight at each prediction, 0 where the source is absent."""
        return np.where(evidence.present, rule(self.rule).weights(evidence, lm, self.parameters), 0.0)


def shared(weights: Sequence[Weights], asked: Sequence[bool]) -> list[Weights]:
    """The weights (n,) of several sources as they can stand beside each other.

    Each was fitted as if it stood alone with the LM. Where they add up to more than LARGEST_LAMBDA, those that were not
    asked for are scaled by one factor, to add up to what the asked ones leave of it: continuous in every weight.
    """
    total = np.sum(weights, axis=0) if weights else np.zeros(0)
    fitted = [w for w, given in zip(weights, asked, strict=True) if not given]
    crowded = total > LARGEST_LAMBDA
    if len(weights) < 2 or not fitted or not crowded.any():
        return list(weights)
    together = np.sum(fitted, axis=0)
    rest = np.clip(LARGEST_LAMBDA - (total - together), 0, 1)
    factor = np.divide(rest, together, out=np.ones_like(rest), where=crowded & (together > 0))
    return [w if given else w * factor for w, given in zip(weights, asked, strict=True)]


def best_lambda(lm_log_probs: npt.NDArray[np.floating], knn_log_probs: npt.NDArray[np.floating]) -> float:
    """The lambda in [0, LARGEST_LAMBDA] that maximises sum of log((1 - lambda) p_LM + lambda p_kNN); both (n,).

    With r = p_kNN / p_LM - 1 the derivative is sum of r / (1 + lambda r), which falls: its root is bisected.
    """
    # beyond e^300 a ratio changes nothing any more, and the sum of many must stay finite
    gap = np.minimum(knn_log_probs.astype(np.float64) - lm_log_probs, 300.0)
    ratio = np.expm1(gap)  # (n,) >= -1

    def slope(lmbda: float) -> float:
        return float((ratio / (1 + lmbda * ratio)).sum())

    if not len(ratio) or slope(0.0) <= 0:
        return 0.0
    if slope(LARGEST_LAMBDA) >= 0:
        return LARGEST_LAMBDA
    low, high = 0.0, LARGEST_LAMBDA
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low
