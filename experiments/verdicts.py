"""Whether a shape that a paper found is found here: decided by a stated test, never by eye. Pure.

Numbers of one text depend on each other, so every test draws whole documents again, with replacement, the same ones for
everything that is compared (a paired bootstrap over documents). A claim holds where the 95 % interval lies on its side,
does not hold where it lies on the other, and is within noise where it holds zero, or where there are few documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np
import numpy.typing as npt

__all__ = [
    "LEVEL", "Outcome", "Verdict", "by_interval", "exact", "falls", "further_right", "higher", "interval", "lower",
    "optimum", "ratio", "valley",
]  # fmt: skip

DRAWS = 2000
LEVEL = 0.95
MIN_DOCUMENTS = 6  # with fewer, too few different draws are possible for an interval to mean anything
NATS = "nats per token"

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]


class Outcome(StrEnum):
    """What a test says of a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    NOISE = "within noise"


@dataclass(frozen=True)
class Verdict:
    """value: of what was tested, in `unit`, with its interval from low to high. test: how it was decided."""

    claim: str
    outcome: Outcome
    value: float
    low: float
    high: float
    unit: str
    test: str

    @property
    def line(self) -> str:
        """One line for people."""
        shown = f"{self.value:+.4f} {self.unit} [{self.low:+.4f}, {self.high:+.4f}]"
        return f"**{self.outcome}**: {self.claim} ({shown}; {self.test})"


def lower(claim: str, first: Floats, second: Floats, documents: Ints) -> Verdict:
    """The mean of `first` lies below that of `second`. Both (n,), losses in nats of the same tokens; documents: (n,)
    the document of each."""
    return _below(claim, first - second, documents, NATS, "first less second")


def higher(claim: str, first: Floats, second: Floats, documents: Ints, unit: str = "") -> Verdict:
    """The mean of `first` lies above that of `second`, as `lower`."""
    found = _below(claim, second - first, documents, unit, "first less second")
    return Verdict(claim, found.outcome, -found.value, -found.high, -found.low, unit, found.test)


def falls(claim: str, losses: Sequence[Floats], documents: Ints) -> Verdict:
    """Losses (n,) of the same tokens fall from each setting to the next.

    Holds: the last lies below the first, and no step rises; does not hold: the last lies above the first, or a step
    rises, each step at a level shared among them; else within noise. The value is the last less the first.
    """
    steps = [after - before for before, after in pairwise(losses)]
    if not steps:
        raise ValueError("expected two settings or more")
    _, low, high = interval(losses[-1] - losses[0], documents)
    risen = any(interval(step, documents, level=1 - (1 - LEVEL) / len(steps))[1] > 0 for step in steps)
    outcome = Outcome.FAILS if risen or low > 0 else Outcome.HOLDS if high < 0 else Outcome.NOISE
    value = float((losses[-1] - losses[0]).mean())
    test = "last less first, and no step rises; paired bootstrap over documents"
    return Verdict(claim, _decided(outcome, documents), value, low, high, NATS, test)


def valley(claim: str, losses: Floats, documents: Ints, at: Sequence[float]) -> Verdict:
    """The lowest of several settings lies between two ends that are both higher.

    losses: (settings, n), of the settings `at`, in their order. The value is the lowest less the lower end.
    """
    sums, _ = _sums(losses, documents)
    best = int(np.argmin(sums.sum(axis=1)))
    ends = [losses[best] - losses[0], losses[best] - losses[-1]]
    found = [interval(end, documents) for end in ends]
    nearest = int(np.argmax([value for value, _, _ in found]))
    value, low, high = found[nearest]
    outcome = by_interval(low, high) if 0 < best < len(losses) - 1 else Outcome.FAILS
    test = f"lowest at {at[best]:g} less the lower of both ends; paired bootstrap over documents"
    return Verdict(claim, _decided(outcome, documents), value, low, high, NATS, test)


