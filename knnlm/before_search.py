"""What is known of a prediction before anything is searched, and what retrieval is expected to gain by it. Pure.

Where the language model is unsure is in its distribution; where the datastore knows something is in the key alone. What
is fitted to keys sees them along few directions, and is stored as coefficients of the key itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnlm.gate import Parameters
from knnlm.messages import LmStatistics, required

DIRECTIONS = 16  # in which keys are seen
PRINCIPAL_ROWS = 2048  # keys that these are found from, at most
DIGITS = 7  # of each coefficient of a key

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Projection:
    """Vectors (n, d) as their places along a few directions. mean: (d,). directions: (d, p), orthonormal."""

    mean: Array
    directions: Array

    @classmethod
    def of(cls, vectors: npt.NDArray[np.floating]) -> "Projection":
        """The directions in which vectors (n, d) differ most, n >= 1: their first DIRECTIONS principal components."""
        step = -(-len(vectors) // PRINCIPAL_ROWS)
        some = vectors[::step].astype(np.float64)
        mean = some.mean(axis=0)
        _, _, directions = np.linalg.svd(some - mean, full_matrices=False)
        return cls(mean, directions[:DIRECTIONS].T)

    def places(self, vectors: npt.NDArray[np.floating]) -> Array:
        """(n, p)"""
        found: Array = (vectors.astype(np.float64) - self.mean) @ self.directions
        return found

    def coefficients(self, weights: Array) -> tuple[Array, Array]:
        """(d, ...) weights of vectors, and constants (...) to add, that say what weights (p, ...) say of places."""
        of_vectors = rounded(self.directions @ weights)
        return of_vectors, -self.mean @ of_vectors

    def unfolded(self, parameters: Parameters) -> Parameters:
        """Parameters of a gate over inputs and then vectors, from those over the same inputs and then places."""
        p = self.directions.shape[1]
        linear = np.asarray(parameters["linear"])
        of_vectors, more = self.coefficients(linear[-p:])
        result: dict[str, float | Sequence[float]] = {
            "bias": float(parameters["bias"] + more),
            "linear": [*linear[:-p].tolist(), *of_vectors.tolist()],
        }
        if "hidden" in parameters:
            bias = np.asarray(parameters["hidden_bias"])
            hidden = np.reshape(parameters["hidden"], (-1, len(bias)))
            of_vectors, more = self.coefficients(hidden[-p:])
            result |= {
                "hidden": np.concatenate([hidden[:-p], of_vectors]).ravel().tolist(),
                "hidden_bias": (bias + more).tolist(),
                "output": parameters["output"],
            }
        return result


def rounded(values: Array) -> Array:
    """The values with DIGITS digits, which is what many of them are stored with."""
    scale = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.where(values == 0, 1.0, np.abs(values)))))
    result: Array = np.round(values * scale) / scale
    return result


def expected_gain(lm: LmStatistics, gain: Array) -> Array:
    """(n,) nats that retrieval is expected to gain. gain: as `fit_gain` gives it. Raises Unavailable without the keys
    that it was fitted to."""
    known = _known(lm)
    m = known.shape[1]
    expected: Array = known @ gain[:m]
    return expected + required(lm.keys).astype(np.float64) @ gain[m:] if len(gain) > m else expected


def fit_gain(lm: LmStatistics, gained: Array) -> Array:
    """(6,) or, where there are keys, (6 + d,) coefficients by which `expected_gain` is nearest to what was gained, (n,)
    nats, by least squares."""
    known = _known(lm)
    if lm.keys is None or not len(gained):
        alone: Array = np.linalg.lstsq(known, gained)[0].astype(np.float64)
        return alone
    projection = Projection.of(lm.keys)
    wide = np.concatenate([known, projection.places(lm.keys)], axis=1)
    gain, of_places = np.split(np.linalg.lstsq(wide, gained)[0], [known.shape[1]])
    of_keys, more = projection.coefficients(of_places)
    gain[0] += more
    return np.concatenate([gain, of_keys])


def _known(lm: LmStatistics) -> Array:
    """(n, 6) what is known beside the key: 1, the LM's entropy and largest probability, and their products."""
    entropy, largest = lm.entropy.astype(np.float64), np.exp(lm.largest_log_prob.astype(np.float64))
    return np.stack([np.ones_like(entropy), entropy, largest, entropy**2, largest**2, entropy * largest], axis=1)
