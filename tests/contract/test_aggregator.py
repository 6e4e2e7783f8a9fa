"""The aggregator over real gRPC services equals the pipeline in one process."""

import base64
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm.datastore.catalog import Catalog
from knnlm.index.searcher import Searcher
from knnlm.options import DomainOptions, KnnOptions, SearchOptions
from knnlm.pipeline import Pipeline
from knnlm.testing import TEXTS, ToyLanguageModel
from tests.contract.system import TEXT, System, store, with_system

__all__ = ["store"]


def pipeline(store: Path) -> Pipeline:
    catalog = Catalog(store)
    searchers = {d: Searcher.open(catalog.path(d, catalog.current(d) or "")) for d in catalog.domains()}
    return Pipeline(ToyLanguageModel(), searchers)


CHOICES: list[tuple[dict[str, Any], KnnOptions | None]] = [
    ({}, None),
    ({"model": "toy"}, None),
    ({"model": "toy+cat"}, KnnOptions((DomainOptions("cat"),))),
    (
        {"knn": {"domain": "dog", "k": 3, "lambda": 0.7}},
        KnnOptions((DomainOptions("dog", None, 0.7),), search=SearchOptions(k=3)),
    ),
    (
        {"knn": {"domain": "raw", "lambda": 1.0, "temperature": 0.5, "rescore": True}},
        KnnOptions((DomainOptions("raw", None, 1.0, 0.5),), search=SearchOptions(rescore=True)),
    ),
    (
        {"knn": {"domains": ["cat", {"domain": "dog", "lambda": 0.1}]}},
        KnnOptions((DomainOptions("cat"), DomainOptions("dog", None, 0.1))),
    ),
    (
        {"knn": {"domain": "cat", "exclude_documents": ["0", "3"]}},
        KnnOptions((DomainOptions("cat"),), search=SearchOptions(exclude_documents=("0", "3"))),
    ),
    (
        {"knn": {"domains": ["cat", "dog"], "combine": "union", "lambda": 0.4}},
        KnnOptions((DomainOptions("cat", None, 0.4), DomainOptions("dog", None, 0.4)), combine="union"),
    ),
]


def test_next_token_equals_the_pipeline(store: Path) -> None:
    texts = ["the cat", TEXT[:30]]

    async def check(s: System) -> None:
        with pipeline(store) as p:
            for body, options in CHOICES:
                answer = await s.post("/v1/next_token", {"text": texts, "full": True, "top_n": 5, **body})
                expected = p.next_token(texts, options).mixed
                for i, result in enumerate(answer["results"]):
                    got = result["distribution"]
                    np.testing.assert_allclose(got["p"], np.exp(expected.log_probs[i]), rtol=1e-6, atol=1e-9)
                    np.testing.assert_allclose(got["p_lm"], np.exp(expected.lm_log_probs[i]), rtol=1e-6, atol=1e-9)
                    assert (got["p_knn"] is None) == (expected.knn_log_probs is None)
                    if expected.knn_log_probs is not None:
                        np.testing.assert_allclose(
                            got["p_knn"], np.exp(expected.knn_log_probs[i]), rtol=1e-5, atol=1e-9
                        )
                    best = np.argsort(-np.array(got["p"]), kind="stable")[:5]
                    np.testing.assert_allclose([t["p"] for t in result["top"]], np.array(got["p"])[best], rtol=1e-6)

    with_system(store, check)


def test_score_equals_the_pipeline(store: Path) -> None:
    async def check(s: System) -> None:
        with pipeline(store) as p:
            for body, options in CHOICES:
                if options is not None and options.domains[0].lmbda == 1.0:
                    continue  # minus infinity has a test of its own
                answer = await s.post("/v1/score", {"text": TEXT, "min_context": 8, **body})
                expected = p.score(TEXT, options, min_context=8)
                np.testing.assert_allclose([t["log_p"] for t in answer["tokens"]], expected.log_probs, rtol=1e-6)
                np.testing.assert_allclose([t["log_p_lm"] for t in answer["tokens"]], expected.lm_log_probs, rtol=1e-6)
                assert [t["token_id"] for t in answer["tokens"]] == expected.tokens[1:].tolist()
                assert math.isclose(answer["perplexity"], expected.perplexity, rel_tol=1e-6)
                assert math.isclose(answer["total_log_p"], expected.total, rel_tol=1e-6)

    with_system(store, check)


def test_a_document_that_is_excluded_is_shown_no_more(store: Path) -> None:
    async def check(s: System) -> None:
        body = {"text": TEXTS[0][:30], "model": "toy+cat", "neighbors": 5}
        found = (await s.post("/v1/next_token", body))["results"][0]["neighbors"]
        assert found[0]["document"] == "0"
        answer = await s.post("/v1/next_token", {**body, "knn": {"exclude_documents": ["0"]}})
        others = answer["results"][0]["neighbors"]
        assert len(others) == 5
        assert "0" not in {n["document"] for n in others}

    with_system(store, check)


def test_lambda_zero_is_the_lm(store: Path) -> None:
    async def check(s: System) -> None:
        answer = await s.post("/v1/score", {"text": TEXT, "knn": {"domain": "cat", "lambda": 0}})
        for token in answer["tokens"]:
            assert token["log_p"] == token["log_p_lm"]
        assert answer["perplexity"] == pytest.approx(answer["perplexity_lm"], rel=1e-12)

    with_system(store, check)


