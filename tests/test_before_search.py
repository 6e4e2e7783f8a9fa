"""What is fitted to keys along few directions, beside the same said of the keys themselves."""

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.before_search import DIRECTIONS, Projection, expected_gain, fit_gain
from knnlm.errors import Unavailable
from knnlm.gate import fit_gate, gate_logits
from knnlm.messages import LmStatistics

N, D = 3000, 40
Array = npt.NDArray[np.float64]


def keys(seed: int = 0) -> npt.NDArray[np.float32]:
    """Keys that differ in a few directions most."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((N, D)) * 1.5 ** -np.arange(D) @ rng.standard_normal((D, D)) + 3).astype(np.float32)


def statistics(seed: int = 0) -> LmStatistics:
    rng = np.random.default_rng(seed + 1)
    return LmStatistics(rng.uniform(0.1, 4, N), -rng.uniform(0.1, 4, N), keys(seed))


def test_the_directions_are_those_in_which_keys_differ_most() -> None:
    projection = Projection.of(keys())
    assert projection.directions.shape == (D, DIRECTIONS)
    np.testing.assert_allclose(projection.directions.T @ projection.directions, np.eye(DIRECTIONS), atol=1e-9)
    spread = projection.places(keys()).var(axis=0).sum()
    assert spread > 0.999 * keys().astype(np.float64).var(axis=0).sum()
    few = Projection.of(keys()[:5])
    assert few.places(keys()[:1]).shape == (1, 5)


@pytest.mark.parametrize("hidden", [0, 3])
def test_a_gate_over_directions_says_the_same_of_keys(hidden: int) -> None:
    rng = np.random.default_rng(2)
    projection, others = Projection.of(keys()), rng.standard_normal((N, 2))
    inputs = np.concatenate([others, projection.places(keys())], axis=1)
    ratio = np.expm1(rng.normal(size=N) + inputs[:, 2])
    fitted = fit_gate(inputs, ratio, np.arange(N) // 60, start=0.5, largest=0.99, hidden=hidden)
    of_keys = np.concatenate([others, keys().astype(np.float64)], axis=1)
    found = gate_logits(of_keys, projection.unfolded(fitted))
    np.testing.assert_allclose(found, gate_logits(inputs, fitted), atol=1e-4)
    assert found.std() > 0.1


def test_the_gain_is_what_least_squares_expect() -> None:
    lm, rng = statistics(), np.random.default_rng(3)
    entropy, p = lm.entropy, np.exp(lm.largest_log_prob)
    known = np.stack([np.ones(N), entropy, p, entropy**2, p**2, entropy * p], axis=1)
    gained = known @ rng.standard_normal(6) + 0.1 * keys()[:, 0] + rng.standard_normal(N)
    wide = np.concatenate([known, Projection.of(keys()).places(keys())], axis=1)
    for seen, columns in ((lm, wide), (LmStatistics(lm.entropy, lm.largest_log_prob), known)):
        best = columns @ np.linalg.solve(columns.T @ columns, columns.T @ gained)
        np.testing.assert_allclose(expected_gain(seen, fit_gain(seen, gained)), best, atol=1e-4)


def test_what_was_fitted_to_keys_needs_them() -> None:
    gain = fit_gain(statistics(), np.ones(N))
    with pytest.raises(Unavailable):
        expected_gain(LmStatistics(np.ones(2), -np.ones(2)), gain)
