"""What a memory is trained to say of each entry: p_kNN and the token that came, as one sparse distribution. Pure.

The loss of Memory Decoder (Cao et al. 2025, arXiv 2508.09874) is beta KL(p || q) + (1 - beta) CE(y, q), with p the
targets, y the token that came and q the memory. With t = beta p + (1 - beta) delta_y it equals CE(t, q) - beta H(p):
cross-entropy to soft labels, and a constant. No q comes below H(t) - beta H(p), the floor of the loss.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnlm.neighbors import TokenMasses

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SoftLabels:
    """The soft labels of n entries.

    tokens: (n, s) int64, distinct in a row but for padding. weights: (n, s) float64, t of these tokens, 0 at padding.
    entropy: (n,) H(t). constant: (n,) beta H(p), what the loss is less than CE(t, q).
    """

    tokens: npt.NDArray[np.int64]
    weights: Float64
    entropy: Float64
    constant: Float64

    @property
    def floor(self) -> Float64:
        """(n,) the least loss that any distribution has."""
        return self.entropy - self.constant

    def rows(self, chosen: npt.NDArray[np.int64]) -> "SoftLabels":
        return SoftLabels(self.tokens[chosen], self.weights[chosen], self.entropy[chosen], self.constant[chosen])


def soft_labels(masses: TokenMasses | None, values: npt.NDArray[np.integer], beta: float) -> SoftLabels:
    """The soft labels of n entries.

    masses: n rows that sum to one, or are empty; None for none at all. values: (n,) the tokens that came.
    A row without targets is trained on its token alone, as if beta were 0.
    """
    n = len(values)
    if masses is None or beta == 0:
        return SoftLabels(values[:, None].astype(np.int64), np.ones((n, 1)), np.zeros(n), np.zeros(n))
    counts = np.diff(masses.offsets)
    share = np.where(counts > 0, beta, 0.0)
    rows, p = masses.rows, np.exp(masses.log_masses)
    width = 1 + int(counts.max(initial=0))
    tokens, weights = np.zeros((n, width), np.int64), np.zeros((n, width))
    tokens[:, 0], weights[:, 0] = values, 1 - share
    places = 1 + np.arange(len(p)) - masses.offsets[rows]
    tokens[rows, places], weights[rows, places] = masses.tokens, beta * p
    own = masses.tokens == values[rows]  # the token that came is in the first place alone
    weights[rows[own], 0] += beta * p[own]
    weights[rows[own], places[own]] = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(weights > 0, weights * np.log(weights), 0.0).sum(axis=1)
    of_targets = np.bincount(rows, -p * masses.log_masses, n)
    return SoftLabels(tokens, weights, entropy, share * of_targets)
