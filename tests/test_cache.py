"""The continuous cache against its definition, and as a source in every way of asking."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.cache import cache_evidence, cache_log_probs
from knnlm.errors import InvalidRequest
from knnlm.generation import GenerationOptions
from knnlm.index.searcher import Searcher
from knnlm.neighbors import TokenMasses
from knnlm.options import CacheOptions, DomainOptions, KnnOptions
from knnlm.pipeline import Pipeline
from knnlm.sampling import SamplingOptions
from knnlm.testing import ToyLanguageModel, toy_datastore

CACHE = CacheOptions(lmbda=0.3, theta=0.7, size=1000)
Floats = npt.NDArray[np.float64]


def brute(keys: Floats, tokens: npt.NDArray[np.int64], place: int, theta: float, size: int) -> dict[int, float]:
    """p_cache of every token at one place, by the formula."""
    sums: dict[int, float] = {}
    for i in range(max(0, place - size), place):
        weight = math.exp(theta * float(np.dot(keys[place], keys[i])))
        sums[int(tokens[i])] = sums.get(int(tokens[i]), 0.0) + weight
    total = sum(sums.values())
    return {token: weight / total for token, weight in sums.items()}


@pytest.mark.parametrize("size", [1, 3, 300, 2000])
@pytest.mark.parametrize("first", [0, 5, 700])
def test_it_is_the_formula(size: int, first: int) -> None:
    rng = np.random.default_rng(size + first)
    keys, tokens = rng.standard_normal((900, 4)).astype(np.float32), rng.integers(0, 7, 900)
    found = cache_log_probs(keys, tokens, first, theta=0.8, size=size, targets=tokens[first:])
    rows = cache_log_probs(keys, tokens, first, theta=0.8, size=size)
    assert isinstance(found, np.ndarray)
    assert isinstance(rows, TokenMasses)
    for place in {first, first + 1, 698 + first // 4, 899}:
        expected = brute(keys.astype(np.float64), tokens, place, 0.8, size)
        got, masses = rows.row(place - first)
        assert dict(zip(got.tolist(), np.exp(masses), strict=True)) == pytest.approx(expected, rel=1e-6)
        assert np.exp(found[place - first]) == pytest.approx(expected.get(int(tokens[place]), 0.0), rel=1e-6)


@pytest.mark.parametrize("size", [3, 300])
def test_features_are_those_of_the_places_that_are_seen(size: int) -> None:
    rng = np.random.default_rng(size)
    keys, tokens = rng.standard_normal((700, 4)).astype(np.float32), rng.integers(0, 7, 700)
    for targets in (None, tokens):
        _, found = cache_evidence(keys, tokens, 0, theta=0.8, size=size, targets=targets, features=True)
        assert found["nearest"][0] == np.inf
        assert [found[name][0] for name in ("nearness", "agreement", "distinct")] == [1.0, 0.0, 0.0]
        for place in (1, 2, 301, 699):
            expected = brute(keys.astype(np.float64), tokens, place, 0.8, size)
            far = [float(((keys[place] - keys[i]) ** 2).sum()) for i in range(max(0, place - size), place)]
            got = {name: float(values[place]) for name, values in found.items()}
            assert got == pytest.approx(
                {
                    "nearest": min(far),
                    "nearness": min(far) / max(far),
                    "agreement": max(expected.values()),
                    "distinct": len(expected),
                },
                rel=1e-5,
            )
    assert cache_evidence(keys, tokens, 0, theta=0.8, size=size)[1] == {}


def test_a_huge_theta_is_the_likest_place_alone() -> None:
    keys = np.array([[1.0, 0], [0, 1], [1, 0.1]], np.float32)
    found = cache_log_probs(keys, np.array([4, 5, 6]), 2, theta=1e90, size=9, targets=np.array([4]))
    np.testing.assert_array_equal(found, [0.0])


@pytest.mark.parametrize(("theta", "size"), [(-1.0, 5), (math.inf, 5), (math.nan, 5), (1.0, 0)])
def test_values_out_of_range_are_refused(theta: float, size: int) -> None:
    with pytest.raises(InvalidRequest):
        cache_log_probs(np.zeros((2, 1), np.float32), np.zeros(2, np.int32), 0, theta=theta, size=size)


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    lm = ToyLanguageModel()
    with Pipeline(lm, {"cat": Searcher.open(toy_datastore(tmp_path, domain="cat", lm=lm))}) as p:
        yield p


TEXT = "the cat sat on the mat; the cat sat on the dog; a cat ate the rat and sat on the mat."


def expected(p: Pipeline, size: int, context_length: int) -> tuple[Floats, Floats]:
    """log p_LM and log p_cache of each token, from the keys of the windows."""
    tokens = p.tokenizer.encode(TEXT)
    from knnlm.decoding import plan_windows
    from knnlm.messages import ForwardRequest, required

    keys, lm = [], []
    for window in plan_windows(len(tokens), context_length, context_length // 2):
        request = ForwardRequest(
            [window.fed(tokens)], [window.positions], targets=tokens[window.first : window.end], keys=True
        )
        forward = p.lm.forward(request)
        keys.append(required(forward.keys))
        lm.append(required(forward.target_log_probs))
    all_keys, seen = np.concatenate(keys).astype(np.float64), tokens[1:].astype(np.int64)
    cache = [brute(all_keys, seen, i, 0.7, size).get(int(seen[i]), 0.0) for i in range(len(seen))]
    with np.errstate(divide="ignore"):
        return np.concatenate(lm).astype(np.float64), np.log(cache)


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("context_length", [4, 9, 32])
def test_scoring_equals_the_formula_over_windows_of_any_length(
    pipeline: Pipeline, size: int, context_length: int
) -> None:
    lm, cache = expected(pipeline, size, context_length)
    score = pipeline.score(TEXT, {"cache": CacheOptions(0.3, 0.7, size)}, context_length=context_length)
    np.testing.assert_allclose(score.mixed.components[0].evidence.of_targets, cache, rtol=1e-6)
    weight = np.where(np.arange(len(lm)) > 0, 0.3, 0.0)  # nothing was seen before the first
    np.testing.assert_allclose(np.exp(score.log_probs), (1 - weight) * np.exp(lm) + weight * np.exp(cache), rtol=1e-5)


def test_each_text_begins_with_an_empty_cache(pipeline: Pipeline) -> None:
    first, second = (pipeline.score(TEXT, {"cache": CACHE}).log_probs for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_next_token_and_explain_see_what_scoring_sees(pipeline: Pipeline) -> None:
    options = {"knn": KnnOptions((DomainOptions("cat", lmbda=0.2, temperature=1.0),)), "cache": CACHE}
    text = TEXT[:24]
    tokens = pipeline.tokenizer.encode(text)
    score = pipeline.score(tokens, options)
    for end in (1, 2, 9, len(tokens) - 1):
        mixed = pipeline.next_token(tokens[:end], options).mixed
        assert mixed.log_probs[0, tokens[end]] == pytest.approx(score.log_probs[end - 1], rel=1e-6)
        assert np.exp(mixed.log_probs[0]).sum() == pytest.approx(1)
    explained = pipeline.explain(text[10:], options, prompt=text[:10])
    np.testing.assert_allclose(explained.log_probs, score.log_probs[-len(explained.log_probs) :], rtol=1e-6)


def test_weight_zero_changes_nothing_bit_for_bit(pipeline: Pipeline) -> None:
    without, with_cache = pipeline.score(TEXT), pipeline.score(TEXT, {"cache": CacheOptions(0.0, 0.7, 100)})
    np.testing.assert_array_equal(without.log_probs, with_cache.log_probs)
    plain, mixed = (pipeline.next_token(TEXT[:20], o).mixed for o in (None, {"cache": CacheOptions(0.0, 0.7)}))
    np.testing.assert_array_equal(plain.log_probs, mixed.log_probs)


@pytest.mark.parametrize("size", [2, 1000])
def test_it_grows_with_what_is_generated(pipeline: Pipeline, size: int) -> None:
    """Greedy, every token is the likeliest after all tokens before it, as a call of its own would have it."""
    options = {"cache": CacheOptions(0.6, 0.7, size)}
    greedy = GenerationOptions(max_tokens=12, sampling=SamplingOptions(temperature=0.0), ignore_eos=True)
    prompt = pipeline.tokenizer.encode(TEXT[:15])
    made = pipeline.generate(prompt, options, greedy, seed=1)
    context = prompt
    for token, log_prob in zip(made.tokens, made.log_probs, strict=True):
        row = pipeline.next_token(context, options).mixed.log_probs[0]
        assert row[token] == pytest.approx(row.max(), rel=1e-6)
        assert log_prob == pytest.approx(row[token], rel=1e-6)
        context = np.append(context, np.int32(token))


def test_values_that_nobody_gave_are_refused_by_name(pipeline: Pipeline) -> None:
    for options, param in ((CacheOptions(), "cache.lambda"), (CacheOptions(lmbda=0.1), "cache.theta")):
        with pytest.raises(InvalidRequest) as caught:
            pipeline.score(TEXT, {"cache": options})
        assert caught.value.param == param
    for given, param in (({"lmbda": 1.1}, "lambda"), ({"theta": -1.0}, "theta"), ({"size": 0}, "size")):
        with pytest.raises(InvalidRequest) as caught:
            CacheOptions(**given)
        assert caught.value.param == param


def test_sequences_that_share_rounds_keep_their_own_past(pipeline: Pipeline) -> None:
    from knnlm.generation import Generator

    greedy = GenerationOptions(max_tokens=8, sampling=SamplingOptions(temperature=0.0), ignore_eos=True)
    prompts = [pipeline.tokenizer.encode(TEXT[: 5 + 3 * i]) for i in range(4)]
    alone = [pipeline.generate(p, {"cache": CACHE}, greedy, seed=0).tokens for p in prompts]

    async def together() -> list[object]:
        generator = Generator(pipeline._mixer, pipeline.tokenizer)
        made = await asyncio.gather(*(generator.complete(p, greedy, {"cache": CACHE}) for p in prompts))
        return [m.tokens for m in made]

    assert asyncio.run(together()) == alone
