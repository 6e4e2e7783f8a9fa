"""Memories in a running system: an lm service of their own each, named to the aggregator."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm import AsyncClient, DomainOptions, GenerationOptions, KnnOptions, MemoryOptions, Pipeline, SamplingOptions
from knnlm.datastore.catalog import Catalog
from knnlm.errors import Unavailable
from knnlm.index.searcher import Searcher
from knnlm.messages import TrainedMemory
from knnlm.testing import ToyLanguageModel
from services.aggregator.settings import AggregatorSettings
from tests.contract.system import TEXT, store, system

__all__ = ["store"]

LAW = ToyLanguageModel(seed=5)
MEMORIES = {"law": LAW, "med": ToyLanguageModel(seed=6, padding=6)}
CHOICES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"memory": {"name": "law", "lambda": 0.4}}, {"memory": MemoryOptions("law", 0.4)}),
    ({"model": "toy~med", "memory": {"lambda": 0.3}}, {"memory": MemoryOptions("med", 0.3)}),
    (
        {"model": "toy+cat~law", "memory": {"lambda": 0.25}},
        {"knn": KnnOptions((DomainOptions("cat"),)), "memory": MemoryOptions("law", 0.25)},
    ),
    ({"memory": {"name": "law", "lambda": 1.0}}, {"memory": MemoryOptions("law", 1.0)}),
]


def pipeline(store: Path) -> Pipeline:
    catalog = Catalog(store)
    searchers = {d: Searcher.open(catalog.path(d, catalog.current(d) or "")) for d in catalog.domains()}
    return Pipeline(ToyLanguageModel(), searchers, MEMORIES)


def foreign() -> ToyLanguageModel:
    model = ToyLanguageModel(seed=7)
    model.info = replace(model.info, tokenizer_sha256="0" * 64)
    return model


def floats(values: list[float | None]) -> list[float]:
    return [-np.inf if value is None else value for value in values]


async def test_answers_are_those_of_the_library(store: Path) -> None:
    async with system(store, memories=MEMORIES) as s:
        with pipeline(store) as p:
            for body, options in CHOICES:
                answer = await s.post("/v1/next_token", {"text": TEXT[:20], "top_n": 4, **body})
                expected = p.next_token(TEXT[:20], options)
                top = np.sort(np.exp(expected.mixed.log_probs[0]))[::-1][:4]
                np.testing.assert_allclose([t["p"] for t in answer["results"][0]["top"]], top, rtol=1e-6)
                name = options["memory"].name
                assert answer["memories"] == [expected.memories[0].as_json()]
                assert answer["memories"][0]["fingerprint"] == MEMORIES[name].info.fingerprint
                shown = answer["results"][0]["components"]
                assert (shown[-1]["name"], shown[-1]["kind"]) == (name, "memory")
                assert answer["model"] == ("toy+cat~" if "knn" in options else "toy~") + name

                scored = await s.post("/v1/score", {"text": TEXT, **body})
                score = p.score(TEXT, options)
                np.testing.assert_allclose(floats([t["log_p"] for t in scored["tokens"]]), score.log_probs, rtol=1e-6)
                explained = await s.post("/v1/explain", {"text": TEXT, **body})
                np.testing.assert_allclose(
                    [t["components"][-1]["log_p"] for t in explained["tokens"]],
                    score.mixed.components[-1].evidence.of_targets,
                    rtol=1e-6,
                )
                assert {t["components"][-1]["kind"] for t in explained["tokens"]} == {"memory"}
                assert scored["memories"] == explained["memories"] == answer["memories"]


async def test_completions_are_those_of_the_library_and_say_which_memory_was_mixed(store: Path) -> None:
    options = GenerationOptions(9, SamplingOptions(temperature=0), ignore_eos=True)
    async with system(store, memories=MEMORIES) as s:
        with pipeline(store) as p:
            for body, sources in CHOICES:
                expected = p.generate("the cat", sources, options)
                asked = {"prompt": "the cat", "max_tokens": 9, "temperature": 0, "ignore_eos": True, "add_bos": True}
                answer = await s.post("/v1/completions", {**asked, **body})
                assert answer["choices"][0]["text"] == expected.text
                assert answer["memories"] == [m.as_json() for m in expected.memories]
                streamed = await s.client.post("/v1/completions", json={**asked, **body, "stream": True})
                events = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line.startswith("data: {")]
                assert "".join(e["choices"][0]["text"] for e in events) == expected.text
                assert events[0]["memories"] == answer["memories"]
                assert not any("memories" in e for e in events[1:])


async def test_completions_are_explained_beside_a_memory_without_a_domain(store: Path) -> None:
    body = {"prompt": "the cat", "max_tokens": 3, "temperature": 0, "knn": {"explain": 2}}
    async with system(store, memories={"law": LAW}) as s:
        answer = await s.post("/v1/completions", {**body, "memory": {"name": "law", "lambda": 0.4}})
        named = await s.post("/v1/completions", {**body, "model": "toy~law", "memory": {"lambda": 0.4}})
        assert named["choices"] == answer["choices"]
        assert answer["domains"] == []
        for token in answer["choices"][0]["explained"]:
            assert [(c["kind"], c["passages"]) for c in token["components"]] == [("lm", []), ("memory", [])]
            p = sum(c["weight"] * np.exp(c["log_p"]) for c in token["components"])
            assert token["log_p"] == pytest.approx(np.log(p), rel=1e-5)
        assert (await s.post("/v1/completions", body, status=400))["error"]["param"] == "knn.domain"
        both = {**body, "knn": {"explain": 2, "k": 3}, "memory": {"name": "law", "lambda": 0.4}}
        assert (await s.post("/v1/completions", both, status=400))["error"]["param"] == "knn.domain"


async def test_a_memory_of_weight_zero_is_left_in_peace(store: Path) -> None:
    async with system(store, memories={"law": LAW}) as s:
        await s.hosts["memory law"].shut()
        for model in ("toy", "toy+cat"):
            body = {"text": TEXT[:20], "model": model}
            without = await s.post("/v1/next_token", body)
            answer = await s.post("/v1/next_token", {**body, "memory": {"name": "law", "lambda": 0}})
            assert answer["results"] == without["results"]
            assert answer["memories"] == [{"name": "law", "lambda": 0.0, "model_id": None, "fingerprint": None}]


async def test_every_mixture_is_a_model(store: Path) -> None:
    async with system(store, memories={**MEMORIES, "foreign": foreign()}) as s:
        ids = [m["id"] for m in (await s.client.get("/v1/models")).json()["data"]]
        mixed = ["toy", "toy+cat", "toy+dog", "toy+raw"]
        assert ids == [*mixed, *(f"{m}~law" for m in mixed), *(f"{m}~med" for m in mixed)]
        for name in ids:
            assert (await s.client.get(f"/v1/models/{name}")).status_code == 200
        for name in ("toy~", "toy~x", "toy~law~med", "toy~law+cat", "toy+~law", "toys", "toy+cat~x"):
            answer = await s.client.get(f"/v1/models/{name}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_model"), name
        assert (await s.post("/tokenize", {"prompt": "a", "model": "toy~law"}))["count"] == 2


async def test_models_say_which_memories_are_stale(store: Path) -> None:
    def trained(version: str) -> ToyLanguageModel:
        model = ToyLanguageModel(seed=5)
        model.info = replace(model.info, memory=TrainedMemory("cat", version, "c" * 64, 40, 0.5, 0.35))
        return model

    async with system(store, memories={"law": LAW, "new": trained("v1"), "old": trained("v0")}) as s:
        listed = {m["id"]: m["stale"] for m in (await s.client.get("/v1/models")).json()["data"]}
        said = listed["toy~old"]
        assert said.startswith("trained on cat v0 (40 entries), which answers from v1 now")
        assert {name for name, stale in listed.items() if stale} == {n for n in listed if n.endswith("~old")}
        assert (await s.client.get("/v1/models/toy+cat~old")).json()["stale"] == said


REFUSED: Mapping[str, tuple[dict[str, Any], int, str]] = {
    "unknown": ({"memory": {"name": "x", "lambda": 0.1}}, 404, "memory.name"),
    "unknown in the model": ({"model": "toy~x", "memory": {"lambda": 0.1}}, 404, "model"),
    "two names": ({"model": "toy~law", "memory": {"name": "med", "lambda": 0.1}}, 400, "memory.name"),
    "no name": ({"memory": {"lambda": 0.1}}, 400, "memory.name"),
    "no weight": ({"model": "toy~law"}, 400, "memory.lambda"),
    "a weight above one": ({"memory": {"name": "law", "lambda": 1.5}}, 400, "memory.lambda"),
    "another field": ({"memory": {"name": "law", "lambda": 0.5, "k": 3}}, 400, "memory.k"),
    "another way to fail": ({"memory": {"name": "law", "lambda": 0.5, "on_memory_error": "x"}}, 400,
                            "memory.on_memory_error"),
    "too much with a domain": ({"model": "toy+cat~law", "knn": {"lambda": 0.7}, "memory": {"lambda": 0.5}}, 400,
                               "knn.lambda"),
    "another tokenizer": ({"memory": {"name": "foreign", "lambda": 0.5}}, 409, "memory.name"),
    "neighbors of a memory": ({"model": "toy~law", "memory": {"lambda": 0.5}, "neighbors": 3}, 400, "neighbors"),
}  # fmt: skip


async def test_what_is_wrong_is_named_as_the_request_has_it(store: Path) -> None:
    async with system(store, memories={"law": LAW, "med": LAW, "foreign": foreign()}) as s:
        for body, status, param in REFUSED.values():
            error = (await s.post("/v1/next_token", {"text": "the cat", **body}, status=status))["error"]
            assert error["param"] == param, error
            if "neighbors" not in body:
                for path, given in (
                    ("/v1/score", {"text": "the cat"}),
                    ("/v1/explain", {"text": "the cat"}),
                    ("/v1/completions", {"prompt": "the cat"}),
                ):
                    error = (await s.post(path, {**given, **body}, status=status))["error"]
                    assert error["param"] == param, (path, error)


async def test_a_memory_that_is_down_fails_the_requests_that_name_it_and_no_others(store: Path) -> None:
    named, text = {"name": "law", "lambda": 0.4}, {"text": "the cat"}
    async with system(store, memories={"law": LAW}, memory_wait_s=0.2) as s:
        await s.post("/v1/next_token", {**text, "memory": named})
        alone = await s.post("/v1/next_token", text)
        await s.hosts["memory law"].shut()
        assert (await s.client.get("/readyz")).status_code == 200
        error = (await s.post("/v1/next_token", {**text, "memory": named}, status=503))["error"]
        assert error["message"].startswith("memory law: ")
        assert error["code"] == "unavailable"
        lenient = {"memory": {**named, "on_memory_error": "lm_only"}}
        for path, given in (("/v1/next_token", text), ("/v1/score", text), ("/v1/completions", {"prompt": "the cat"})):
            answer = await s.post(path, {**given, **lenient})
            assert answer["degraded"].startswith("memory law: ")
            assert answer["memories"] == []
        degraded = await s.post("/v1/next_token", {**text, **lenient})
        assert degraded["results"] == alone["results"]
        assert (await s.post("/v1/next_token", {**text, "model": "toy+cat"}))["degraded"] is None
        assert [m["id"] for m in (await s.client.get("/v1/models")).json()["data"]][:2] == ["toy", "toy+cat"]
        metrics = (await s.client.get("/metrics")).text
        assert 'knnlm_upstream_seconds_count{code="OK",service="memory law"}' in metrics
        assert "knnlm_knn_degraded_total 4.0" in metrics


class Leaving(ToyLanguageModel):
    """Answers a number of requests, and then no more. tried: how often it was asked."""

    def __init__(self, answers: int) -> None:
        super().__init__(seed=5)
        self.left = answers

    def forward(self, request: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Unavailable("gone")
        return super().forward(request)


@pytest.mark.parametrize("fail", ["fail", "lm_only"])
async def test_a_memory_that_goes_in_the_midst_of_a_stream_ends_it_or_is_told_of(store: Path, fail: str) -> None:
    memory = {"name": "law", "lambda": 0.4, "on_memory_error": fail}
    body = {"prompt": "the cat", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "stream": True, "logprobs": 0}
    async with system(store, memories={"law": Leaving(3)}, memory_wait_s=0.2) as s:
        answer = await s.client.post("/v1/completions", json={**body, "memory": memory})
        events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
        assert answer.text.rstrip().endswith("data: [DONE]")
        before = [e for e in events if "error" not in e and e.get("degraded") is None]
        assert len(before) == 3
        if fail == "fail":
            assert len(events) == 4
            assert events[-1]["error"]["message"].startswith("memory law: ")
        else:
            assert len(events) == 8
            assert all(e["degraded"].startswith("memory law: ") for e in events[3:])


async def test_a_memory_that_is_down_from_the_start_keeps_nobody_waiting(store: Path) -> None:
    async with system(store, memory=("law=127.0.0.1:1",), memory_wait_s=0.1) as s:
        assert (await s.client.get("/readyz")).status_code == 200
        assert (await s.post("/v1/next_token", {"text": "a"}))["degraded"] is None
        body = {"text": "a", "memory": {"name": "law", "lambda": 0.4}}
        assert "memory law" in (await s.post("/v1/next_token", body, status=503))["error"]["message"]


async def test_settings_say_how_a_memory_that_is_down_is_taken(store: Path) -> None:
    async with system(store, memory=("law=127.0.0.1:1",), memory_wait_s=0.1, on_memory_error="lm_only") as s:
        body = {"text": "a", "memory": {"name": "law", "lambda": 0.4}}
        assert (await s.post("/v1/next_token", body))["degraded"].startswith("memory law: ")
        strict = {"text": "a", "memory": {"name": "law", "lambda": 0.4, "on_memory_error": "fail"}}
        await s.post("/v1/next_token", strict, status=503)


async def test_a_memory_that_was_restarted_as_another_model_is_that_from_the_next_request_on(store: Path) -> None:
    body = {"text": "the cat", "memory": {"name": "law", "lambda": 1.0}}
    model = ToyLanguageModel(seed=5)
    async with system(store, memories={"law": model}) as s:
        before = await s.post("/v1/next_token", body)
        vars(model).update(vars(ToyLanguageModel(seed=8)))
        now = await s.post("/v1/next_token", body)
        assert now["memories"][0]["fingerprint"] == model.info.fingerprint != before["memories"][0]["fingerprint"]
        assert now["results"] != before["results"]


async def test_clients_take_a_memory_by_name_or_with_its_options(store: Path) -> None:
    async with (
        system(store, memories=MEMORIES) as s,
        AsyncClient("http://test", transport=s.client._transport) as client,
    ):
        for memory in (MemoryOptions("law", 0.4), {"name": "law", "lambda": 0.4}):
            answer = await client.next_token("the cat", memory=memory)
            assert (answer.memories[0].name, answer.memories[0].lmbda) == ("law", 0.4)
            assert answer.memories[0].fingerprint == LAW.info.fingerprint
            scored = await client.score(TEXT, memory=memory)
            explained = await client.explain(TEXT, memory=memory)
            completed = await client.complete("the cat", memory=memory)
            assert scored.memories == explained.memories == completed.memories == answer.memories
            streamed = [part async for part in client.stream("the cat", memory=memory, max_tokens=3)]
            assert streamed[0].memories == answer.memories


@pytest.mark.parametrize("given", ["law", "law=", "=127.0.0.1:1", "LAW=127.0.0.1:1", "a+b=127.0.0.1:1"])
def test_a_memory_without_a_name_or_address_stops_the_start(given: str) -> None:
    with pytest.raises(ValueError, match="NAME=HOST:PORT"):
        AggregatorSettings(memory=(given,))


def test_a_name_that_stands_twice_is_one_memory_of_two_replicas() -> None:
    settings = AggregatorSettings(memory="law=127.0.0.1:1,med=127.0.0.1:2,law=127.0.0.1:3")
    assert settings.memory_targets == {"law": "127.0.0.1:1,127.0.0.1:3", "med": "127.0.0.1:2"}
