"""Weights of all components of a mixture at once, fitted to what each of them said about held-out tokens. Pure.

Components that know the same things share what each would get alone, so weights fitted one after another are not the
best ones together.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from knnlm import gate
from knnlm.errors import InvalidRequest
from knnlm.rules import HIDDEN, LARGEST_LAMBDA, LOOKING, Observed, Parameters, best_lambda

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
    each other and to the LM's, until a round gains nothing. Where they exceed LARGEST_LAMBDA together, the best ones
    add up to just that: they are found by expectation maximisation, which leaves the LM's weight where it is. Raises
    InvalidRequest when there is no token.
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
    if weights[0] < 1 - LARGEST_LAMBDA:
        weights = _at_the_bound(stacked, weights[1:] / weights[1:].sum())
        loss = _loss(stacked, weights)
    return weights[1:], loss


def fit_gates(components: Sequence[Observed], weights: Sequence[float]) -> list[Parameters]:
    """Parameters of the rule "gate" for each of several components, fitted together to the likelihood of the mixture in
    which their weights make one softmax with the LM's (knnlm.rules.softmax); on the observed tokens never worse than
    `weights`, one for each, which leave something to the LM.

    components: what was seen of the same tokens, with the features of the rule and the LM's statistics.
    """
    odds = [weight / (1 - sum(weights)) for weight in weights]
    sources = [gate.Gated(LOOKING.inputs(o.evidence, o.lm), o.ratio, o.evidence.present) for o in components]
    return gate.fit_gates(
        sources, components[0].groups, starts=[o / (1 + o) for o in odds], largest=LARGEST_LAMBDA, hidden=HIDDEN
    )


def _at_the_bound(log_probs: Floats, shares: Floats) -> Floats:
    """(1 + c,) the best weights of which the components' add up to LARGEST_LAMBDA. shares: (c,) of it, to begin with.

    With the LM's weight given, components are mixtures of it with each of them, whose shares add up to one.
    """
    shares = 0.9 * shares + 0.1 / len(shares)  # what is 0 would stay 0
    lm, rest = log_probs[0] + np.log1p(-LARGEST_LAMBDA), log_probs[1:] + np.log(LARGEST_LAMBDA)
    parts = np.logaddexp(lm, rest)
    loss = np.inf
    for _ in range(MAX_ROUNDS):
        before, mixed = loss, _mixed(parts, shares)
        loss = -float(mixed.mean())
        if before - loss < LEAST_GAIN:
            break
        shares = shares * np.exp(parts - mixed).mean(axis=1)
    return np.concatenate([[1 - LARGEST_LAMBDA], LARGEST_LAMBDA * shares / shares.sum()])


def _mixed(log_probs: Floats, weights: Floats) -> Floats:
    """(n,) log-probabilities of a mixture of (c, n) by weights (c,)."""
    used = weights > 0
    mixed: Floats = np.logaddexp.reduce(log_probs[used] + np.log(weights[used])[:, None], axis=0)
    return mixed


def _loss(log_probs: Floats, weights: Floats) -> float:
    return -float(_mixed(log_probs, weights).mean())
