"""Temperature and lambda of a domain, fitted to what the LM and the neighbors said about held-out tokens. Pure.

The right temperature has the unit of a squared distance and differs by orders of magnitude between models, so it is
searched on a logarithmic grid around the spread of the observed distances and refined by golden section. For a given
temperature the mean log-likelihood is concave in lambda, so lambda is solved, not searched. Nothing here runs a model:
knnlm/evaluation/collect.py does, once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from knnlm.domains import knn_evidence
from knnlm.errors import InvalidRequest
from knnlm.messages import LmStatistics
from knnlm.mixture import Component, mix
from knnlm.neighbors import Neighbors
from knnlm.rules import FIXED, Observed, Weighing, decides_early, rule, skipping
from knnlm.tuning_records import Tuning

GRID = 2.0 ** np.arange(-10, 11)  # temperatures to try, as multiples of the scale
GOLDEN_STEPS = 16  # narrows two grid steps (a factor of 4) to a relative width of 6e-4
GOLDEN = (np.sqrt(5) - 1) / 2
RELATIVE_TOLERANCE = 1e-3  # a gain of perplexity this small is no reason for a larger k, which every search pays for


@dataclass(frozen=True)
class Observations:
    """What model and datastore said about n held-out tokens.

    lm_log_probs: (n,) of the tokens that came. targets: (n,) int32, those tokens. neighbors: n queries. documents: how
    many the tokens come from. statistics: of the LM's distributions, for rules that look at them. document_of: (n,) the
    number of each token's document; None where it is not known.
    """

    lm_log_probs: npt.NDArray[np.floating]
    targets: npt.NDArray[np.int32]
    neighbors: Neighbors
    documents: int
    statistics: LmStatistics | None = None
    document_of: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        shapes = {self.lm_log_probs.shape, self.targets.shape, self.neighbors.values.shape[:1]}
        if len(shapes) != 1 or not len(self.targets):
            raise InvalidRequest(
                f"expected one or more observed tokens, got log-probabilities {self.lm_log_probs.shape}, "
                f"targets {self.targets.shape} and neighbors {self.neighbors.values.shape}"
            )


@dataclass(frozen=True)
class Point:
    """One temperature with the best lambda for it, and the perplexity with both, per token of the observations."""

    k: int
    temperature: float
    lmbda: float
    perplexity: float


@dataclass(frozen=True)
class Fit:
    """tuning: the best point. curve: every point that was tried, by k and then temperature."""

    tuning: Tuning
    curve: tuple[Point, ...]


def fit(observations: Observations, name: str = FIXED, *, skip: float = 0.0) -> Fit:
    """The temperature with the lowest perplexity at its best lambda, for neighbors as they were found: k is how many;
    and, at that temperature, the parameters of the rule `name`.

    Never worse than the LM alone on the observations: lambda is 0 where retrieval does not help. Raises as `with_rule`.
    """
    curve = _curve(observations)
    best = min(curve, key=lambda point: point.perplexity)
    tuning = Tuning(
        temperature=best.temperature,
        lmbda=best.lmbda,
        k=best.k,
        lm_perplexity=float(np.exp(-observations.lm_log_probs.mean(dtype=np.float64))),
        knn_perplexity=best.perplexity,
        tokens=len(observations.targets),
        documents=observations.documents,
    )
    return Fit(with_rule(tuning, observations, name, skip=skip), tuple(curve))


def with_rule(tuning: Tuning, observations: Observations, name: str, *, skip: float = 0.0) -> Tuning:
    """The tuning of the rule "fixed" with the rule `name` instead, and the perplexity with it. skip: see
    `knnlm.rules.skipping`. Raises InvalidRequest for an unknown rule, for one that needs statistics when there are
    none, and as `skipping`."""
    if name == FIXED and not skip:
        return tuning
    observed = seen(observations, tuning.temperature, [name])
    parameters = skipping(name, rule(name).fit(observed), observed, skip)
    perplexity = float(np.exp(losses(observed, Weighing(name, parameters)).mean()))
    return replace(tuning, rule=name, parameters=parameters, knn_perplexity=perplexity)


def seen(observations: Observations, temperature: float, names: Sequence[str]) -> Observed:
    """What rules of these names look at. Raises InvalidRequest for an unknown one, and for one that needs statistics of
    the LM when there are none."""
    features: dict[str, None] = {}
    for name in names:
        if rule(name).statistics and observations.statistics is None:
            raise InvalidRequest(f"rule {name} looks at statistics of the LM, which were not observed", param="rule")
        features |= dict.fromkeys(rule(name).features)
    evidence = knn_evidence(observations.neighbors, temperature, observations.targets, tuple(features))
    lm = observations.statistics
    if lm is not None and not any(map(decides_early, names)):
        lm = replace(lm, keys=None)  # nobody looks at them, and they are large
    return Observed(observations.lm_log_probs, evidence, lm, observations.document_of)


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
    return float(losses(Observed(observations.lm_log_probs, evidence), Weighing(FIXED, {"lambda": lmbda})).mean())


def losses(observed: Observed, weighing: Weighing) -> npt.NDArray[np.float64]:
    """(n,) negative log-probabilities of the observed tokens; evidence of targets."""
    evidence = observed.evidence
    component = Component("knn", evidence.of_targets, weighing.weights(evidence, observed.lm))
    return -mix(observed.lm_log_probs, [component])


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


def _curve(observations: Observations) -> list[Point]:
    """Every point that was tried, by temperature."""
    points: dict[float, Point] = {}

    def loss(log_temperature: float) -> float:
        temperature = float(np.exp(log_temperature))
        if temperature not in points:
            points[temperature] = _best_at(observations, temperature)
        return points[temperature].perplexity

    grid = np.log(GRID * temperature_scale(observations.neighbors))
    best = int(np.argmin([loss(t) for t in grid]))
    golden_section(loss, float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)]))
    return [points[t] for t in sorted(points)]


def golden_section(loss: Callable[[float], float], low: float, high: float) -> None:
    """Golden-section search of a minimum: `loss` keeps what it is asked, so nothing is returned."""
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    for _ in range(GOLDEN_STEPS):
        if loss(left) <= loss(right):
            high, right = right, left
            left = high - GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)


def _best_at(observations: Observations, temperature: float) -> Point:
    observed = seen(observations, temperature, [FIXED])
    lmbda = float(np.mean(rule(FIXED).fit(observed)["lambda"]))
    loss = losses(observed, Weighing(FIXED, {"lambda": lmbda})).mean()
    return Point(observations.neighbors.values.shape[1], temperature, lmbda, float(np.exp(loss)))
