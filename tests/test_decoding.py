"""One kNN-LM step and the windows over a long text."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.decoding import (
    DEFAULT_WINDOW,
    Retrieved,
    choose_windows,
    mix_distributions,
    mix_targets,
    plan_fed_windows,
    plan_windows,
    top_tokens,
)
from knnlm.errors import InvalidRequest
from knnlm.messages import DomainInfo
from knnlm.neighbors import Neighbors
from knnlm.testing import ToyLanguageModel

VOCAB = 8
TOY = ToyLanguageModel()


def domain_info(context_length: int | None, min_context: int | None) -> DomainInfo:
    return DomainInfo(
        "toy", "v1", ("v1",), "ready", 1, 1, 16, "float16", "toy", "flat", "toy", "", "", None,
        context_length=context_length, min_context=min_context,
    )  # fmt: skip


def lm(n: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, VOCAB))
    return x - np.logaddexp.reduce(x, axis=1, keepdims=True)


def retrieved(domain: str, n: int, seed: int, **options: float) -> Retrieved:
    rng = np.random.default_rng(seed)
    values = rng.integers(-1, VOCAB, (n, 5)).astype(np.int32)
    values[0] = -1  # the first query finds nothing
    neighbors = Neighbors(np.sort(rng.uniform(0, 9, (n, 5)), axis=1).astype(np.float32), values)
    return Retrieved(domain, neighbors, options.get("temperature", 2.0), options.get("lmbda", 0.3))


@given(st.integers(0, 200), st.integers(2, 20), st.data())
def test_windows_cover_every_target_once_with_enough_context(length: int, context: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(1, context - 1))
    windows = plan_windows(length, context, least)
    targets = [t for w in windows for t in range(w.first, w.end)]
    assert targets == list(range(1, length))
    for w in windows:
        assert 0 <= w.start < w.first < w.end <= length
        assert w.end - w.start <= context
        assert w.first - w.start >= min(least, w.first)
        np.testing.assert_array_equal(w.start + w.positions + 1, np.arange(w.first, w.end))


@given(st.integers(0, 200), st.integers(3, 20), st.data())
def test_windows_that_begin_with_bos_feed_no_more_and_ask_for_the_same_targets(
    length: int, context: int, data: st.DataObject
) -> None:
    least, bos = data.draw(st.integers(1, context - 1)), 7
    tokens = np.arange(1000, 1000 + length, dtype=np.int32)
    windows = plan_fed_windows(length, context, least, bos)
    assert [t for w in windows for t in range(w.first, w.end)] == list(range(1, length))
    for w in windows:
        fed = w.fed(tokens)
        assert len(fed) == len(w) <= context
        assert (fed[0] == bos) == (w.start > 0)
        np.testing.assert_array_equal(fed[w.positions], tokens[w.first - 1 : w.end - 1])
        assert w.positions[0] + 1 >= min(least, w.first)
    assert plan_fed_windows(length, context, least, None) == plan_windows(length, context, least)


@pytest.mark.parametrize("least", [0, 8, 9, -1])
def test_min_context_must_leave_room(least: int) -> None:
    with pytest.raises(InvalidRequest, match="min_context"):
        plan_windows(10, 8, least)


@pytest.mark.parametrize(
    ("model", "made_with", "asked", "expected"),
    [
        (512, None, (None, None), (512, 256)),
        (131_072, None, (None, None), (DEFAULT_WINDOW, DEFAULT_WINDOW // 2)),
        (131_072, None, (65_536, None), (65_536, 32_768)),
        (131_072, (8192, 100), (None, None), (8192, 100)),
        (512, (64, 48), (None, None), (64, 48)),
        (512, (64, 48), (None, 8), (64, 8)),
        (512, (64, 48), (128, None), (128, 64)),
        (64, (128, 100), (None, None), (64, 63)),  # the model takes less than when the keys were made
        (512, (None, None), (None, None), (512, 256)),  # from a service that does not say
    ],
)
def test_windows_are_those_asked_for_else_the_domains_else_bounded(
    model: int,
    made_with: tuple[int | None, int | None] | None,
    asked: tuple[int | None, int | None],
    expected: tuple[int, int],
) -> None:
    info = replace(TOY.info, context_length=model)
    domains = [] if made_with is None else [domain_info(*made_with), domain_info(32, 4)]
    assert choose_windows(info, domains, *asked) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((1, None), r"context_length must lie in \[2, 32\], got 1"),
        ((33, None), r"context_length must lie in \[2, 32\], got 33"),
        ((None, 0), r"min_context must lie in \[1, 32\), got 0"),
        ((8, 8), r"min_context must lie in \[1, 8\), got 8"),
    ],
)
def test_windows_that_cannot_be_are_refused(asked: tuple[int | None, int | None], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        choose_windows(TOY.info, (), *asked)


@pytest.mark.parametrize("combine", ["mixture", "union"])
@pytest.mark.parametrize("domains", [1, 2, 3])
def test_targets_equal_the_distribution(combine: str, domains: int) -> None:
    parts = [retrieved(f"d{i}", 4, seed=i) for i in range(domains)]
    targets = np.array([0, 3, 7, 2])
    whole = mix_distributions(lm(4), parts, combine=combine)
    one = mix_targets(lm(4)[np.arange(4), targets], targets, parts, combine=combine)
    np.testing.assert_allclose(one.log_probs, whole.log_probs[np.arange(4), targets], rtol=1e-12)
    assert whole.knn_log_probs is not None
    assert one.knn_log_probs is not None
    np.testing.assert_allclose(one.knn_log_probs, whole.knn_log_probs[np.arange(4), targets], rtol=1e-12)
    np.testing.assert_allclose(np.exp(whole.log_probs).sum(axis=1), 1, rtol=1e-12)


def test_the_parts_explain_the_mixture() -> None:
    whole = mix_distributions(lm(4), [retrieved("a", 4, 1), retrieved("b", 4, 2, lmbda=0.1, temperature=9.0)])
    assert whole.knn_log_probs is not None
    w = whole.weight[:, None]
    p = (1 - w) * np.exp(whole.lm_log_probs) + w * np.exp(whole.knn_log_probs)
    np.testing.assert_allclose(np.exp(whole.log_probs), p, rtol=1e-12)
    np.testing.assert_array_equal(whole.log_probs[0], lm(4)[0])  # nothing found: exactly the LM
    np.testing.assert_allclose(whole.weight[1:], 0.4)


def test_union_is_one_softmax_and_not_a_mixture() -> None:
    near = Neighbors(np.array([[1.0]], np.float32), np.array([[2]], np.int32))
    far = Neighbors(np.array([[5.0]], np.float32), np.array([[3]], np.int32))
    parts = [Retrieved("near", near, 1.0, 0.25), Retrieved("far", far, 1.0, 0.25)]
    union = mix_distributions(lm(1), parts, combine="union")
    mixture = mix_distributions(lm(1), parts, combine="mixture")
    share = np.exp(-1.0) / (np.exp(-1.0) + np.exp(-5.0))
    expected = 0.75 * np.exp(lm(1)[0])
    expected[[2, 3]] += 0.25 * np.array([share, 1 - share])
    np.testing.assert_allclose(np.exp(union.log_probs[0]), expected, rtol=1e-12)
    expected = 0.5 * np.exp(lm(1)[0])
    expected[[2, 3]] += 0.25
    np.testing.assert_allclose(np.exp(mixture.log_probs[0]), expected, rtol=1e-12)


def test_a_union_needs_one_temperature() -> None:
    with pytest.raises(InvalidRequest, match="one temperature"):
        mix_distributions(lm(4), [retrieved("a", 4, 1), retrieved("b", 4, 2, temperature=9.0)], combine="union")


def test_unknown_ways_and_foreign_tokens_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="mixture or union"):
        mix_distributions(lm(4), [retrieved("a", 4, 1)], combine="sum")
    foreign = Neighbors(np.zeros((1, 1), np.float32), np.array([[VOCAB]], np.int32))
    with pytest.raises(InvalidRequest, match="holds token 8"):
        mix_distributions(lm(1), [Retrieved("a", foreign, 1.0, 0.5)])


@given(st.lists(st.sampled_from([-3.0, -2.0, -1.0, -np.inf]), min_size=1, max_size=9), st.integers(1, 12))
def test_top_tokens_equals_a_stable_sort(values: list[float], n: int) -> None:
    log_probs = np.array(values)
    np.testing.assert_array_equal(top_tokens(log_probs, n), np.argsort(-log_probs, kind="stable")[:n])
