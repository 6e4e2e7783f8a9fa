"""How a tuning weighs: what a manifest stores is tried before it is used, since anybody may have written it. Pure."""

from collections.abc import Sequence

import numpy as np

from knnlm.errors import DatastoreError
from knnlm.evidence import Evidence
from knnlm.messages import LmStatistics
from knnlm.rules import Parameters, Weighing, Weights, rule

__all__ = ["tuned_weighing"]

LARGEST_PARAMETER = 1e100  # in absolute value: no product with what is observed overflows float64
LARGEST_TRIED = 1e150  # the largest distance or statistic that a rule is tried with: beyond every parameter
TRIED_ROWS = (1, 2)  # a parameter that is wrongly a list fits no more than one number of predictions


def tuned_weighing(domain: str, name: str, parameters: Parameters, key_dim: int) -> Weighing:
    """The weighing by the rule `name` with the parameters that the tuning of a domain has for it.

    key_dim: dimension of the LM's keys. Raises InvalidRequest for a rule that is not known, and DatastoreError for
    parameters that are missing, have wrong lengths for these keys, or give weights outside of [0, 1].
    """
    arrays: dict[str, float | Sequence[float]] = {n: np.asarray(v, np.float64) for n, v in parameters.items()}  # type: ignore[misc]
    tried = Weighing(name, arrays)
    try:
        usable = all(np.all(np.abs(values) <= LARGEST_PARAMETER) for values in arrays.values()) and all(
            _weighs(tried, n, key_dim) for n in TRIED_ROWS
        )
    except (KeyError, IndexError, TypeError, ValueError):  # as numpy says that shapes do not fit
        usable = False
    if not usable:
        raise DatastoreError(
            f"the tuning of domain {domain} has parameters that the rule {name} cannot have: "
            f"run `knnlm tune {domain}` again"
        )
    return Weighing(name, parameters)


def _weighs(tried: Weighing, n: int, key_dim: int) -> bool:
    far = np.linspace(0.0, LARGEST_TRIED, n)
    evidence = Evidence(np.ones(n, np.bool_), np.zeros(n), dict.fromkeys(rule(tried.rule).features, far))
    lm = LmStatistics(np.zeros(n), np.zeros(n), np.zeros((n, key_dim)))
    weights: Weights = tried.weights(evidence, lm if tried.statistics else None)
    return weights.shape == (n,) and bool(((weights >= 0) & (weights <= 1)).all())
