"""An interpolated Kneser-Ney n-gram model of token ids (Kneser and Ney 1995; Chen and Goodman 1999).

    p(w | h) = max(c(h w) - D, 0) / c(h) + D * N1+(h .) / c(h) * p(w | h without its first token)

c counts tokens at the highest order and, below it, in how many contexts an n-gram stands; D = n1 / (n1 + 2 n2) of each
order; below unigrams every token is equally likely. Written out because what there is in Python is slow or not kept up.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["KneserNey"]

Gram = tuple[int, ...]


class KneserNey:
    """The model of some documents; nothing is counted across their borders."""

    def __init__(self, documents: Sequence[npt.NDArray[np.integer]], order: int, vocab_size: int) -> None:
        """order: the tokens of the longest n-grams. vocab_size: how many tokens there are at all."""
        self._vocab_size = vocab_size
        counts: list[Counter[Gram]] = [Counter() for _ in range(order)]  # by length of the n-gram, less one
        for document in documents:
            tokens = document.tolist()
            counts[-1].update(zip(*(tokens[i:] for i in range(order)), strict=False))
            for length in range(1, order):  # at a document's beginning there is no longer n-gram that ends here
                if len(tokens) >= length:
                    counts[length - 1][tuple(tokens[:length])] += 1
        for length in range(order - 1, 0, -1):
            counts[length - 1].update(gram[1:] for gram in counts[length])
        self._counts = counts
        self._totals: list[Counter[Gram]] = [Counter() for _ in range(order)]  # c(h), by the length of h
        self._kinds: list[Counter[Gram]] = [Counter() for _ in range(order)]  # N1+(h .)
        for length, grams in enumerate(counts):
            for gram, count in grams.items():
                self._totals[length][gram[:-1]] += count
                self._kinds[length][gram[:-1]] += 1
        self._discounts = [_discount(grams) for grams in counts]

    def log_probs(self, document: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """(n - 1,) natural log-probabilities of a document's tokens from the second one on."""
        tokens = tuple(document.tolist())
        longest = len(self._counts) - 1
        return np.log([self._p(tokens[i], tokens[max(0, i - longest) : i]) for i in range(1, len(tokens))])

    def _p(self, token: int, context: Gram) -> float:
        p = 1.0 / self._vocab_size
        for length in range(len(context) + 1):
            h = context[len(context) - length :]
            total = self._totals[length][h]
            if not total:
                break  # nor has a longer context been seen
            discount = self._discounts[length]
            found = max(self._counts[length][(*h, token)] - discount, 0.0)
            p = (found + discount * self._kinds[length][h] * p) / total
        return p


def _discount(grams: Counter[Gram]) -> float:
    """n1 / (n1 + 2 n2), with n1 n-grams that came once, n2 twice; 1/2 where that says nothing."""
    once, twice = (sum(count == times for count in grams.values()) for times in (1, 2))
    return once / (once + 2 * twice) if once and twice else 0.5
