"""Verdicts on numbers of which it is known what must come out, both ways."""

import numpy as np
import pytest

from experiments.verdicts import (
    Outcome,
    exact,
    falls,
    further_right,
    higher,
    interval,
    lower,
    optimum,
    ratio,
    valley,
)

DOCUMENTS = np.repeat(np.arange(40), 50)
RNG = np.random.default_rng(0)
NOISE = RNG.normal(0, 1, len(DOCUMENTS))
PER_DOCUMENT = np.repeat(RNG.normal(0, 0.5, 40), 50)


def test_a_difference_that_every_document_shows_holds_and_its_opposite_does_not() -> None:
    base = 3 + NOISE
    assert lower("x", base - 0.1, base, DOCUMENTS).outcome is Outcome.HOLDS
    assert lower("x", base + 0.1, base, DOCUMENTS).outcome is Outcome.FAILS
    assert higher("x", base + 0.1, base, DOCUMENTS).outcome is Outcome.HOLDS
    assert higher("x", base - 0.1, base, DOCUMENTS).outcome is Outcome.FAILS


def test_a_difference_that_documents_disagree_about_is_noise() -> None:
    base = 3 + NOISE
    difference = PER_DOCUMENT - PER_DOCUMENT.mean() + 0.01
    assert lower("x", base + difference, base, DOCUMENTS).outcome is Outcome.NOISE
    assert higher("x", base + difference, base, DOCUMENTS).outcome is Outcome.NOISE


def test_a_few_documents_decide_nothing() -> None:
    one, base = np.zeros(len(DOCUMENTS), np.int64), 3 + NOISE
    five = DOCUMENTS % 5
    for documents, outcome in ((one, Outcome.NOISE), (five, Outcome.NOISE), (DOCUMENTS % 6, Outcome.HOLDS)):
        assert lower("x", base - 0.1, base, documents).outcome is outcome
        assert falls("x", [base, base - 0.1], documents).outcome is outcome
        assert valley("x", np.stack([base, base - 0.1, base]), documents, [0, 0.5, 1]).outcome is outcome


def test_a_ratio_is_that_of_the_means_and_its_interval_holds_it() -> None:
    whole = 1 + 0.1 * PER_DOCUMENT
    value, low, high = ratio(0.4 * whole, whole, DOCUMENTS)
    assert [value, low, high] == pytest.approx([0.4] * 3)  # of one share in every document, whatever is drawn
    value, low, high = ratio(0.4 + 0.5 * PER_DOCUMENT, np.ones(len(DOCUMENTS)), DOCUMENTS)
    assert low < value < high
    assert value == pytest.approx(0.4 + 0.5 * PER_DOCUMENT.mean())


def test_documents_are_drawn_not_tokens() -> None:
    """Of 2,000 tokens of one mind within their documents the interval is that of 40 numbers."""
    _, low, high = interval(PER_DOCUMENT, DOCUMENTS)
    assert high - low == pytest.approx(2 * 1.96 * PER_DOCUMENT.std() / np.sqrt(40), rel=0.1)
    _, low, high = interval(PER_DOCUMENT, np.arange(len(DOCUMENTS)))
    assert high - low == pytest.approx(2 * 1.96 * PER_DOCUMENT.std() / np.sqrt(2000), rel=0.1)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        _, low, high = interval(np.repeat(rng.normal(0.3, 1, 40), 3), np.repeat(np.arange(40), 3))
        hits += low <= 0.3 <= high
    assert hits >= 51  # 57 expected; 51 or fewer once in a hundred


def test_losses_fall_where_each_does_and_not_where_one_rises() -> None:
    base = 3 + NOISE
    assert falls("x", [base, base - 0.1, base - 0.2], DOCUMENTS).outcome is Outcome.HOLDS
    assert falls("x", [base, base - 0.3, base - 0.2], DOCUMENTS).outcome is Outcome.FAILS
    assert falls("x", [base, base + 0.1], DOCUMENTS).outcome is Outcome.FAILS
    swaying = base + PER_DOCUMENT - PER_DOCUMENT.mean()
    assert falls("x", [base, swaying], DOCUMENTS).outcome is Outcome.NOISE
    with pytest.raises(ValueError, match="two settings"):
        falls("x", [base], DOCUMENTS)


def test_a_valley_has_its_lowest_between_higher_ends() -> None:
    at = [0.0, 0.25, 0.5, 0.75, 1.0]
    base = np.stack([3 + NOISE + (x - 0.5) ** 2 for x in at])
    assert valley("x", base, DOCUMENTS, at).outcome is Outcome.HOLDS
    slope = np.stack([3 + NOISE + x for x in at])
    assert valley("x", slope, DOCUMENTS, at).outcome is Outcome.FAILS


def test_an_optimum_further_right_is_told_from_one_that_is_not() -> None:
    at = np.linspace(0, 1, 21).tolist()
    sway = PER_DOCUMENT * 0.02
    left = np.stack([3 + NOISE + (x - 0.3 + sway) ** 2 for x in at])
    right = np.stack([3 + NOISE + (x - 0.7 + sway) ** 2 for x in at])
    assert further_right("x", right, left, DOCUMENTS, at).outcome is Outcome.HOLDS
    assert further_right("x", left, right, DOCUMENTS, at).outcome is Outcome.FAILS
    assert further_right("x", left, left, DOCUMENTS, at).outcome is Outcome.NOISE
    best, low, high = optimum(left, DOCUMENTS, at)
    assert low <= best <= high
    assert best == pytest.approx(0.3)


def test_exact_numbers_have_a_tolerance() -> None:
    assert exact("x", [1.0, 2.0], [1.0, 2.0005], 1e-3).outcome is Outcome.HOLDS
    assert exact("x", [1.0, 2.1], [1.0, 2.0], 1e-3).outcome is Outcome.FAILS
