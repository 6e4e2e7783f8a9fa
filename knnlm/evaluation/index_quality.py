"""How good the neighbors are that an index finds, beside those of exact search. Pure: arrays in, numbers out.

Recall counts entries. What is served is the distribution that they give, and the perplexity of the mixture: an index
may miss half of the entries and lose nothing, when those it finds instead say the same.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest
from knnlm.evaluation.collect import HeldOut
from knnlm.evaluation.tuning import Observations, fit
from knnlm.neighbors import Neighbors, TokenMasses, neighbor_log_probs

__all__ = ["Quality", "judge", "recall", "total_variation"]

CHUNK = 1 << 20  # distances that become a distribution at a time


@dataclass(frozen=True)
class Quality:
    """recalls: by k. perplexity, temperature, lmbda: fitted to these neighbors, at the largest k."""

    recalls: dict[int, float]
    total_variation: float
    perplexity: float
    temperature: float
    lmbda: float

    def as_json(self) -> dict[str, Any]:  # Any: JSON
        return asdict(self)


def judge(found: Neighbors, exact: Neighbors, held_out: HeldOut, ks: tuple[int, ...], temperature: float) -> Quality:
    """found, exact: (n, k) with ids. temperature: of the distributions that are compared, the one fitted to `exact`."""
    observed = Observations(held_out.lm_log_probs, held_out.targets, found, held_out.documents)
    tuning = fit(observed).tuning
    return Quality(
        recalls={k: recall(found, exact, k) for k in ks},
        total_variation=total_variation(found, exact, temperature),
        perplexity=tuning.knn_perplexity,
        temperature=tuning.temperature,
        lmbda=tuning.lmbda,
    )


def recall(found: Neighbors, exact: Neighbors, k: int) -> float:
    """The share of the k nearest entries of all queries that are among the k found ones; 1 where there is none."""
    if found.ids is None or exact.ids is None:
        raise InvalidRequest("recall is of entries: both sides need their ids", param="ids")
    wanted = exact.ids[:, :k]
    both = np.sort(np.concatenate([found.ids[:, :k], wanted], axis=1), axis=1)  # no entry comes twice from one side
    hits = int(((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum())
    present = int((wanted >= 0).sum())
    return hits / present if present else 1.0


def total_variation(found: Neighbors, exact: Neighbors, temperature: float) -> float:
    """Mean over queries of half the sum of |p - q| over tokens, p and q being p_kNN of the two: 0 the same, 1 disjoint.

    A query that has neighbors on one side alone counts as 1; on neither as 0.
    """
    rows = max(1, CHUNK // max(1, found.values.shape[1], exact.values.shape[1]))
    n = len(found.values)
    parts = [_half_differences(_cut(found, i, rows), _cut(exact, i, rows), temperature) for i in range(0, n, rows)]
    return float(np.concatenate(parts).mean()) if parts else 0.0


def _half_differences(found: Neighbors, exact: Neighbors, temperature: float) -> npt.NDArray[np.float64]:
    """(n,) of total variations."""
    p, q = neighbor_log_probs(found, temperature), neighbor_log_probs(exact, temperature)
    places = np.concatenate([_places(p), _places(q)])
    masses = np.concatenate([np.exp(p.log_masses), -np.exp(q.log_masses)])
    distinct, slot = np.unique(places, return_inverse=True)
    differences = np.abs(np.bincount(slot, masses, minlength=len(distinct)))
    halves = np.bincount(distinct >> 32, differences, minlength=len(p)) / 2
    return np.where(found.present == exact.present, halves, 1.0)


def _places(masses: TokenMasses) -> npt.NDArray[np.int64]:
    """(m,) row and token in one number."""
    return masses.rows << 32 | masses.tokens.astype(np.int64)


def _cut(neighbors: Neighbors, start: int, rows: int) -> Neighbors:
    return Neighbors(neighbors.distances[start : start + rows], neighbors.values[start : start + rows])
