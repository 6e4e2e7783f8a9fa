"""Wordings and shares of which it is known what must come out, both ways."""

import numpy as np
import pytest

from experiments.knn_introduction import pair_shares, shares, wordings
from experiments.verdicts import Outcome

RNG = np.random.default_rng(0)
FACTS = RNG.normal(0, 1, (20, 16)).astype(np.float32)
WORDS = np.repeat(RNG.normal(0, 1, (4, 16)), 5, axis=0).astype(np.float32)
STORED = RNG.normal(0, 1, (500, 16)).astype(np.float32)


def test_keys_that_follow_what_is_said_hold_both_claims() -> None:
    _, verdicts = wordings(FACTS, FACTS + 0.1 * WORDS, STORED)
    assert [v.outcome for v in verdicts] == [Outcome.HOLDS, Outcome.HOLDS]


def test_keys_that_follow_the_words_do_not_hold_the_second() -> None:
    _, verdicts = wordings(WORDS + 0.1 * FACTS, WORDS[::-1] + 0.1 * FACTS, STORED)
    assert verdicts[1].outcome is Outcome.FAILS
    far = wordings(FACTS, FACTS + 10, STORED)[1]
    assert far[0].outcome is Outcome.FAILS
    assert far[0].value == pytest.approx(0.5)  # every entry is nearer


def test_shares_are_those_counted_by_hand() -> None:
    before, values = RNG.integers(5, size=300), RNG.integers(7, size=300)
    last, targets = RNG.integers(6, size=50), RNG.integers(8, size=50)  # 5 and 7 are never stored
    alone, behind = shares(values, targets), pair_shares(before, values, last, targets)
    for i, (token, target) in enumerate(zip(last, targets, strict=True)):
        assert alone[i] == pytest.approx(np.mean(values == target))
        here = values[before == token]
        assert behind[i] == pytest.approx(np.mean(here == target) if len(here) else 0)
