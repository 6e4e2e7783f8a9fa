"""Sources and rules that are one class and one row, in requests to a running system; what requests may cost."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.updates.revise import with_tuning
from knnlm.options import DomainOptions, KnnOptions
from knnlm.rules import LARGEST_LAMBDA
from tests.contract.system import TEXT, TUNING, store, system
from tests.contract.test_aggregator import pipeline
from tests.toys import COUNTS, LEVEL, CountOptions, counts, level

__all__ = ["counts", "level", "store"]

BODY = {"knn": {"domain": "cat", "lambda": 0.3}, COUNTS: {"lambda": 0.2}}
OPTIONS = {"knn": KnnOptions((DomainOptions("cat", lmbda=0.3),)), COUNTS: CountOptions(0.2)}


@pytest.mark.usefixtures("counts")
async def test_a_source_is_asked_for_by_its_name_and_shown_among_the_components(store: Path) -> None:
    async with system(store) as s:
        answer = await s.post("/v1/next_token", {"text": TEXT[:20], "top_n": 5, **BODY})
        scored = await s.post("/v1/score", {"text": TEXT, **BODY})
    result = answer["results"][0]
    components = result["components"]
    assert [(c["name"], c["kind"]) for c in components] == [("lm", "lm"), ("cat", "knn"), ("own text", COUNTS)]
    np.testing.assert_allclose([c["weight"] for c in components], [0.5, 0.3, 0.2])
    for i, token in enumerate(result["top"]):
        np.testing.assert_allclose(token["p"], sum(c["weight"] * c["p"][i] for c in components), rtol=1e-6)
        assert (token["p_lm"], token["p_knn"]) == (components[0]["p"][i], components[1]["p"][i])
    with pipeline(store) as p:
        expected, expected_score = p.next_token(TEXT[:20], OPTIONS).mixed, p.score(TEXT, OPTIONS)
    np.testing.assert_allclose([t["p"] for t in result["top"]], np.sort(np.exp(expected.log_probs[0]))[::-1][:5])
    assert [(c["name"], c["kind"]) for c in scored["components"]] == [
        ("lm", "lm"),
        ("cat", "knn"),
        ("own text", COUNTS),
    ]
    np.testing.assert_allclose([t["log_p"] for t in scored["tokens"]], expected_score.log_probs, rtol=1e-6)
    for shown, component in zip(scored["components"][1:], expected_score.mixed.components, strict=True):
        np.testing.assert_allclose(shown["weight"], component.weight)
        log_p = [-np.inf if value is None else value for value in shown["log_p"]]
        np.testing.assert_allclose(log_p, component.evidence.of_targets, rtol=1e-5)


@pytest.mark.usefixtures("counts")
async def test_what_is_wrong_with_a_source_is_named_under_it(store: Path) -> None:
    async with system(store) as s:
        for given, param in (({"lambda": 2.0}, f"{COUNTS}.lambda"), ({"lambda": -1}, f"{COUNTS}.lambda"),
                             ({"other": 1}, f"{COUNTS}.other")):  # fmt: skip
            error = (await s.post("/v1/score", {"text": "abc", COUNTS: given}, status=400))["error"]
            assert (error["code"], error["param"]) == ("invalid_request", param)
    async with system(store) as s:
        error = (await s.post("/v1/score", {"text": "abc", "magic": {}}, status=400))["error"]
    assert error["param"] == "magic"


async def test_searches_that_a_rule_leaves_out_are_counted(store: Path) -> None:
    path = Catalog(store).path("cat", "v1")
    gate: dict[str, float | list[float]] = {
        "bias": 3.0,
        "linear": [-1.0, 1.5],
        "gain": [3.0, -1.0, 1.5, 0.0, 0.0, 0.0],
        "skip_below": -1e9,
    }
    with_tuning(path, replace(TUNING, rule="gate_lm", parameters=gate))
    with pipeline(store) as p:
        weight = float(np.median(p.score(TEXT, "cat").weight))
    gate["skip_below"] = float(np.log(weight / (LARGEST_LAMBDA - weight)))
    with_tuning(path, replace(TUNING, rule="gate_lm", parameters=gate))
    async with system(store) as s:
        answer = await s.post("/v1/score", {"text": TEXT, "model": "toy+cat"})
        shown = await s.post("/v1/next_token", {"text": TEXT[:12], "model": "toy+cat", "neighbors": 2})
        metrics = (await s.client.get("/metrics")).text
    left_out = [token["lambda"] == 0 for token in answer["tokens"]]
    with pipeline(store) as p:
        np.testing.assert_allclose(
            p.score(TEXT, "cat").weight, [token["lambda"] for token in answer["tokens"]], rtol=1e-4
        )
    assert 0 < sum(left_out) < len(left_out)
    assert [c["searches_skipped"] for c in shown["results"][0]["components"]] == [0, shown["results"][0]["lambda"] == 0]
    skipped = sum(left_out) + (shown["results"][0]["lambda"] == 0)
    assert f"knnlm_aggregator_searches_skipped_total {float(skipped)}" in metrics


@pytest.mark.usefixtures("level")
async def test_a_rule_is_chosen_in_a_request_or_by_the_tuning(store: Path) -> None:
    path = Catalog(store).path("cat", "v1")
    with_tuning(path, replace(TUNING, rule=LEVEL, parameters={"most": 0.5, "scale": 20.0}))
    async with system(store) as s:
        tuned = await s.post("/v1/score", {"text": TEXT, "model": "toy+cat"})
        named = await s.post("/v1/score", {"text": TEXT, "knn": {"domain": "cat", "rule": LEVEL}})
        fixed = await s.post("/v1/score", {"text": TEXT, "knn": {"domain": "cat", "rule": "fixed"}})
        error = (await s.post("/v1/score", {"text": TEXT, "knn": {"domain": "dog", "rule": LEVEL}}, status=400))[
            "error"
        ]
        domain = (await s.client.get("/v1/domains/cat")).json()
    assert error["param"] == "knn.rule"
    assert tuned["domains"][0]["rule"] == LEVEL
    assert tuned["tokens"] == named["tokens"]
    assert len({token["lambda"] for token in tuned["tokens"]}) > 2
    assert {token["lambda"] for token in fixed["tokens"]} == {0.3}
    assert (domain["tuning"]["rule"], domain["tuning"]["parameters"]) == (LEVEL, {"most": 0.5, "scale": 20.0})
    with pipeline(store) as p:
        np.testing.assert_allclose(
            [token["lambda"] for token in tuned["tokens"]], p.score(TEXT, "cat").weight, rtol=1e-5
        )


async def test_domains_and_nothing_else_are_answered_though_their_lambdas_exceed_one(store: Path) -> None:
    for name, lmbda in (("cat", 0.8), ("dog", 0.3)):
        with_tuning(Catalog(store).path(name, "v1"), replace(TUNING, lmbda=lmbda))
    async with system(store) as s:
        answer = await s.post("/v1/next_token", {"text": "the cat", "knn": {"domains": ["cat", "dog"]}})
        weights = [c["weight"] for c in answer["results"][0]["components"]]
        assert all(0 < weight < 1 for weight in weights)
        assert sum(weights) == pytest.approx(1)
        asked = {"domains": [{"domain": "cat", "lambda": 0.8}, {"domain": "dog", "lambda": 0.3}]}
        error = (await s.post("/v1/next_token", {"text": "the cat", "knn": asked}, status=400))["error"]
        assert (error["param"], "add up to 1.1" in error["message"]) == ("knn.lambda", True)


async def test_no_token_at_all_can_be_asked_to_be_shown(store: Path) -> None:
    async with system(store) as s:
        for knn in ({}, {"knn": {"domain": "cat"}}):
            answer = await s.post("/v1/next_token", {"text": "a", "top_n": 0, "full": True, **knn})
            assert answer["results"][0]["top"] == []


async def test_distributions_are_counted_before_they_are_made(store: Path) -> None:
    texts = ["a", "b", "c"]
    async with system(store, max_distribution_numbers=2 * 258) as s:
        await s.post("/v1/next_token", {"text": texts[:2]})
        error = (await s.post("/v1/next_token", {"text": texts}, status=413))["error"]
        assert (error["code"], error["param"]) == ("too_large", "text")
        metrics = (await s.client.get("/metrics")).text
    assert 'knnlm_upstream_seconds_count{code="OK",service="lm"}' in metrics


async def test_lists_of_numbers_are_counted_over_the_whole_answer(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.aggregator.engine.LIST_LIMIT", 6 * 258)
    body = {"text": ["a"] * 2, "full": True, "model": "toy+cat"}
    more = {**body, "text": ["a"] * 3}
    async with system(store) as s:
        await s.post("/v1/next_token", body)
        error = (await s.post("/v1/next_token", more, status=413))["error"]
        assert error["param"] == "encoding"
        await s.post("/v1/next_token", {**more, "encoding": "base64"})


async def test_a_context_that_is_too_long_is_refused_or_cut_on_the_left(store: Path) -> None:
    text = TEXT[:60]
    async with system(store) as s:
        error = (await s.post("/v1/next_token", {"text": text}, status=413))["error"]
        assert (error["param"], "truncate" in error["message"]) == ("text", True)
        answer = await s.post("/v1/next_token", {"text": text, "truncate": "left", "knn": {"domain": "cat"}})
        with pipeline(store) as p:
            tokens = p.tokenizer.encode(text)
            kept = np.concatenate([tokens[:1], tokens[-31:]])
            expected = p.next_token(kept, "cat").mixed.log_probs[0]
        assert answer["results"][0]["context_tokens"] == 32
        np.testing.assert_allclose(answer["results"][0]["top"][0]["p"], np.exp(expected.max()), rtol=1e-6)
        short = await s.post("/v1/next_token", {"text": "the cat", "truncate": "left"})
        assert short["results"] == (await s.post("/v1/next_token", {"text": "the cat"}))["results"]


@pytest.mark.parametrize(
    ("tokens", "param"),
    [([[1], []], "tokens"), ([], "tokens"), ([[1], 2], "tokens"), ([True], "tokens"), ("a", "tokens")],
)
async def test_tokens_are_refused_under_their_own_name(store: Path, tokens: Sequence[object], param: str) -> None:
    async with system(store) as s:
        error = (await s.post("/v1/next_token", {"tokens": tokens}, status=400))["error"]
        assert error["param"] == param
        error = (await s.post("/v1/next_token", {"text": 5}, status=400))["error"]
        assert error["param"] == "text"


async def test_windows_of_scoring_are_settings_and_never_larger_than_the_model_service_takes(store: Path) -> None:
    async with system(store, context_length=16, min_context=12, max_context_length=20) as s:
        default = await s.post("/v1/score", {"text": TEXT, "model": "toy+cat"})
        assert (default["context_length"], default["min_context"]) == (16, 12)
        asked = await s.post("/v1/score", {"text": TEXT, "context_length": 20})
        assert (asked["context_length"], asked["min_context"]) == (20, 10)
        error = (await s.post("/v1/score", {"text": TEXT, "context_length": 21}, status=400))["error"]
        assert error["param"] == "context_length"
        assert (await s.post("/v1/next_token", {"text": TEXT[:25]}, status=413))["error"]["param"] == "text"
    async with system(store) as s:
        built = await s.post("/v1/score", {"text": TEXT, "model": "toy+cat"})
        assert (built["context_length"], built["min_context"]) == (32, 16)


async def test_only_domains_that_this_model_can_use_are_models(store: Path) -> None:
    manifest = Catalog(store).path("raw", "v1")
    from knnlm.datastore.manifest import Manifest

    Manifest.load(manifest).model_copy(update={"key_function": "another"}).save(manifest)
    async with system(store) as s:
        models = (await s.client.get("/v1/models")).json()
        assert [m["id"] for m in models["data"]] == ["toy", "toy+cat", "toy+dog"]
        domains = (await s.client.get("/v1/domains")).json()["domains"]
        assert [d["domain"] for d in domains] == ["cat", "dog", "raw"]
