"""The choice of the next token from a mixed distribution: penalties, temperature, min-p, top-k, top-p, a draw. Pure.

Of a distribution over a large vocabulary only a part may be known: the likeliest tokens, some others, and how much the
rest weighs together. Then a token is chosen only where every completion of that part gives the same choice; else None
says that the whole distribution is needed. So a choice never differs from the one made with all of it.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest

HEADS = (5.0, 9.0, math.inf)  # nats below the likeliest: the tokens that are put in order, more where these do not do
MAX_PENALTY = 2.0  # as in OpenAI's interface
MAX_LOGIT_BIAS = 100.0  # the same
MAX_BIASED_TOKENS = 1024

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen from p, in this order.

    logit_bias: added to log p of a token. presence_penalty, frequency_penalty: subtracted from log p of a token that
    was generated before, once, and for each time. temperature: log p is divided by it; 0 takes the likeliest token.
    min_p: tokens less likely than this share of the likeliest are left out. top_k: only the k likeliest stay; 0 keeps
    all. top_p: of those, the fewest likeliest that have this share of their probability. Raises InvalidRequest, naming
    the field, for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature <= 1e6, ">= 0, at most 1e6")
        # below it p^(1/temperature) is the likeliest token alone, but for ties
        _check("temperature", self.temperature, self.temperature == 0 or self.temperature >= 1e-3, "0 or >= 0.001")
        _check("top_k", self.top_k, self.top_k >= 0, ">= 0")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, value, abs(value) <= MAX_PENALTY, f"in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}]")
        if len(self.logit_bias) > MAX_BIASED_TOKENS:
            raise InvalidRequest(
                f"logit_bias may name {MAX_BIASED_TOKENS} tokens, got {len(self.logit_bias)}", param="logit_bias"
            )
        for token, bias in self.logit_bias.items():
            if not abs(bias) <= MAX_LOGIT_BIAS:
                raise InvalidRequest(
                    f"logit_bias of token {token} must lie in [-{MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}], got {bias}",
                    param="logit_bias",
                )

    @property
    def penalises(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class Known:
    """What is known of one distribution over the vocabulary.

    tokens: (m,) distinct ids. log_probs: (m,) float64, theirs. bound: no other token has a larger log-probability.
    log_rest: log of the sum of p^(1/temperature) over all others. Both -inf where all tokens are known.
    """

    tokens: npt.NDArray[np.integer]
    log_probs: Floats
    bound: float = -math.inf
    log_rest: float = -math.inf


def uniform(seed: int, choice: int, step: int) -> float:
    """A number in [0, 1) that depends on nothing but these three: the draw of one token of one choice."""
    digest = hashlib.blake2b(f"{seed} {choice} {step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def choose(known: Known, options: SamplingOptions, counts: Mapping[int, int], draw: float) -> int | None:
    """The next token; None where that depends on tokens that are not known.

    counts: how often each token was generated before. Its tokens, and those of logit_bias, must be known. draw: in
    [0, 1). The token is the first, in order of falling probability and then of ids, at which the sum of probabilities
    passes `draw`. Raises InvalidRequest where no token is left.
    """
    scores = _adjusted(known, options, counts)
    largest = float(scores.max(initial=-math.inf))
    if largest == -math.inf and known.bound == -math.inf:
        raise InvalidRequest("logit_bias and penalties leave no token to generate", param="logit_bias")
    if options.temperature == 0:
        return int(known.tokens[scores == largest].min()) if largest > known.bound else None
    bound, total = known.bound, 0.0  # p sums to one
    if scores is not known.log_probs or options.temperature != 1:
        scores = scores / options.temperature
        bound, largest = known.bound / options.temperature, largest / options.temperature
        total = float(np.logaddexp(_log_sum(scores), known.log_rest))
    for depth in HEADS:
        least = max(bound, largest - depth)
        chosen = _draw(known.tokens, scores, least, total, options, draw)
        if chosen is not None or least == bound:
            return chosen
    return None


def _adjusted(known: Known, options: SamplingOptions, counts: Mapping[int, int]) -> Floats:
    """(m,) log-probabilities with bias and penalties."""
    changes = dict(options.logit_bias)
    if options.penalises:
        for token, count in counts.items():
            penalty = options.presence_penalty + options.frequency_penalty * count
            changes[token] = changes.get(token, 0.0) - penalty
    if not changes:
        return known.log_probs
    scores = known.log_probs.copy()
    order = np.argsort(known.tokens)
    tokens = np.fromiter(changes, np.int64, len(changes))
    places = order[np.searchsorted(known.tokens, tokens, sorter=order)]
    scores[places] += np.fromiter(changes.values(), np.float64, len(changes))
    return scores


def _draw(
    tokens: npt.NDArray[np.integer], scores: Floats, bound: float, total: float, options: SamplingOptions, draw: float
) -> int | None:
    """The drawn token where those with more than `bound` decide it; scores: log p / temperature, total: log of their
    exponentials' sum."""
    places = np.flatnonzero(scores > bound)
    order = places[np.lexsort((tokens[places], -scores[places]))]
    ordered, count = scores[order], len(order)
    whole = bound == -math.inf  # whether these are all that can be drawn
    if not count:
        return None
    if options.min_p > 0:
        least = ordered[0] + math.log(options.min_p)
        count, whole = int((ordered[:count] >= least).sum()), whole or bound < least
    if options.top_k and options.top_k <= count:
        count, whole = options.top_k, True
    if not whole and (options.min_p > 0 or options.top_k):
        return None
    if whole:
        total = _log_sum(ordered[:count])
    sums = np.cumsum(np.exp(ordered[:count] - total))
    if options.top_p < 1:
        enough = int(np.searchsorted(sums, options.top_p * (1 - 1e-12)))  # 0.1 + 0.2 + 0.7 may sum to less than 1
        if enough < count:
            count, whole = enough + 1, True
        elif not whole:
            return None
    mass = float(sums[count - 1]) if whole else 1.0
    at = int(np.searchsorted(sums[:count], draw * mass, side="right"))
    if at == count and not whole:
        return None
    return int(tokens[order[min(at, count - 1)]])


def _log_sum(values: Floats) -> float:
    top = float(values.max(initial=-math.inf))
    return top if top == -math.inf else top + math.log(float(np.exp(values - top).sum()))


def _check(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise InvalidRequest(f"{name} must be {expected}, got {value}", param=name)
