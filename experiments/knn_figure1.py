"""The picture that explains it: three neighbors, their weights, equal words added up, and the mixture.

The paper's picture has distances 3, 4 and 5 whose weights are .7, .2 and .1 in round numbers, and adds those of equal
words. Here: exp(-d) normalised is .665, .245 and .090; where the first and the third store the same word it has .755;
and with lambda .25 a word of probability .2 that retrieval gives .755 has .339. Exact, up to rounding.
"""

import numpy as np

from experiments.experiment import KNN_LM, Experiment, Need
from experiments.lab import Lab, mixed
from experiments.records import Cell, Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import exact
from knnlm.neighbors import Neighbors, neighbor_log_probs

DISTANCES = (3.0, 4.0, 5.0)


def needs(_texts: Texts, _scale: Scale) -> list[Need]:
    """Nothing."""
    return []


def run(_lab: Lab) -> Findings:
    """The numbers by the library, and by hand."""
    apart, together = (_shares(values) for values in ((0, 1, 2), (0, 1, 0)))
    mixture = float(np.exp(mixed(np.log([0.2]), np.log([together[0]]), 0.25))[0])
    by_hand = np.exp(-np.array(DISTANCES)) / np.exp(-np.array(DISTANCES)).sum()
    rows: tuple[tuple[Cell, ...], ...] = (
        ("three words", *apart),
        ("first and third store the same word", *together, None),
        ("the same, mixed with .2 at lambda .25", mixture, None, None),
    )
    added = [by_hand[0] + by_hand[2], by_hand[1]]
    verdicts = (
        exact("weights are exp(-d), normalised", apart, by_hand.tolist(), 1e-6),
        exact("equal words add up", together, [float(x) for x in added], 1e-6),
        exact("the mixture is linear", [mixture], [0.75 * 0.2 + 0.25 * float(added[0])], 1e-6),
    )
    return Findings((Table("Probabilities of the words", ("", "first", "second", "third"), rows),), verdicts)


def _shares(values: tuple[int, ...]) -> list[float]:
    near = Neighbors(np.array([DISTANCES], np.float32), np.array([values], np.int32))
    return [float(x) for x in np.exp(neighbor_log_probs(near, 1.0).log_masses)]


EXPERIMENT = Experiment("The picture", f"{KNN_LM}, Figure 1", __doc__, needs, run)