def optimum(losses: Floats, documents: Ints, at: Sequence[float]) -> tuple[float, float, float]:
    """Where losses (settings, n) are lowest on average, of the settings `at`, with its interval."""
    drawn = _drawn_optima(losses, documents, at)
    low, high = np.quantile(drawn[1:], _edges(LEVEL))
    return float(drawn[0]), float(low), float(high)


def further_right(
    claim: str, first: Floats, second: Floats, documents: Ints, at: Sequence[float], unit: str = "lambda"
) -> Verdict:
    """The best setting of `first` lies above that of `second`, both (settings, n) of the same tokens."""
    difference = _drawn_optima(first, documents, at) - _drawn_optima(second, documents, at)
    low, high = map(float, np.quantile(difference[1:], _edges(LEVEL)))
    test = "optimum less optimum, both found anew in each draw; paired bootstrap over documents"
    outcome = _decided(by_interval(-high, -low), documents)
    return Verdict(claim, outcome, float(difference[0]), low, high, unit, test)


def exact(claim: str, found: Sequence[float], expected: Sequence[float], tolerance: float) -> Verdict:
    """Numbers are those that are expected, up to a tolerance: nothing is drawn."""
    worst = float(np.abs(np.asarray(found) - np.asarray(expected)).max())
    outcome = Outcome.HOLDS if worst <= tolerance else Outcome.FAILS
    return Verdict(claim, outcome, worst, worst, worst, "largest difference", f"within {tolerance:g}")


def by_interval(low: float, high: float) -> Outcome:
    """The outcome of the claim that a number with this interval lies below zero."""
    return Outcome.HOLDS if high < 0 else Outcome.FAILS if low > 0 else Outcome.NOISE


def interval(values: Floats, documents: Ints, *, level: float = LEVEL, seed: int = 0) -> tuple[float, float, float]:
    """The mean of values (n,), and the interval of it when whole documents are drawn again."""
    sums, tokens = _sums(values[None], documents)
    counts = _draws(len(tokens), seed)
    means = (counts @ sums[0]) / (counts @ tokens)
    low, high = np.quantile(means[1:], _edges(level))
    return float(means[0]), float(low), float(high)


def ratio(part: Floats, whole: Floats, documents: Ints) -> tuple[float, float, float]:
    """The mean of `part` over that of `whole`, both (n,), and its interval as `interval`."""
    sums, _ = _sums(np.stack([part, whole]), documents)
    drawn = _draws(sums.shape[1], 0) @ sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = drawn[:, 0] / drawn[:, 1]
    low, high = np.nanquantile(ratios[1:], _edges(LEVEL))
    return float(ratios[0]), float(low), float(high)


def _below(claim: str, differences: Floats, documents: Ints, unit: str, what: str) -> Verdict:
    value, low, high = interval(differences, documents)
    test = f"{what}, paired bootstrap over {len(np.unique(documents))} documents"
    return Verdict(claim, _decided(by_interval(low, high), documents), value, low, high, unit, test)


def _decided(outcome: Outcome, documents: Ints) -> Outcome:
    """The outcome, where there are documents enough to draw from."""
    return outcome if len(np.unique(documents)) >= MIN_DOCUMENTS else Outcome.NOISE


def _drawn_optima(losses: Floats, documents: Ints, at: Sequence[float]) -> Floats:
    """(1 + DRAWS,) the setting with the lowest sum: of all documents, then of each draw."""
    sums, _ = _sums(losses, documents)
    found: Floats = np.asarray(at, np.float64)[np.argmin(_draws(sums.shape[1], 0) @ sums.T, axis=1)]
    return found


def _sums(values: Floats, documents: Ints) -> tuple[Floats, Floats]:
    """Sums of values (m, n) by document, (m, documents), and the tokens of each document."""
    _, number = np.unique(documents, return_inverse=True)
    tokens = np.bincount(number).astype(np.float64)
    return np.stack([np.bincount(number, row, len(tokens)) for row in values]), tokens


def _draws(documents: int, seed: int) -> Floats:
    """(1 + DRAWS, documents) how often each document counts: once in the first row."""
    drawn = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), DRAWS)
    return np.concatenate([np.ones((1, documents)), drawn.astype(np.float64)])


def _edges(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2
