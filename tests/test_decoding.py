"""One kNN-LM step and the windows over a long text."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.decoding import (
    DEFAULT_WINDOW,
    Mixed,
    choose_windows,
    end_of_context,
    mix_evidence,
    plan_fed_windows,
    plan_windows,
    top_tokens,
)
from knnlm.domains import knn_evidence
from knnlm.errors import InvalidRequest
from knnlm.evidence import Evidence
from knnlm.messages import DomainInfo
from knnlm.neighbors import Neighbors
from knnlm.rules import Weighing
from knnlm.testing import ToyLanguageModel
from tests.toys import CountSource

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


def neighbors(seed: int, n: int = 4) -> Neighbors:
    rng = np.random.default_rng(seed)
    values = rng.integers(-1, VOCAB, (n, 5)).astype(np.int32)
    values[0] = -1  # the first query finds nothing
    return Neighbors(np.sort(rng.uniform(0, 9, (n, 5)), axis=1).astype(np.float32), values)


def mixed(lm_log_probs: np.ndarray, *evidence: Evidence, lambdas: Sequence[float] = (0.3, 0.3, 0.3)) -> Mixed:
    """The mixture with sources a, b, c, which answered with that evidence."""
    weighings = [Weighing("fixed", {"lambda": lmbda}, asked=True) for lmbda in lambdas]
    sources = [CountSource(w, VOCAB, name, "knn") for w, name, _ in zip(weighings, "abc", evidence, strict=False)]
    return mix_evidence(lm_log_probs, sources, evidence)


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


@pytest.mark.parametrize(
    ("context", "length", "bos", "expected"),
    [
        ([0, 5, 6, 7], 4, 0, [0, 5, 6, 7]),
        ([0, 5, 6, 7], 3, 0, [0, 6, 7]),
        ([0, 5, 6, 7], 1, 0, [0]),
        ([0, 5, 6, 7], 2, None, [6, 7]),
        ([5, 6, 7], 2, 0, [6, 7]),
    ],
)
def test_the_end_of_a_context_keeps_its_bos(
    context: list[int], length: int, bos: int | None, expected: list[int]
) -> None:
    assert end_of_context(np.array(context, np.int32), length, bos).tolist() == expected


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


@pytest.mark.parametrize("domains", [0, 1, 2, 3])
def test_targets_equal_the_distribution(domains: int) -> None:
    found = [neighbors(seed) for seed in range(domains)]
    targets = np.array([0, 3, 7, 2], np.int32)
    whole = mixed(lm(4), *(knn_evidence(f, 2.0) for f in found))
    one = mixed(lm(4)[np.arange(4), targets], *(knn_evidence(f, 2.0, targets) for f in found))
    np.testing.assert_allclose(one.log_probs, whole.log_probs[np.arange(4), targets], rtol=1e-12)
    np.testing.assert_allclose(np.exp(whole.log_probs).sum(axis=1), 1, rtol=1e-12)
    if domains:
        assert whole.knn_log_probs is not None
        assert one.knn_log_probs is not None
        np.testing.assert_allclose(one.knn_log_probs, whole.knn_log_probs[np.arange(4), targets], rtol=1e-12)
    else:
        assert whole.knn_log_probs is one.knn_log_probs is None


def test_the_components_explain_the_mixture() -> None:
    whole = mixed(lm(4), knn_evidence(neighbors(1), 2.0), knn_evidence(neighbors(2), 9.0), lambdas=(0.3, 0.1))
    assert [(c.name, c.kind) for c in whole.components] == [("a", "knn"), ("b", "knn")]
    p = (1 - whole.weight[:, None]) * np.exp(whole.lm_log_probs)
    for component in whole.components:
        rows = [component.row(i, VOCAB) for i in range(4)]
        assert rows[0] is None
        p += component.weight[:, None] * [np.zeros(VOCAB) if row is None else np.exp(row) for row in rows]
    np.testing.assert_allclose(np.exp(whole.log_probs), p, rtol=1e-12)
    assert whole.knn_log_probs is not None
    p = (1 - whole.weight[:, None]) * np.exp(whole.lm_log_probs) + whole.weight[:, None] * np.exp(whole.knn_log_probs)
    np.testing.assert_allclose(np.exp(whole.log_probs), p, rtol=1e-12)
    for i in range(1, 4):
        np.testing.assert_array_equal(whole.mean_row(i, "knn"), whole.knn_log_probs[i])
    np.testing.assert_array_equal(whole.log_probs[0], lm(4)[0])  # nothing found: exactly the LM
    np.testing.assert_allclose(whole.weight[1:], 0.4)


def test_a_few_rows_at_a_time_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [knn_evidence(neighbors(1, 9), 2.0), knn_evidence(neighbors(2, 9), 9.0)]
    whole = mixed(lm(9), *parts).log_probs
    monkeypatch.setattr("knnlm.decoding.MIX_BYTES", 2 * 8 * VOCAB)
    np.testing.assert_array_equal(mixed(lm(9), *parts).log_probs, whole)


@given(st.lists(st.sampled_from([-3.0, -2.0, -1.0, -np.inf]), min_size=1, max_size=9), st.integers(0, 12))
def test_top_tokens_equals_a_stable_sort(values: list[float], n: int) -> None:
    log_probs = np.array(values)
    np.testing.assert_array_equal(top_tokens(log_probs, n), np.argsort(-log_probs, kind="stable")[:n])
