"""Temperature and lambda of a domain, fitted to what the LM and the neighbors said about held-out tokens. Pure.

The right temperature has the unit of a squared distance and differs by orders of magnitude between models, so it is
searched on a logarithmic grid around the spread of the observed distances and refined by golden section. For a given
temperature the mean log-likelihood is concave in lambda, so lambda is solved, not searched. Nothing here runs a model:
knnlm/evaluation/collect.py does, once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from knnlm.domains import knn_evidence
from knnlm.errors import InvalidRequest
from knnlm.messages import LmStatistics, Tuning
from knnlm.mixture import Component, mix
from knnlm.neighbors import Neighbors
from knnlm.rules import FIXED, Observed, Parameters, Weighing, rule

GRID = 2.0 ** np.arange(-10, 11)  # temperatures to try, as multiples of the scale
GOLDEN_STEPS = 16  # narrows two grid steps (a factor of 4) to a relative width of 6e-4
GOLDEN = (np.sqrt(5) - 1) / 2
RELATIVE_TOLERANCE = 1e-3  # a gain of perplexity this small is no reason for a larger k, which every search pays for


@dataclass(frozen=True)
class Observations:
    """What model and datastore said about n held-out tokens.

    lm_log_probs: (n,) of the tokens that came. targets: (n,) int32, those tokens. neighbors: n queries. documents: how
    many the tokens come from. statistics: of the LM's distributions, for rules that look at them.
    """

    lm_log_probs: npt.NDArray[np.floating]
    targets: npt.NDArray[np.int32]
    neighbors: Neighbors
    documents: int
    statistics: LmStatistics | None = None

    def __post_init__(self) -> None:
        shapes = {self.lm_log_probs.shape, self.targets.shape, self.neighbors.values.shape[:1]}
        if len(shapes) != 1 or not len(self.targets):
            raise InvalidRequest(
                f"expected one or more observed tokens, got log-probabilities {self.lm_log_probs.shape}, "
                f"targets {self.targets.shape} and neighbors {self.neighbors.values.shape}"
            )


@dataclass(frozen=True)
class Point:
    """One temperature with the best lambda for it, and the best parameters of the rule; perplexity with that rule, per
    token of the observations."""

    k: int
    temperature: float
    lmbda: float
    perplexity: float
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """tuning: the best point. curve: every point that was tried, by k and then temperature."""

    tuning: Tuning
    curve: tuple[Point, ...]


def fit(observations: Observations, name: str = FIXED) -> Fit:
    """The temperature and the parameters of the rule `name` with the lowest perplexity, for neighbors as they were
    found: k is how many.

    With the rule "fixed" never worse than the LM alone on the observations: lambda is 0 where retrieval does not help.
    Raises InvalidRequest for an unknown rule, and for one that needs statistics when there are none.
    """
    if rule(name).statistics and observations.statistics is None:
        raise InvalidRequest(f"rule {name} looks at statistics of the LM, which were not observed", param="rule")
    curve = _curve(observations, name)
    best = min(curve, key=lambda point: point.perplexity)
    tuning = Tuning(
        temperature=best.temperature,
        lmbda=best.lmbda,
        k=best.k,
        lm_perplexity=float(np.exp(-observations.lm_log_probs.mean(dtype=np.float64))),
        knn_perplexity=best.perplexity,
        tokens=len(observations.targets),
        documents=observations.documents,
        rule=name,
        parameters={} if name == FIXED else best.parameters,
    )
    return Fit(tuning, tuple(curve))


def smallest_k(fits: Iterable[Fit]) -> Fit:
    """The fit with the smallest k whose perplexity is within RELATIVE_TOLERANCE of the best; its curve holds the points
    of all. fits: to neighbors of the same queries, each with another k."""
    by_k = sorted(fits, key=lambda found: found.tuning.k)
    limit = min(found.tuning.knn_perplexity for found in by_k) * (1 + RELATIVE_TOLERANCE)
    best = next(found for found in by_k if found.tuning.knn_perplexity <= limit)
    return Fit(best.tuning, tuple(point for found in by_k for point in found.curve))


def mean_loss(observations: Observations, temperature: float, lmbda: float) -> float:
    """Mean negative log-likelihood of the observed tokens under the mixture, in nats: what serving would give."""
    evidence = knn_evidence(observations.neighbors, temperature, observations.targets)
    return _loss(Observed(observations.lm_log_probs, evidence), Weighing(FIXED, {"lambda": lmbda}))


def temperature_scale(neighbors: Neighbors) -> float:
    """A temperature of the right order: the median of how much further a neighbor is than the nearest of its query.

    Where distances do not differ (one neighbor, or copies), the median distance; 1.0 where there is none at all.
    """
    present = neighbors.values >= 0
    nearest = np.where(present, neighbors.distances, np.inf).min(axis=1, initial=np.inf)
    for distances in (neighbors.distances - nearest[:, None], neighbors.distances):
        scale = float(np.median(distances[present])) if present.any() else 0.0
        if scale > 0:
            return scale
    return 1.0


def _curve(observations: Observations, name: str) -> list[Point]:
    """Every point that was tried, by temperature."""
    points: dict[float, Point] = {}

    def loss(log_temperature: float) -> float:
        temperature = float(np.exp(log_temperature))
        if temperature not in points:
            points[temperature] = _best_at(observations, temperature, name)
        return points[temperature].perplexity

    grid = np.log(GRID * temperature_scale(observations.neighbors))
    best = int(np.argmin([loss(t) for t in grid]))
    _golden(loss, float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)]))
    return [points[t] for t in sorted(points)]


def _golden(loss: Callable[[float], float], low: float, high: float) -> None:
    """Golden-section search: `loss` keeps what it is asked, so nothing is returned."""
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    for _ in range(GOLDEN_STEPS):
        if loss(left) <= loss(right):
            high, right = right, left
            left = high - GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)


def _best_at(observations: Observations, temperature: float, name: str) -> Point:
    evidence = knn_evidence(observations.neighbors, temperature, observations.targets, rule(name).features)
    observed = Observed(observations.lm_log_probs, evidence, observations.statistics)
    parameters = rule(name).fit(observed)
    loss = _loss(observed, Weighing(name, parameters))
    lmbda = rule(FIXED).fit(observed)["lambda"]
    k = observations.neighbors.values.shape[1]
    return Point(k, temperature, float(np.mean(lmbda)), float(np.exp(loss)), parameters)


def _loss(observed: Observed, weighing: Weighing) -> float:
    """Mean negative log-probability of the observed tokens; evidence of targets."""
    evidence = observed.evidence
    component = Component("knn", evidence.of_targets, weighing.weights(evidence, observed.lm))
    return -float(mix(observed.lm_log_probs, [component]).mean())
