"""The continuous cache: the distribution that the earlier positions of the same text give (Grave et al. 2017, arXiv
1612.04426). Pure: arrays in, arrays out, log space, float64.

    p_cache(w) = sum of exp(theta h_t . h_i) over earlier places i with token w / the same sum over all earlier places

A place of a text has the key from which its token was predicted and, once it has been seen, that token.
"""

import math

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest
from knnlm.neighbors import TokenMasses, stacked, token_masses, tops
from knnlm.options import check_theta

BLOCK_BYTES = 1 << 22  # bytes of float64 scores that are made at a time
BLOCK_ROWS = 256  # places that are asked at a time, at most


def cache_log_probs(
    keys: npt.NDArray[np.floating],
    tokens: npt.NDArray[np.integer],
    first: int,
    *,
    theta: float,
    size: int,
    targets: npt.NDArray[np.integer] | None = None,
) -> npt.NDArray[np.float64] | TokenMasses:
    """`cache_evidence` without features."""
    return cache_evidence(keys, tokens, first, theta=theta, size=size, targets=targets)[0]


def cache_evidence(
    keys: npt.NDArray[np.floating],
    tokens: npt.NDArray[np.integer],
    first: int,
    *,
    theta: float,
    size: int,
    targets: npt.NDArray[np.integer] | None = None,
    features: bool = False,
) -> tuple[npt.NDArray[np.float64] | TokenMasses, dict[str, npt.NDArray[np.float64]]]:
    """p_cache at the places first ... n - 1 of n consecutive ones: of targets (n - first,), or whole distributions.
    And, where wanted, the features that neighbors have by these names (knnlm/domains.py), each (n - first,): squared
    distances are those of the keys, "nearest" and "nearness" of all places that are seen.

    keys: (n, d) of all places. tokens: (>= n - 1,) of the same places; the place i is asked with keys[i] and sees the
    `size` places before it, never its own token. A place that nothing precedes has -inf, or an empty row. Raises
    InvalidRequest unless 0 <= theta <= knnlm.options.MAX_THETA and size >= 1.
    """
    check_theta(theta)
    if size < 1:
        raise InvalidRequest(f"size must be >= 1, got {size}", param="size")
    n = len(keys)
    widened = keys.astype(np.float64)
    squares = np.einsum("nd,nd->n", widened, widened) if features else np.empty(0)
    found = np.full(n - first, -np.inf)
    parts: list[TokenMasses] = []
    looked_at: list[dict[str, npt.NDArray[np.float64]]] = []
    lo = first
    while lo < n:
        start = max(0, lo - size)
        hi = min(n, lo + max(1, min(BLOCK_ROWS, BLOCK_BYTES // (8 * (lo - start + BLOCK_ROWS)))))
        places = np.arange(start, hi - 1)  # that any of these rows sees
        asked = np.arange(lo, hi)[:, None]
        seen = (places < asked) & (places >= asked - size)
        products = widened[lo:hi] @ widened[start : hi - 1].T
        scores = np.where(seen, theta * products, -np.inf)
        scores -= tops(scores)
        values = np.asarray(tokens[start : hi - 1], np.int32)
        if targets is None or features:
            parts.append(token_masses(np.where(seen, values, np.int32(-1)), scores).normalized())
        if features:
            distances = squares[lo:hi, None] + squares[start : hi - 1] - 2 * products
            looked_at.append(_features(np.maximum(distances, 0.0), seen, parts[-1]))
        if targets is not None:
            hits = np.where(values == targets[lo - first : hi - first, None], scores, -np.inf)
            found[lo - first : hi - first] = _log_sum(hits) - _log_sum(scores, empty=0.0)
        lo = hi
    columns = {name: np.concatenate([part[name] for part in looked_at]) for name in (looked_at or [{}])[0]}
    return (found if targets is not None else stacked(parts)), columns


def _features(
    distances: npt.NDArray[np.float64], seen: npt.NDArray[np.bool_], masses: TokenMasses
) -> dict[str, npt.NDArray[np.float64]]:
    nearest = np.where(seen, distances, np.inf).min(axis=1, initial=np.inf)
    farthest = np.where(seen, distances, 0.0).max(axis=1, initial=0.0)
    agreement = np.zeros(len(seen))
    np.maximum.at(agreement, masses.rows, np.exp(masses.log_masses))
    return {
        "nearest": nearest,
        "nearness": np.divide(nearest, farthest, out=np.ones_like(farthest), where=farthest > 0),
        "agreement": agreement,
        "distinct": np.diff(masses.offsets).astype(np.float64),
    }


def _log_sum(scores: npt.NDArray[np.float64], empty: float = -math.inf) -> npt.NDArray[np.float64]:
    """(m,) log of the sum of exp of each row; `empty` where all of it is -inf."""
    top = tops(scores)
    with np.errstate(divide="ignore"):
        sums: npt.NDArray[np.float64] = np.log(np.exp(scores - top).sum(axis=1)) + top[:, 0]
    return np.where(np.isneginf(sums), empty, sums)
