"""Losses along a setting, from what a view holds: over lambda, over k. Pure."""

from collections.abc import Sequence

import numpy as np

from experiments.lab import Floats, View, mixed
from experiments.records import Line
from experiments.verdicts import Ints, interval
from knnlm.evaluation.tuning import fit

__all__ = ["LAMBDAS", "line", "over_lambda", "perplexity", "with_k"]

LAMBDAS = (*(round(0.05 * i, 2) for i in range(20)), 0.99)


def over_lambda(lm: Floats, knn: Floats) -> Floats:
    """(len(LAMBDAS), n) losses of the mixture at every lambda."""
    return np.stack([-mixed(lm, knn, lmbda) for lmbda in LAMBDAS])


def with_k(view: View, k: int) -> tuple[float, float, Floats]:
    """Temperature and lambda fitted with the k nearest alone, and the losses (n,) of the reported tokens."""
    tuned = fit(view.tune.observations(k)).tuning
    loss = -mixed(view.report.lm, view.report.knn(tuned.temperature, k), tuned.lmbda)
    return tuned.temperature, tuned.lmbda, loss


def line(name: str, x: Sequence[float], losses: Sequence[Floats], documents: Ints) -> Line:
    """Perplexities, with their intervals, as a curve."""
    found = np.exp([interval(loss, documents) for loss in losses])
    return Line(name, tuple(x), *(tuple(float(v) for v in found[:, part]) for part in range(3)))


def perplexity(loss: Floats) -> float:
    """The perplexity of losses in nats."""
    return float(np.exp(loss.mean()))
