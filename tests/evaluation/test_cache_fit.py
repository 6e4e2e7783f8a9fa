"""theta, size and weights of the cache, against dense grids and the arithmetic written out."""

import numpy as np
import pytest

from knnlm.errors import InvalidRequest
from knnlm.evaluation.cache_fit import fit_cache, past_log_probs, places_with_past
from knnlm.evaluation.collect import HeldOut
from knnlm.neighbors import Neighbors

D, TOKENS = 8, 12


def repeating(seed: int = 0, lengths: tuple[int, ...] = (60, 1, 90, 40), scale: float = 3.0) -> HeldOut:
    """Each text repeats itself: a token's key is near those of the places where it stood before."""
    rng = np.random.default_rng(seed)
    centers = scale * rng.standard_normal((TOKENS, D))
    n = sum(lengths)
    own = [rng.choice(TOKENS, 4, replace=False)[rng.integers(4, size=length)] for length in lengths]
    targets = np.concatenate(own).astype(np.int32)
    queries = (centers[targets] + 1.5 * rng.standard_normal((n, D))).astype(np.float32)
    document_of = np.repeat(np.array([7, 9, 10, 15]), lengths)
    return HeldOut(queries, np.log(rng.beta(1, 4, n)).astype(np.float32), targets, 4, document_of=document_of)


def by_hand(held_out: HeldOut, theta: float, size: int) -> np.ndarray:
    """p_cache of every token, place by place; nan where nothing stands before."""
    assert held_out.document_of is not None
    result = np.full(len(held_out.targets), np.nan)
    for i, document in enumerate(held_out.document_of):
        before = [j for j in range(max(0, i - size), i) if held_out.document_of[j] == document]
        if before:
            products = held_out.queries[before].astype(np.float64) @ held_out.queries[i].astype(np.float64)
            weights = np.exp(theta * (products - products.max()))
            result[i] = weights[held_out.targets[before] == held_out.targets[i]].sum() / weights.sum()
    return result


def perplexity(held_out: HeldOut, parts: list[tuple[float, np.ndarray]]) -> float:
    """Mixed in probabilities; where a part is nan its weight is the LM's."""
    lm = np.exp(held_out.lm_log_probs.astype(np.float64))
    p = lm + sum(weight * np.where(np.isnan(part), 0, part - lm) for weight, part in parts)
    return float(np.exp(-np.log(p).mean()))


@pytest.mark.parametrize(("theta", "size"), [(0.01, 500), (0.1, 5), (1.0, 500)])
def test_every_document_is_its_own_text(theta: float, size: int) -> None:
    held_out = repeating()
    expected = by_hand(held_out, theta, size)
    np.testing.assert_array_equal(places_with_past(held_out), ~np.isnan(expected))
    there = places_with_past(held_out)
    np.testing.assert_allclose(np.exp(past_log_probs(held_out, theta, size))[there], expected[there], atol=1e-12)


def test_the_fit_is_that_of_a_dense_grid() -> None:
    held_out = repeating()
    fitted = fit_cache(held_out)
    grid = {
        (theta, lmbda): perplexity(held_out, [(lmbda, p)])
        for theta in np.geomspace(1e-3, 3, 60)
        for p in [by_hand(held_out, float(theta), 2000)]
        for lmbda in np.linspace(0, 0.99, 100)
    }
    best = min(grid.values())
    assert best * (1 - 1e-3) < fitted.cache_perplexity < best * (1 + 1e-4)
    at_hand = perplexity(held_out, [(fitted.lmbda, by_hand(held_out, fitted.theta, fitted.size))])
    assert fitted.cache_perplexity == pytest.approx(at_hand, rel=1e-6)
    assert fitted.lm_perplexity == pytest.approx(perplexity(held_out, []), rel=1e-6)
    assert fitted.parameters == {"lambda": fitted.lmbda, "theta": fitted.theta, "size": float(fitted.size)}


def test_weights_of_retrieval_and_cache_are_those_of_a_dense_grid() -> None:
    held_out = repeating()
    rng = np.random.default_rng(1)
    n = len(held_out.targets)
    right = rng.random((n, 3)) < 0.4
    values = np.where(right, held_out.targets[:, None], rng.integers(TOKENS, size=(n, 3))).astype(np.int32)
    values[rng.random(n) < 0.2] = -1
    neighbors = Neighbors(np.ones((n, 3), np.float32), values)
    fitted = fit_cache(held_out, neighbors, 1.0)
    knn = np.where(values[:, 0] >= 0, (values == held_out.targets[:, None]).mean(axis=1), np.nan)
    cache = by_hand(held_out, fitted.theta, fitted.size)
    grid = np.linspace(0, 0.99, 67)
    both = min(perplexity(held_out, [(a, knn), (b, cache)]) for a in grid for b in grid if a + b < 1)
    assert fitted.knn_lambda is not None
    assert fitted.both_perplexity is not None
    assert both * (1 - 2e-3) < fitted.both_perplexity < both * (1 + 1e-6)
    at_hand = perplexity(held_out, [(fitted.knn_lambda, knn), (fitted.lmbda, cache)])
    assert fitted.both_perplexity == pytest.approx(at_hand, rel=1e-6)
    assert fitted.knn_perplexity == pytest.approx(min(perplexity(held_out, [(a, knn)]) for a in grid), rel=1e-3)
    assert fitted.both_perplexity < min(fitted.knn_perplexity or 0, fitted.cache_perplexity)
    assert fitted.parameters["knn_lambda"] == fitted.knn_lambda


def test_the_size_is_the_smallest_that_is_as_good_and_was_measured() -> None:
    def size(lengths: tuple[int, ...]) -> int:
        return fit_cache(repeating(lengths=lengths)).size

    assert size((60, 1, 90, 40)) == 2000  # no text is long enough to tell
    held_out = repeating(lengths=(600, 1, 900, 400), scale=6.0)
    assert fit_cache(held_out).size in {125, 250, 2000}


def test_where_documents_are_not_known_nothing_is_fitted() -> None:
    with pytest.raises(InvalidRequest, match="which are not known"):
        fit_cache(HeldOut(**{**vars(repeating()), "document_of": None}))
