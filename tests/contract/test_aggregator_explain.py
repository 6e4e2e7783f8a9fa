"""Explained texts: the aggregator over the services answers as the library does in one process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm.index.searcher import Searcher
from knnlm.options import DomainOptions, KnnOptions, SearchOptions
from knnlm.pipeline import Pipeline
from knnlm.scoring import Score
from knnlm.testing import TEXTS, ToyLanguageModel
from tests.contract.system import TEXT, store, system

__all__ = ["store"]

BOTH = KnnOptions((DomainOptions("cat"), DomainOptions("dog")), SearchOptions(k=9), combine="mixture")
ONE = KnnOptions((DomainOptions("cat", lmbda=0.2, temperature=2.0), DomainOptions("dog", lmbda=0.2, temperature=2.0)),
                 combine="union")  # fmt: skip
CHOICES: list[tuple[dict[str, Any], KnnOptions | str]] = [
    ({"model": "toy+cat"}, "cat"),
    ({"knn": {"domains": ["cat", "dog"], "k": 9}}, BOTH),
    ({"knn": {"domains": ["cat", "dog"], "lambda": 0.2, "temperature": 2, "combine": "union"}}, ONE),
]


def pipeline(store: Path) -> Pipeline:
    lm = ToyLanguageModel()
    return Pipeline(lm, {d: Searcher.open(store / d / "v1", expect=lm.info) for d in ("cat", "dog")})


def assert_same(answer: Any, expected: Score, p: Pipeline) -> None:  # Any: JSON
    tokens = answer["tokens"]
    assert [t["token_id"] for t in tokens] == expected.tokens[expected.first :].tolist()
    assert answer["context"] + "".join(t["token"] for t in tokens) == p.tokenizer.decode(expected.tokens)
    np.testing.assert_allclose([t["log_p"] for t in tokens], expected.log_probs, rtol=1e-6)
    np.testing.assert_allclose([t["log_p_lm"] for t in tokens], expected.lm_log_probs, rtol=1e-6)
    np.testing.assert_allclose([t["lambda"] for t in tokens], expected.weight)
    assert all(sum(c["weight"] for c in t["components"]) == pytest.approx(1) for t in tokens)
    for c, share in enumerate(expected.mixed.components, start=1):
        for i, token in enumerate(tokens):
            shown = token["components"][c]
            assert (shown["name"], shown["kind"]) == (share.name, share.kind)
            carried = share.evidence.carried[i]
            places = [(s["domain"], s["document"], s["position"]) for s in shown["passages"]]
            assert places == [(x.domain, x.passage.document, x.passage.position) for x in carried]
            np.testing.assert_allclose([s["share"] for s in shown["passages"]], [x.share for x in carried], rtol=1e-5)
            for passage, x in zip(shown["passages"], carried, strict=True):
                whole = np.concatenate([x.passage.before, x.passage.after])
                inside = x.passage.position > len(x.passage.before)
                assert passage["before"] + passage["after"] == "".join(p.tokenizer.pieces(whole, inside=inside))
    named = [(d["domain"], d["document"], d["tokens"]) for d in answer["documents"]]
    assert named == [(d.domain, d.document, d.tokens) for d in expected.documents]
    np.testing.assert_allclose([d["share"] for d in answer["documents"]], [d.share for d in expected.documents], 1e-5)
    assert answer["total_log_p"] == pytest.approx(expected.total)
    assert answer["perplexity"] == pytest.approx(expected.perplexity)


async def test_explain_equals_the_pipeline(store: Path) -> None:
    async with system(store) as s:
        with pipeline(store) as p:
            for body, options in CHOICES:
                answer = await s.post("/v1/explain", {"text": TEXT, "min_context": 8, "passages": 2, **body})
                assert_same(answer, p.explain(TEXT, options, min_context=8, passages=2), p)
                assert answer["documents"]
                assert [d["version"] for d in answer["domains"]] == ["v1"] * len(answer["domains"])


async def test_a_completion_is_explained_in_the_context_of_its_prompt(store: Path) -> None:
    prompt, completion = TEXT[:40], TEXT[40:]
    async with system(store) as s:
        with pipeline(store) as p:
            expected = p.explain(completion, "cat", prompt=prompt, passage_tokens=5)
            body: dict[str, Any] = {"model": "toy+cat", "passage_tokens": 5}
            answer = await s.post("/v1/explain", {"prompt": prompt, "completion": completion, **body})
            assert_same(answer, expected, p)
            ids = expected.tokens.tolist()
            first = expected.first
            again = await s.post("/v1/explain", {"prompt": ids[:first], "completion": ids[first:], **body})
            assert again == answer
        score = await s.post("/v1/score", {"text": TEXT, "model": "toy+cat"})
        expected_tail = [t["log_p"] for t in score["tokens"]][-len(answer["tokens"]) :]
        np.testing.assert_allclose([t["log_p"] for t in answer["tokens"]], expected_tail, rtol=1e-9)
        empty = await s.post("/v1/explain", {"prompt": "", "completion": TEXT, **body})
        assert [t["log_p"] for t in empty["tokens"]] == pytest.approx([t["log_p"] for t in score["tokens"]])


async def test_a_stored_text_leans_on_its_own_document(store: Path) -> None:
    async with system(store) as s:
        answer = await s.post("/v1/explain", {"text": TEXTS[0][:40], "model": "toy+cat", "passages": 6})
        first = answer["documents"][0]
        assert (first["domain"], first["document"]) == ("cat", "0")
        assert first["share"] > 0.5
        assert first["tokens"] == 40
        others = await s.post(
            "/v1/explain", {"text": TEXTS[0][:40], "model": "toy+cat", "knn": {"exclude_documents": ["0"]}}
        )
        assert "0" not in {d["document"] for d in others["documents"]}


async def test_without_retrieval_there_is_nothing_but_the_lm(store: Path) -> None:
    async with system(store) as s:
        answer = await s.post("/v1/explain", {"text": "the cat"})
        assert answer["documents"] == answer["domains"] == []
        for token in answer["tokens"]:
            (lm,) = token["components"]
            assert (lm["kind"], lm["weight"], lm["passages"]) == ("lm", 1, [])
            assert lm["log_p"] == token["log_p"] == token["log_p_lm"]
        knn = {"domain": "raw", "lambda": 1, "temperature": 1, "k": 1}
        never = await s.post("/v1/explain", {"text": "zebra zebra", "knn": knn})
        assert never["total_log_p"] is None
        shown = await s.post("/v1/explain", {"text": "the cat", "model": "toy+cat", "passages": 0})
        assert not any(c["passages"] for t in shown["tokens"] for c in t["components"])


async def test_one_version_answers_and_is_named(store: Path) -> None:
    async with system(store) as s:
        body = {"text": TEXT, "model": "toy+cat"}
        before = await s.post("/v1/explain", body)
        await s.post("/v1/domains/cat:activate", {"version": "v2"})
        after = await s.post("/v1/explain", body)
        assert (before["domains"][0]["version"], after["domains"][0]["version"]) == ("v1", "v2")
        pinned = await s.post("/v1/explain", {**body, "knn": {"version": "v1"}})
        assert pinned["tokens"] == before["tokens"]
