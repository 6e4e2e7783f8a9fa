"""Temperature and lambda of a domain, fitted to what the LM and the neighbors said about held-out tokens. Pure.

The right temperature has the unit of a squared distance and differs by orders of magnitude between models, so it is
searched on a logarithmic grid around the spread of the observed distances and refined by golden section. For a given
temperature the mean log-likelihood is concave in lambda, so lambda is solved, not searched. Nothing here runs a model:
knnlm/evaluation/collect.py does, once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest
from knnlm.messages import Tuning
from knnlm.mixture import Component, mix
from knnlm.neighbors import Neighbors, target_log_probs

__all__ = ["LARGEST_LAMBDA", "Fit", "Observations", "Point", "best_lambda", "fit", "mean_loss", "smallest_k",
           "temperature_scale"]  # fmt: skip

GRID = 2.0 ** np.arange(-10, 11)  # temperatures to try, as multiples of the scale
GOLDEN_STEPS = 16  # narrows two grid steps (a factor of 4) to a relative width of 6e-4
GOLDEN = (np.sqrt(5) - 1) / 2
BISECTIONS = 50
# One unseen token that no neighbor stores has probability zero at lambda 1, whatever the fitting documents said.
LARGEST_LAMBDA = 0.99
RELATIVE_TOLERANCE = 1e-3  # of perplexity: a gain this small is no reason for a larger k, which every search pays for
CHUNK = 1 << 20  # distances that are turned into float64 at a time


@dataclass(frozen=True)
class Observations:
    """What model and datastore said about n held-out tokens.

    lm_log_probs: (n,) of the tokens that came. targets: (n,) int32, those tokens. neighbors: n queries. documents: how
    many the tokens come from.
    """

    lm_log_probs: npt.NDArray[np.floating]
    targets: npt.NDArray[np.int32]
    neighbors: Neighbors
    documents: int

    def __post_init__(self) -> None:
        shapes = {self.lm_log_probs.shape, self.targets.shape, self.neighbors.values.shape[:1]}
        if len(shapes) != 1 or not len(self.targets):
            raise InvalidRequest(
                f"expected one or more observed tokens, got log-probabilities {self.lm_log_probs.shape}, "
                f"targets {self.targets.shape} and neighbors {self.neighbors.values.shape}"
            )


@dataclass(frozen=True)
class Point:
    """One temperature with the best lambda for it; perplexity per token of the observations."""

    k: int
    temperature: float
    lmbda: float
    perplexity: float


@dataclass(frozen=True)
class Fit:
    """tuning: the best point. curve: every point that was tried, by k and then temperature."""

    tuning: Tuning
    curve: tuple[Point, ...]


def fit(observations: Observations) -> Fit:
    """The temperature and lambda with the lowest perplexity, for neighbors as they were found: k is how many.

    Never worse than the LM alone on the observations: lambda is 0 where retrieval does not help.
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
    return Fit(tuning, tuple(curve))


def smallest_k(fits: Iterable[Fit]) -> Fit:
    """Of fits to neighbors of the same queries, each with another k, the one with the smallest k whose perplexity is
    within RELATIVE_TOLERANCE of the best; its curve holds the points of all."""
    by_k = sorted(fits, key=lambda found: found.tuning.k)
    limit = min(found.tuning.knn_perplexity for found in by_k) * (1 + RELATIVE_TOLERANCE)
    best = next(found for found in by_k if found.tuning.knn_perplexity <= limit)
    return Fit(best.tuning, tuple(point for found in by_k for point in found.curve))


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


def mean_loss(observations: Observations, temperature: float, lmbda: float) -> float:
    """Mean negative log-likelihood of the observed tokens under the mixture, in nats: what serving would give."""
    return _loss(observations, _knn_log_probs(observations, temperature), lmbda)


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


def _best_at(observations: Observations, temperature: float) -> Point:
    knn_log_probs = _knn_log_probs(observations, temperature)
    present = observations.neighbors.present  # elsewhere the LM has all the weight, whatever lambda is
    lmbda = best_lambda(observations.lm_log_probs[present], knn_log_probs[present])
    k = observations.neighbors.values.shape[1]
    return Point(k, temperature, lmbda, float(np.exp(_loss(observations, knn_log_probs, lmbda))))


def _loss(observations: Observations, knn_log_probs: npt.NDArray[np.float64], lmbda: float) -> float:
    weight = np.where(observations.neighbors.present, lmbda, 0.0)
    mixed = mix(observations.lm_log_probs, [Component("knn", knn_log_probs, weight)])
    return -float(mixed.mean())


def _knn_log_probs(observations: Observations, temperature: float) -> npt.NDArray[np.float64]:
    """(n,) log p_kNN of the targets, a part of the rows at a time: (n, k) float64 would be the largest array of all."""
    neighbors, targets = observations.neighbors, observations.targets
    rows = max(1, CHUNK // max(1, neighbors.values.shape[1]))
    parts = [
        target_log_probs(
            Neighbors(neighbors.distances[i : i + rows], neighbors.values[i : i + rows]),
            targets[i : i + rows],
            temperature,
        )
        for i in range(0, len(targets), rows)
    ]
    return np.concatenate(parts)
