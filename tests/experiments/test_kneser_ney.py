"""The n-gram model beside the formula written out, and as a distribution."""

from collections import Counter

import numpy as np
import pytest

from experiments.kneser_ney import KneserNey

VOCABULARY = 7
RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(VOCABULARY, size=n) for n in (40, 3, 60, 1)]


def grams(length: int) -> list[tuple[int, ...]]:
    return [tuple(map(int, d[i : i + length])) for d in DOCUMENTS for i in range(len(d) - length + 1)]


def by_hand(token: int, context: tuple[int, ...], order: int) -> float:
    """Chen and Goodman 1999, eq. 12 and on, with sums over the whole vocabulary instead of kept ones."""
    length = len(context) + 1
    if length == order:
        counts = Counter(grams(length))
    else:  # by how many tokens an n-gram is preceded; at a document's beginning by its border, once for each
        preceded = set(grams(length + 1))
        counts = Counter(gram[1:] for gram in preceded)
        counts.update(tuple(map(int, d[:length])) for d in DOCUMENTS if len(d) >= length)
    once, twice = (sum(c == times for c in counts.values()) for times in (1, 2))
    discount = once / (once + 2 * twice) if once and twice else 0.5
    lower = by_hand(token, context[1:], order) if context else 1 / VOCABULARY
    total = sum(counts[(*context, w)] for w in range(VOCABULARY))
    if not total:
        return lower
    kinds = sum(counts[(*context, w)] > 0 for w in range(VOCABULARY))
    return (max(counts[(*context, token)] - discount, 0) + discount * kinds * lower) / total


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_are_those_of_the_formula_and_sum_to_one(order: int) -> None:
    model = KneserNey(DOCUMENTS, order, VOCABULARY)
    text = RNG.integers(VOCABULARY, size=30)
    expected = [
        by_hand(int(text[i]), tuple(map(int, text[max(0, i - order + 1) : i])), order) for i in range(1, len(text))
    ]
    assert np.exp(model.log_probs(text)) == pytest.approx(np.array(expected), rel=1e-12)
    for start in ((), (3,), (1, 2)):
        whole = [np.exp(model.log_probs(np.array([0, *start, w]))[-1]) for w in range(VOCABULARY)]
        assert sum(whole) == pytest.approx(1)
