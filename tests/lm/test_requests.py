from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InvalidRequest
from knnlm.lm.requests import Feed, batches, check, plan
from knnlm.messages import ForwardRequest

VOCAB, CONTEXT = 10, 6


def request(**changed: Any) -> ForwardRequest:
    """Two sequences, three positions, valid unless changed."""
    fields: dict[str, Any] = {
        "tokens": [np.array([1, 2, 3, 4], np.int32), np.array([5, 6], np.int32)],
        "positions": [np.array([0, 2], np.int32), np.array([1], np.int32)],
        "targets": np.array([7, 8, 9], np.int32),
    }
    return ForwardRequest(**(fields | changed))


def test_a_plan_feeds_no_token_behind_the_last_asked_position() -> None:
    first, second = plan(request(), vocab_size=VOCAB, context_length=CONTEXT)
    assert first.tokens.tolist() == [1, 2, 3]
    assert first.positions.tolist() == [0, 2]
    assert second.tokens.tolist() == [5, 6]
    assert (first.first_row, second.first_row) == (0, 2)


def test_a_sequence_without_positions_is_not_fed() -> None:
    asked = request(positions=[np.array([], np.int32), np.array([1])], targets=np.array([7]))
    (only,) = plan(asked, vocab_size=VOCAB, context_length=CONTEXT)
    assert only.tokens.tolist() == [5, 6]
    assert only.first_row == 0


def tokens(*first: int) -> list[Any]:
    return [np.array(first, np.int32), np.array([5, 6], np.int32)]


def positions(*first: int) -> list[Any]:
    return [np.array(first, np.int32), np.array([1], np.int32)]


@pytest.mark.parametrize(
    ("changed", "param", "message"),
    [
        ({"targets": None}, "full", "nothing is wanted"),
        ({"top_n": -1}, "top_n", r"0 \.\.\. 10, got -1"),
        ({"top_n": 11}, "top_n", r"0 \.\.\. 10, got 11"),
        ({"tokens": [], "positions": []}, "tokens", "no sequence"),
        ({"positions": [np.array([0])]}, "positions", "1 arrays, expected one per sequence: 2"),
        ({"tokens": tokens()}, "tokens", r"tokens\[0\] has 0 tokens, expected 1 \.\.\. 6"),
        ({"tokens": tokens(*range(7))}, "tokens", r"tokens\[0\] has 7 tokens, expected 1 \.\.\. 6"),
        ({"tokens": tokens(1, 2, 3, 10)}, "tokens", r"tokens\[0\] holds 10, expected 0 \.\.\. 9"),
        ({"tokens": tokens(1, -1, 3, 4)}, "tokens", r"tokens\[0\] holds -1, expected 0 \.\.\. 9"),
        (
            {"tokens": [np.array([[1]]), np.array([5, 6])]},
            "tokens",
            r"tokens\[0\] must have 1 dimension, got.*\(1, 1\)",
        ),
        ({"tokens": [np.array(3), np.array([5, 6])]}, "tokens", r"tokens\[0\] must have 1 dimension, got shape \(\)"),
        ({"tokens": [np.array([1.0, 2.0, 3.0]), np.array([5, 6])]}, "tokens", r"tokens\[0\] must hold integers"),
        ({"tokens": [np.array([True, False]), np.array([5, 6])]}, "tokens", r"must hold integers, got bool"),
        ({"positions": positions(2, 0)}, "positions", r"positions\[0\] must be ascending, got \[2, 0\]"),
        ({"positions": positions(2, 2)}, "positions", r"positions\[0\] must be ascending, got \[2, 2\]"),
        ({"positions": positions(0, 4)}, "positions", r"positions\[0\] holds 4, expected 0 \.\.\. 3"),
        ({"positions": positions(-1, 2)}, "positions", r"positions\[0\] holds -1, expected 0 \.\.\. 3"),
        ({"targets": np.array([7, 8])}, "targets", "2 tokens, expected one per position: 3"),
        ({"targets": np.array([7, 8, 10])}, "targets", r"targets holds 10, expected 0 \.\.\. 9"),
        ({"targets": np.array([7.0, 8.0, 9.0])}, "targets", "targets must hold integers, got float64"),
        ({"candidates": tokens(1)}, "candidates", "2 arrays, expected one per position: 3"),
        ({"candidates": [*tokens(1), np.array([10])]}, "candidates", r"candidates\[2\] holds 10, expected 0 \.\.\. 9"),
        ({"candidates": [*tokens(1), np.array([0.5])]}, "candidates", r"candidates\[2\] must hold integers"),
        ({"temperatures": np.ones(2)}, "temperatures", r"one number per position, \(3,\), got float64 \(2,\)"),
        ({"temperatures": np.array([True] * 3)}, "temperatures", "one number per position"),
        ({"temperatures": np.array([1, 0, 1.0])}, "temperatures", r"temperatures\[1\] must be finite and > 0, got 0"),
        ({"temperatures": np.array([1, 1, np.inf])}, "temperatures", r"temperatures\[2\] must be finite and > 0"),
        ({"temperatures": np.array([np.nan, 1, 1])}, "temperatures", r"temperatures\[0\] must be finite and > 0"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_was_expected(
    changed: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        plan(request(**changed), vocab_size=VOCAB, context_length=CONTEXT)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"tokens": [np.array([1, 2]), np.array([5, 10])], "positions": [np.array([0, 1]), np.array([1])]},
            r"tokens\[1\]",
        ),
        ({"positions": [np.array([0, 2]), np.array([2])]}, r"positions\[1\] holds 2, expected 0 \.\.\. 1"),
        ({"positions": [np.array([], np.int32), np.array([1, 0, 1])]}, r"positions\[1\] must be ascending"),
    ],
)
def test_the_sequence_that_is_wrong_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check(request(**changed), vocab_size=VOCAB, context_length=CONTEXT)


def test_positions_may_fall_from_one_sequence_to_the_next() -> None:
    check(request(positions=[np.array([1, 3]), np.array([0])]), vocab_size=VOCAB, context_length=CONTEXT)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_batches_hold_every_feed_once_and_stay_within_the_bound(lengths: list[int], bound: int) -> None:
    feeds = [Feed(np.zeros(n, np.int64), np.array([n - 1]), row) for row, n in enumerate(lengths)]
    grouped = batches(feeds, bound)
    assert sorted(feed.first_row for batch in grouped for feed in batch) == list(range(len(lengths)))
    for batch in grouped:
        widths = [len(feed.tokens) for feed in batch]
        assert widths == sorted(widths, reverse=True)
        assert len(batch) == 1 or len(batch) * widths[0] <= bound
