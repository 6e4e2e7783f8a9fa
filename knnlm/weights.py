"""Weights of all components of a mixture at once, fitted to what each of them said about held-out tokens. Pure.

Components that know the same things share what each would get alone, so weights fitted one after another are not the
best ones together.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest
from knnlm.rules import LARGEST_LAMBDA, best_lambda

MAX_ROUNDS = 500  # a handful, unless components are nearly alike
LEAST_GAIN = 1e-10  # nats per token that a round must gain for another one

Floats = npt.NDArray[np.float64]


def fit_weights(
    lm_log_probs: npt.NDArray[np.floating], log_probs: Sequence[Floats], present: Sequence[npt.NDArray[np.bool_]]
) -> tuple[Floats, float]:
    """(c,) weights of c components beside the LM that make n tokens likeliest, at most LARGEST_LAMBDA together; and
    the mean negative log-likelihood with them, in nats.

    lm_log_probs: (n,) of the tokens that came. log_probs: of each component, (n,); -inf is a probability of zero.
    present: of each, (n,) where it has a distribution at all: elsewhere its weight is the LM's, as `mix` does it. The
    likelihood is concave in the weights. One weight after another is solved, the others keeping their proportions to
    each other and to the LM's, until a round gains nothing; those that exceed LARGEST_LAMBDA together are then scaled
    down to it. Raises InvalidRequest when there is no token.
    """
    if not len(lm_log_probs):
        raise InvalidRequest("expected one or more observed tokens, got none")
    lm = lm_log_probs.astype(np.float64)
    rows = [lm, *(np.where(there, found, lm) for found, there in zip(log_probs, present, strict=True))]
    stacked = np.stack(rows)  # (1 + c, n)
    weights = np.eye(len(rows))[0]
    loss = _loss(stacked, weights)
    for _ in range(MAX_ROUNDS if len(rows) > 1 else 0):
        before = loss
        for j in range(1, len(rows)):
            others = weights.copy()
            others[j] = 0.0
            others /= others.sum()
            lmbda = best_lambda(_mixed(stacked, others), stacked[j])
            weights = (1 - lmbda) * others
            weights[j] = lmbda
        loss = _loss(stacked, weights)
        if before - loss < LEAST_GAIN:
            break
    if weights[0] < 1 - LARGEST_LAMBDA:  # what is left is shared in these proportions
        weights[1:] *= LARGEST_LAMBDA / weights[1:].sum()
        weights[0] = 1 - LARGEST_LAMBDA
        loss = _loss(stacked, weights)
    return weights[1:], loss


def _mixed(log_probs: Floats, weights: Floats) -> Floats:
    """(n,) log-probabilities of a mixture of (c, n) by weights (c,)."""
    used = weights > 0
    mixed: Floats = np.logaddexp.reduce(log_probs[used] + np.log(weights[used])[:, None], axis=0)
    return mixed


def _loss(log_probs: Floats, weights: Floats) -> float:
    return -float(_mixed(log_probs, weights).mean())
