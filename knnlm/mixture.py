"""Mixing distributions: the language model and any number of components, in log space, by weights of the components.

lambda is always the weight of what is retrieved. Weight 0 is the component's absence exactly, weight 1 exactly the
component; nothing is clipped or floored on the way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest
from knnlm.neighbors import TokenMasses

TOLERANCE = 1e-9  # how far over one the weights may add up: rounding of decimal fractions


@dataclass(frozen=True)
class Component:
    """One distribution beside the LM's.

    log_probs: (n,) of chosen targets, (n, V), or n rows of masses, elsewhere zero. weight: (n,) float64 in [0, 1], 0
    where the component is absent.
    """

    name: str
    log_probs: npt.NDArray[np.float64] | TokenMasses
    weight: npt.NDArray[np.float64]


def mix(lm_log_probs: npt.NDArray[np.floating], components: Sequence[Component]) -> npt.NDArray[np.float64]:
    """log p(w) with p(w) = (1 - sum of weights) p_LM(w) + sum of weight_c p_c(w) (Khandelwal et al. 2020,
    arXiv 1911.00172, eq. 3).

    lm_log_probs: (n,) or (n, V); every component has the same shape. Returns float64 of that shape. Raises
    InvalidRequest when a weight lies outside [0, 1], the weights of a row exceed one, or shapes differ.
    """
    result = lm_log_probs.astype(np.float64)
    total = np.zeros(len(result))
    for component in components:
        weight = component.weight
        if _shape(component, result) != result.shape or weight.shape != result.shape[:1]:
            raise InvalidRequest(
                f"component {component.name} has log_probs {_shape(component, result)} and weight {weight.shape}, "
                f"expected {result.shape} and {result.shape[:1]}"
            )
        if not np.all((weight >= 0) & (weight <= 1)):
            raise InvalidRequest(
                f"lambda of {component.name} must lie in [0, 1], got {weight[~((weight >= 0) & (weight <= 1))][0]}",
                param="lambda",
            )
        total += weight
    if np.any(total > 1 + TOLERANCE):
        raise InvalidRequest(
            f"the weights of all components add up to {total.max():g}, at most 1 is left", param="lambda"
        )
    if not components:
        return result
    wide = (slice(None),) + (None,) * (result.ndim - 1)
    with np.errstate(divide="ignore"):  # log 0 = -inf is what an absent component must weigh
        result += np.log(np.clip(1 - total, 0, 1))[wide]
        for component in components:
            log_weight = np.log(component.weight)
            if isinstance(component.log_probs, TokenMasses):  # elsewhere nothing is added
                masses = component.log_probs
                places = (masses.rows, masses.tokens)
                result[places] = np.logaddexp(result[places], masses.log_masses + log_weight[masses.rows])
            else:
                result = np.logaddexp(result, component.log_probs + log_weight[wide])
    return result


def _shape(component: Component, result: npt.NDArray[np.float64]) -> tuple[int, ...]:
    masses = component.log_probs
    return (len(masses), *result.shape[1:]) if isinstance(masses, TokenMasses) else masses.shape
