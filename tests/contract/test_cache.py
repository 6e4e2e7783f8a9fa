"""The continuous cache in requests to a running system: as in process, within its bounds, in every route."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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


GATES: Mapping[str, float | Sequence[float]] = {
    "gate.bias": 1.0,
    "gate.linear": [-0.3, -2.0, 3.0, -0.4, 0.1, -1.0],
    "knn_gate.bias": 0.5,
    "knn_gate.linear": [-0.2, -1.0, 2.0, 0.1, 0.2, -2.0],
    "knn_gate.hidden": [0.1] * 12,
    "knn_gate.hidden_bias": [0.0, 0.2],
    "knn_gate.output": [0.5, -0.5],
}


async def test_gates_fitted_together_weigh_the_same_everywhere_and_only_together(store: Path) -> None:
    """As in process, by the formula, and with everything asked for otherwise the weights that were fitted."""
    tuned = {"lambda": 0.2, "theta": 0.4, "size": 7.0, "knn_lambda": 0.15, **GATES}
    with_tuning(Catalog(store).path("cat", "v1"), replace(TUNING, cache=tuned))
    cat: dict[str, Any] = {"text": TEXT, "model": "toy+cat"}  # Any: JSON
    prompt = [256, *TEXT[:20].encode()]
    with pipeline(store) as p:
        asked = {"knn": KnnOptions((DomainOptions("cat"),)), "cache": CacheOptions()}
        score, made = p.score(TEXT, asked), p.next_token([TEXT[:20]], asked).mixed
        greedy = GenerationOptions(max_tokens=5, sampling=SamplingOptions(temperature=0.0), ignore_eos=True)
        generated = p.generate(prompt, asked, greedy, seed=0)
    async with system(store) as s:
        scored = await s.post("/v1/score", {**cat, "cache": {}})
        explained = await s.post("/v1/explain", {**cat, "cache": {}})
        named = await s.post("/v1/score", {"text": TEXT, "knn": {"domain": "cat", "rule": "gate"}, "cache": {}})
        answer = await s.post("/v1/next_token", {"text": TEXT[:20], "model": "toy+cat", "cache": {}})
        completed = await s.post(
            "/v1/completions",
            {"prompt": prompt, "model": "toy+cat", "cache": {}, "max_tokens": 5, "temperature": 0, "logprobs": 1,
             "ignore_eos": True},
        )  # fmt: skip
        fixed = await s.post("/v1/score", {"text": TEXT, "knn": {"domain": "cat", "rule": "fixed"}, "cache": {}})
        lone = await s.post("/v1/score", cat)
        half = await s.post("/v1/score", {**cat, "cache": {"lambda": 0.1}})
        other = await s.post("/v1/score", {**cat, "cache": {"theta": 0.5}})
    weights = {c.name: c.weight for c in score.mixed.components}
    for answered in (scored, explained, named):
        np.testing.assert_allclose([t["log_p"] for t in answered["tokens"]], score.log_probs, rtol=1e-5)
        assert answered["domains"][0]["rule"] == "gate"
    for name, weight in weights.items():
        for answered in (scored, named):
            np.testing.assert_allclose(of(answered, name), weight, rtol=1e-4)
        per_token = [{c["name"]: c["weight"] for c in t["components"]}[name] for t in explained["tokens"]]
        np.testing.assert_allclose(per_token, weight, rtol=1e-4)
    assert len({round(w, 6) for w in weights["cache"]}) > 10
    assert weights["cache"][0] == 0
    last = {c["name"]: c["weight"] for c in answer["results"][0]["components"]}
    assert last == pytest.approx({"lm": 1 - made.weight[0], **{c.name: c.weight[0] for c in made.components}}, rel=1e-4)
    np.testing.assert_allclose(completed["choices"][0]["logprobs"]["token_logprobs"], generated.log_probs, rtol=1e-4)
    assert {t["lambda"] for t in lone["tokens"]} == {0.3}
    assert (set(of(fixed, "cat")[1:]), set(of(fixed, "cache")[1:])) == ({0.15}, {0.2})
    for given in (
        half,
        other,
    ):  # the gate of the cache holds for its theta alone, and where its weight is not asked for
        assert len(set(of(given, "cat"))) > 10
    assert set(of(half, "cache")[1:]) == {0.1}
    odds = {name: [w / rest for w, rest in zip(of(other, name), of(other, "lm"), strict=True)] for name in weights}
    np.testing.assert_allclose(odds["cache"][1:], 0.25, rtol=1e-6)


def of(answer: Any, name: str) -> list[float]:  # Any: JSON
    """The weights of a component in a score."""
    found: list[float] = next(c["weight"] for c in answer["components"] if c["name"] == name)
    return found


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


async def test_a_tuning_that_does_not_fit_is_no_internal_error(store: Path) -> None:
    """Manifests can be edited: every route says which domain's tuning is at fault, and explicit weights still serve."""
    tuned = {"lambda": 0.2, "theta": 0.4, "size": 7.0, "knn_lambda": 0.15, **GATES}
    wrong: list[dict[str, Any]] = [  # Any: fields of a tuning
        {"cache": {**tuned, "gate.linear": [1.0]}},
        {"cache": {**tuned, "knn_gate.linear": 1.0}},
        {"cache": {**tuned, "knn_gate.hidden": [0.1] * 11}},
        {"cache": {"lambda": 0.2, "theta": 0.4, "knn_lambda": [0.1, 0.2]}},
        {"cache": {"lambda": 0.2, "theta": 0.4, "size": 0.0}},
        {"rule": "gate_lm", "parameters": {"bias": 0.0, "linear": [1.0] * 5}},
        {"rule": "gate_lm", "parameters": {"bias": 0.0, "linear": [1.0] * 2, "gain": [1.0], "skip_below": 0.0}},
    ]
    prompt = [256, *TEXT[:20].encode()]
    for fields in wrong:
        with_tuning(Catalog(store).path("cat", "v1"), replace(TUNING, **fields))
        asked: dict[str, Any] = {"cache": {}} if "cache" in fields else {}  # Any: JSON
        async with system(store) as s:
            answers = [
                await s.client.post(f"/v1/{route}", json={"model": "toy+cat", **asked, **body})
                for route, body in (
                    ("score", {"text": TEXT}), ("next_token", {"text": "ab"}), ("explain", {"text": TEXT}),
                    ("completions", {"prompt": prompt, "max_tokens": 2}),
                )
            ]  # fmt: skip
            await s.post("/v1/score", {"text": TEXT, **BODY})
        for answer in answers:
            error = answer.json()["error"]
            assert answer.status_code in (400, 409), error
            assert "the tuning of domain cat has" in error["message"] or error["param"] == "cache.size", error
