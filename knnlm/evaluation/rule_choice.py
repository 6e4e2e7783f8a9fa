"""Which lambda rule a domain gets: all are fitted to some of the documents and measured on the others, and the best is
taken where it is better than one lambda for everything, beyond what chance does to that many documents. Pure."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest
from knnlm.evaluation.tuning import Observations, losses, seen
from knnlm.messages import RuleQuality
from knnlm.rules import FIXED, RULES, Weighing

FOLDS = 5  # parts of the documents, each measured with what was fitted to the others
DRAWS = 2000  # resamples of the documents
LEVEL = 0.95  # of the intervals


def compare(observations: Observations, temperature: float, names: Sequence[str] = tuple(RULES)) -> list[RuleQuality]:
    """The rules of these names by cross-validation over documents, at one temperature; one is chosen: the best of those
    whose whole interval lies below "fixed", else "fixed".

    Raises InvalidRequest for fewer than FOLDS documents, an unknown rule, and one that needs statistics of the LM when
    there are none.
    """
    found = held_out_losses(observations, temperature, names)
    documents = _documents(observations)
    rows = []
    for name in names:
        low, high = interval(found[name] - found[FIXED], documents)
        perplexity = float(np.exp(found[name].mean()))
        rows.append(RuleQuality(name, perplexity, float((found[name] - found[FIXED]).mean()), low, high))
    better = [row for row in rows if row.high < 0]
    best = min(better, key=lambda row: row.difference).name if better else FIXED
    return [RuleQuality(**{**vars(row), "chosen": row.name == best}) for row in rows]


def held_out_losses(
    observations: Observations, temperature: float, names: Sequence[str]
) -> Mapping[str, npt.NDArray[np.float64]]:
    """(n,) by rule, the negative log-probability of each token with parameters fitted to documents without its own; the
    rule "fixed" is among them. Raises as `compare`."""
    documents = _documents(observations)
    _, number = np.unique(documents, return_inverse=True)
    if number.max() + 1 < FOLDS:
        raise InvalidRequest(
            f"rules are compared over documents: expected at least {FOLDS}, got {number.max() + 1}", param="rule"
        )
    names = list(dict.fromkeys([FIXED, *names]))
    observed = seen(observations, temperature, names)
    found = {name: np.empty(len(number)) for name in names}
    for fold in range(FOLDS):
        left_out = number % FOLDS == fold
        fitted_to, measured = observed.at(~left_out), observed.at(left_out)
        for name in names:
            parameters = RULES[name].fit(fitted_to)
            found[name][left_out] = losses(measured, Weighing(name, parameters))
    return found


def interval(
    differences: npt.NDArray[np.float64], documents: npt.NDArray[np.integer], *, seed: int = 0
) -> tuple[float, float]:
    """The LEVEL interval of the mean of n tokens' differences, when whole documents are drawn again and again.

    documents: (n,) the document of each token.
    """
    _, number = np.unique(documents, return_inverse=True)
    sums, tokens = np.bincount(number, differences), np.bincount(number)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(DRAWS, len(sums)))
    means = sums[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _documents(observations: Observations) -> npt.NDArray[np.int64]:
    if observations.document_of is None:
        raise InvalidRequest("rules are compared over documents, which are not known of these tokens", param="rule")
    return observations.document_of