def test_what_json_cannot_say_is_null(store: Path) -> None:
    async def check(s: System) -> None:
        knn = {"domain": "raw", "lambda": 1, "temperature": 1, "k": 1}
        answer = await s.post("/v1/score", {"text": "zebra zebra", "knn": knn})
        assert answer["total_log_p"] is None
        assert answer["perplexity"] is None
        assert None in [t["log_p"] for t in answer["tokens"]]

    with_system(store, check)


def test_packed_and_listed_distributions_agree(store: Path) -> None:
    async def check(s: System) -> None:
        body = {"text": "the cat", "model": "toy+cat", "full": True}
        listed = (await s.post("/v1/next_token", body))["results"][0]["distribution"]
        packed = (await s.post("/v1/next_token", {**body, "encoding": "base64"}))["results"][0]["distribution"]
        for name in ("p", "p_lm", "p_knn"):
            values = np.frombuffer(base64.b64decode(packed[name]["data"]), "<f4")
            np.testing.assert_array_equal(values, np.array(listed[name], np.float32))

    with_system(store, check)


def test_neighbors_come_with_their_source(store: Path) -> None:
    async def check(s: System) -> None:
        body = {"text": "the cat sat on the", "model": "toy+cat", "neighbors": 2, "neighbor_tokens": 9}
        answer = await s.post("/v1/next_token", body)
        shown = answer["results"][0]["neighbors"]
        assert len(shown) == 2
        assert shown[0]["distance"] <= shown[1]["distance"]
        for n in shown:
            text = "<s>" + TEXTS[int(n["document"])]
            assert n["before"] + n["after"] in text
            assert n["after"].startswith(n["token"])
            assert len(n["before"]) <= 9
            assert 0 < n["weight"] <= 1

    with_system(store, check)


def test_token_ids_are_used_as_they_are(store: Path) -> None:
    async def check(s: System) -> None:
        tokens = ToyLanguageModel().tokenizer.encode("the cat").tolist()
        by_text = await s.post("/v1/next_token", {"text": "the cat"})
        assert await s.post("/v1/next_token", {"tokens": tokens}) == by_text
        assert await s.post("/v1/next_token", {"tokens": [tokens]}) == by_text
        assert await s.post("/v1/score", {"tokens": tokens}) == await s.post("/v1/score", {"text": "the cat"})
        there = await s.post("/tokenize", {"prompt": "the cat"})
        assert there["tokens"] == tokens
        assert (await s.post("/v1/detokenize", {"tokens": tokens[1:]}))["prompt"] == "the cat"
        bare = await s.post("/tokenize", {"prompt": "the cat", "add_special_tokens": False, "return_token_strs": True})
        assert bare["tokens"] == tokens[1:]
        assert "".join(bare["token_strs"]) == "the cat"
        special = {"prompt": "<s>", "add_special_tokens": False}
        assert (await s.post("/tokenize", special))["tokens"] == [0]
        assert (await s.post("/tokenize", special | {"parse_special": False}))["count"] == 3
        parsed = await s.post("/v1/next_token", {"text": "the cat<s>", "parse_special": True})
        assert parsed == await s.post("/v1/next_token", {"tokens": [*tokens, 0]})

    with_system(store, check)


def test_models_and_domains_are_listed(store: Path) -> None:
    async def check(s: System) -> None:
        ids = [m["id"] for m in (await s.client.get("/v1/models")).json()["data"]]
        assert ids == ["toy", "toy+cat", "toy+dog", "toy+raw"]
        assert (await s.client.get("/v1/models/toy+cat")).json()["max_model_len"] == 32
        assert (await s.client.get("/v1/models/toy+law")).status_code == 404
        domains = {d["domain"]: d for d in (await s.client.get("/v1/domains")).json()["domains"]}
        assert domains["cat"]["versions"] == ["v1", "v2"]
        assert domains["cat"]["tuning"]["lambda"] == 0.3
        assert domains["raw"]["tuning"] is None
        assert domains["raw"]["indexes"] == ["flat"]
        assert domains["raw"]["memory"]["keys"] == "mapped"
        assert domains["raw"]["memory"]["keys_bytes"] == domains["raw"]["entries"] * 16 * 2  # float16
        assert (await s.client.get("/tokenizer_info")).json()["eos_token"] == "</s>"

    with_system(store, check)


def test_switching_changes_the_answer_and_its_version(store: Path) -> None:
    async def check(s: System) -> None:
        body = {"text": "the cat sat on the", "model": "toy+cat", "full": True}
        before = await s.post("/v1/next_token", body)
        assert (await s.post("/v1/domains/cat:activate", {"version": "v2"}))["version"] == "v2"
        after = await s.post("/v1/next_token", body)
        assert (before["domains"][0]["version"], after["domains"][0]["version"]) == ("v1", "v2")
        assert before["results"][0]["distribution"]["p"] != after["results"][0]["distribution"]["p"]
        pinned = await s.post("/v1/next_token", {**body, "knn": {"version": "v1"}})
        assert pinned == before
        await s.post("/v1/domains/cat:activate", {"version": "v9"}, status=404)
        await s.post("/v1/domains/cow:activate", {"version": "v1"}, status=404)

    with_system(store, check)
