"""The continuous cache in requests to a running system: as in process, within its bounds, in every route."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from knnlm.clients import routes
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.updates.revise import with_tuning
from knnlm.generation import GenerationOptions
from knnlm.options import CacheOptions, DomainOptions, KnnOptions, ReuseOptions
from knnlm.sampling import SamplingOptions
from tests.contract.system import TEXT, TUNING, store, system
from tests.contract.test_aggregator import pipeline

__all__ = ["store"]

CACHE = {"lambda": 0.25, "theta": 0.6, "size": 9}
OPTIONS = {"knn": KnnOptions((DomainOptions("cat", lmbda=0.3),)), "cache": CacheOptions(0.25, 0.6, 9)}
BODY = {"knn": {"domain": "cat", "lambda": 0.3}, "cache": CACHE}


async def test_all_routes_answer_as_in_process(store: Path) -> None:
    prompt = [256, *TEXT[:12].encode()]
    asked = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **BODY}
    async with system(store) as s:
        answer = await s.post("/v1/next_token", {"text": [TEXT[:20], "a"], "top_n": 5, **BODY})
        alone = await s.post("/v1/next_token", {"text": TEXT[:20], "top_n": 5, **BODY})
        scored = await s.post("/v1/score", {"text": TEXT, **BODY})
        explained = await s.post("/v1/explain", {"text": TEXT, **BODY})
        completed = await s.post("/v1/completions", {**asked, "logprobs": 1})
        echoed = await s.post("/v1/completions", {**asked, "max_tokens": 0, "echo": True, "logprobs": 1})
    with pipeline(store) as p:
        expected = p.next_token([TEXT[:20], "a"], OPTIONS).mixed
        score = p.score(TEXT, OPTIONS)
        greedy = GenerationOptions(max_tokens=6, sampling=SamplingOptions(temperature=0.0), ignore_eos=True)
        made = p.generate(prompt, OPTIONS, greedy, seed=0)
        prompt_score = p.score(prompt, OPTIONS)
    for i, result in enumerate(answer["results"]):
        best = np.sort(np.exp(expected.log_probs[i]))[::-1][:5]
        np.testing.assert_allclose([t["p"] for t in result["top"]], best, rtol=1e-5)
        assert [(c["name"], c["kind"]) for c in result["components"]][1:] == [("cat", "knn"), ("cache", "cache")]
    np.testing.assert_allclose(
        [t["p"] for t in alone["results"][0]["top"]], [t["p"] for t in answer["results"][0]["top"]], rtol=1e-6
    )
    np.testing.assert_allclose([t["log_p"] for t in scored["tokens"]], score.log_probs, rtol=1e-5)
    np.testing.assert_allclose([t["log_p"] for t in explained["tokens"]], score.log_probs, rtol=1e-5)
    np.testing.assert_allclose(completed["choices"][0]["logprobs"]["token_logprobs"], made.log_probs, rtol=1e-5)
    shown = [value for value in echoed["choices"][0]["logprobs"]["token_logprobs"] if value is not None]
    np.testing.assert_allclose(shown[-len(prompt_score.log_probs) :], prompt_score.log_probs, rtol=1e-5)


async def test_what_was_tuned_with_the_domain_holds_where_nothing_is_asked(store: Path) -> None:
    tuned = {"lambda": 0.2, "theta": 0.4, "size": 7.0, "knn_lambda": 0.15}
    with_tuning(Catalog(store).path("cat", "v1"), TUNING.__class__(**{**vars(TUNING), "cache": tuned}))
    async with system(store) as s:
        domain = (await s.client.get("/v1/domains/cat")).json()
        answer = await s.post("/v1/next_token", {"text": TEXT[:20], "model": "toy+cat", "cache": {}})
        error = (await s.post("/v1/next_token", {"text": "a", "model": "toy+dog", "cache": {}}, status=400))["error"]
        lone = (await s.post("/v1/score", {"text": "abc", "cache": {"lambda": 0.1}}, status=400))["error"]
    assert domain["tuning"]["cache"] == tuned
    weights = {c["name"]: c["weight"] for c in answer["results"][0]["components"]}
    assert weights == pytest.approx({"lm": 0.65, "cat": 0.15, "cache": 0.2})
    assert (error["param"], lone["param"]) == ("cache.lambda", "cache.theta")


@pytest.mark.parametrize(("tuned", "allowed", "used"), [(7.0, 64, 7), (50_000.0, 64, 64), (50_000.0, 4096, 2000)])
async def test_a_tuned_size_keeps_within_the_settings(store: Path, tuned: float, allowed: int, used: int) -> None:
    cache = {"lambda": 0.2, "theta": 0.4, "size": tuned}
    with_tuning(Catalog(store).path("cat", "v1"), replace(TUNING, cache=cache))
    body = {"tokens": [256, *(TEXT * 30).encode()], "model": "toy+cat"}
    async with system(store, max_cache_size=allowed) as s:
        as_tuned = await s.post("/v1/score", {**body, "cache": {}})
        as_asked = await s.post("/v1/score", {**body, "cache": {"size": used}})
    assert as_tuned["tokens"] == as_asked["tokens"]


@pytest.mark.parametrize(
    ("given", "param", "status"),
    [
        ({"lambda": 1.5}, "cache.lambda", 400),
        ({"theta": -1.0}, "cache.theta", 400),
        ({"theta": 1e300}, "cache.theta", 400),
        ({"size": 0}, "cache.size", 400),
        ({"size": 65}, "cache.size", 413),
        ({"other": 1}, "cache.other", 400),
    ],
)
async def test_what_is_wrong_is_named(store: Path, given: dict[str, float], param: str, status: int) -> None:
    async with system(store, max_cache_size=64) as s:
        error = (await s.post("/v1/score", {"text": "abc", "cache": {**CACHE, **given}}, status=status))["error"]
        assert error["param"] == param
        await s.post("/v1/score", {"text": "abc", "cache": CACHE})
        many = {
            "prompt": "abc",
            "max_tokens": 1,
            "cache": {**CACHE, "lambda": 0.9},
            "knn": {"domain": "cat", "lambda": 0.2},
        }
        assert "add up to 1.1" in (await s.post("/v1/completions", many, status=400))["error"]["message"]


async def test_memory_is_bounded_by_a_setting(store: Path) -> None:
    async with system(store, max_cache_bytes=2 * 4 * 16 * 9 * 3) as s:
        asked = {"prompt": "abc", "max_tokens": 2, "cache": CACHE}
        await s.post("/v1/completions", {**asked, "n": 3})
        error = (await s.post("/v1/completions", {**asked, "n": 4}, status=413))["error"]
        assert error["param"] == "cache.size"
        assert (await s.post("/v1/score", {"text": "abc", "cache": {**CACHE, "size": 28}}, status=413))["error"]
        texts = {"text": ["a"] * 4, "cache": CACHE}
        assert (await s.post("/v1/next_token", texts, status=413))["error"]["param"] == "cache.size"


async def test_neighbors_are_not_shown_of_a_cache(store: Path) -> None:
    async with system(store) as s:
        error = (await s.post("/v1/next_token", {"text": "abc", "neighbors": 2, "cache": CACHE}, status=400))["error"]
        assert error["param"] == "neighbors"


def test_the_client_takes_it_as_a_record_or_as_json() -> None:
    bodies = [routes.score("a", cache=cache).body for cache in (CacheOptions(0.25, 0.6, 9), CACHE)]
    assert bodies[0] == bodies[1] == {"text": "a", "cache": CACHE}
    asked = KnnOptions((DomainOptions("cat"),), reuse=ReuseOptions(ahead=2))
    body = routes.score("a", knn=asked).body
    assert body is not None
    assert body["knn"]["reuse"] == {"ahead": 2}
