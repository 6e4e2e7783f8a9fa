"""What the aggregator refuses it refuses by name: bad input, too much of it, no key, retrieval that is down."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from services.aggregator.settings import AggregatorSettings
from services.datastore.settings import DatastoreSettings
from tests.contract.system import System, store, system, with_system

__all__ = ["store"]

REFUSED: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    ("/v1/next_token", {}, 400, "invalid_request", "text"),
    ("/v1/next_token", {"text": ""}, 400, "invalid_request", "text"),
    ("/v1/next_token", {"text": []}, 400, "invalid_request", "text"),
    ("/v1/next_token", {"text": "a", "tokens": [1]}, 400, "invalid_request", "text"),
    ("/v1/next_token", {"text": "a" * 40}, 413, "too_large", "text"),
    ("/v1/next_token", {"tokens": []}, 400, "invalid_request", "tokens"),
    ("/v1/next_token", {"tokens": [[]]}, 400, "invalid_request", "tokens"),
    ("/v1/next_token", {"tokens": [258]}, 400, "invalid_request", "tokens"),
    ("/v1/next_token", {"tokens": [-1]}, 400, "invalid_request", "tokens"),
    ("/v1/next_token", {"tokens": [2**40]}, 400, "invalid_request", "tokens"),
    ("/v1/next_token", {"tokens": [1.5]}, 400, "invalid_request", "tokens"),
    ("/v1/next_token", {"text": "a", "max_tokens": 3}, 400, "invalid_request", "max_tokens"),
    ("/v1/next_token", {"text": "a", "top_n": -1}, 400, "invalid_request", "top_n"),
    ("/v1/next_token", {"text": "a", "top_n": 1001}, 413, "too_large", "top_n"),
    ("/v1/next_token", {"text": "a", "neighbors": 3}, 400, "invalid_request", "neighbors"),
    ("/v1/next_token", {"text": "a", "model": "toy+cat", "neighbors": 257}, 413, "too_large", "neighbors"),
    ("/v1/next_token", {"text": ["a"] * 65}, 413, "too_large", "text"),
    ("/v1/next_token", {"text": "a", "model": "gpt2"}, 404, "unknown_model", "model"),
    ("/v1/next_token", {"text": "a", "model": "toy+law"}, 404, "unknown_domain", "model"),
    ("/v1/score", {"text": "ab", "model": "toy+law"}, 404, "unknown_domain", "model"),
    ("/v1/next_token", {"text": "a", "model": "toy+law", "knn": {"k": 3}}, 404, "unknown_domain", "model"),
    ("/v1/next_token", {"text": "a", "model": "toy", "knn": {"domain": "law"}}, 404, "unknown_domain", "knn.domain"),
    ("/v1/next_token", {"text": "a", "model": "toy", "knn": {"k": 3}}, 400, "invalid_request", "knn.domain"),
    ("/v1/next_token", {"text": "a", "knn": {"domains": ["cat", "law"]}}, 404, "unknown_domain", "knn.domains"),
    ("/v1/next_token", {"text": "a", "knn": {"domain": "cat", "overfetch": 1e308}}, 413, "too_large", "knn.overfetch"),
    ("/v1/next_token", {"text": "a", "knn": {"domain": "cat", "overfetch": 17}}, 413, "too_large", "knn.overfetch"),
    ("/v1/next_token", {"text": "a", "knn": {"domain": "cat", "nprobe": 1025}}, 413, "too_large", "knn.nprobe"),
    ("/v1/next_token", {"text": "a", "knn": {"domain": "cat", "nprobe": 2**31}}, 413, "too_large", "knn.nprobe"),
    ("/v1/next_token", {"text": "a", "knn": {"domain": "cat", "nprobe": 10**30}}, 413, "too_large", "knn.nprobe"),
    (
        "/v1/next_token",
        {"text": "a", "model": "toy+cat", "knn": {"domain": "dog"}},
        400,
        "invalid_request",
        "knn.domain",
    ),
    ("/v1/next_token", {"text": "a", "knn": {}}, 400, "invalid_request", "knn.domain"),
    ("/v1/next_token", {"text": "a", "knn": {"domain": "raw"}}, 400, "invalid_request", "knn.temperature"),
    ("/v1/next_token", {"text": "a", "knn": {"domain": "cat", "k": 0}}, 400, "invalid_request", "knn.k"),
    ("/v1/next_token", {"text": "a", "knn": {"domain": "cat", "k": 4097}}, 413, "too_large", "knn.k"),
    ("/v1/next_token", {"text": "a", "knn": {"domain": "cat", "lambda": 2}}, 400, "invalid_request", "knn.lambda"),
    ("/v1/next_token", {"text": "a", "knn": {"domain": "cat", "lambda": True}}, 400, "invalid_request", "knn.lambda"),
    (
        "/v1/next_token",
        {"text": "a", "knn": {"domain": "cat", "temperature": "0.5"}},
        400,
        "invalid_request",
        "knn.temperature",
    ),
    (
        "/v1/next_token",
        {"text": "a", "knn": {"domain": "cat", "overfetch": True}},
        400,
        "invalid_request",
        "knn.overfetch",
    ),
    (
        "/v1/next_token",
        {"text": "a", "knn": {"domain": "cat", "temperature": 0}},
        400,
        "invalid_request",
        "knn.temperature",
    ),
    ("/v1/next_token", {"text": "a", "knn": {"domain": "cat", "rule": "magic"}}, 400, "invalid_request", "knn.rule"),
    ("/v1/next_token", {"text": "a", "knn": {"domain": "cat", "nprobe": 4}}, 400, "invalid_request", "knn.nprobe"),
    (
        "/v1/next_token",
        {"text": "a", "knn": {"domain": "cat", "ef_search": 64}},
        400,
        "invalid_request",
        "knn.ef_search",
    ),
    (
        "/v1/next_token",
        {"text": "a", "knn": {"domain": "cat", "ef_search": 0}},
        400,
        "invalid_request",
        "knn.ef_search",
    ),
    (
        "/v1/next_token",
        {"text": "a", "knn": {"domain": "cat", "exclude_documents": ["9"]}},
        400,
        "invalid_request",
        "knn.exclude_documents",
    ),
    (
        "/v1/next_token",
        {"text": "a", "knn": {"domain": "cat", "exclude_documents": [9]}},
        400,
        "invalid_request",
        "knn.exclude_documents.0",
    ),
    (
        "/v1/next_token",
        {"text": "a", "knn": {"domain": "cat", "exclude_documents": ["0"] * 1025}},
        400,
        "invalid_request",
        "knn.exclude_documents",
    ),
    ("/v1/next_token", {"text": "a", "knn": {"domain": "cat", "version": "v7"}}, 404, "unknown_version", "knn.version"),
    ("/v1/next_token", {"text": "a", "knn": {"domains": ["cat", "cat"]}}, 400, "invalid_request", "knn.domains"),
    ("/v1/next_token", {"text": "a", "knn": {"domains": ["cat"] * 9}}, 413, "too_large", "knn.domains"),
    ("/v1/score", {"text": ""}, 400, "invalid_request", "text"),
    ("/v1/score", {"text": "a", "tokens": [5, 6]}, 400, "invalid_request", "text"),
    ("/v1/score", {"tokens": [5]}, 400, "invalid_request", "tokens"),
    ("/v1/score", {"text": "abc", "min_context": 32}, 400, "invalid_request", "min_context"),
    (
        "/v1/score",
        {"text": "abc", "knn": {"domains": ["cat", "dog"], "lambda": 0.6}},
        400,
        "invalid_request",
        "knn.lambda",
    ),
    ("/v1/explain", {}, 400, "invalid_request", "text"),
    ("/v1/explain", {"text": "a", "tokens": [5, 6]}, 400, "invalid_request", "text"),
    ("/v1/explain", {"tokens": [5]}, 400, "invalid_request", "tokens"),
    ("/v1/explain", {"text": "ab", "prompt": "a"}, 400, "invalid_request", "text"),
    ("/v1/explain", {"tokens": [5, 6], "prompt": "a", "completion": "b"}, 400, "invalid_request", "tokens"),
    ("/v1/explain", {"prompt": "a"}, 400, "invalid_request", "completion"),
    ("/v1/explain", {"completion": "a"}, 400, "invalid_request", "prompt"),
    ("/v1/explain", {"prompt": "a", "completion": [5]}, 400, "invalid_request", "completion"),
    ("/v1/explain", {"prompt": "a", "completion": ""}, 400, "invalid_request", "completion"),
    ("/v1/explain", {"prompt": "a", "completion": 3}, 400, "invalid_request", "completion"),
    ("/v1/explain", {"prompt": [5, "x"], "completion": [5]}, 400, "invalid_request", "prompt.1"),
    ("/v1/explain", {"prompt": [999], "completion": [5]}, 400, "invalid_request", "prompt"),
    ("/v1/explain", {"prompt": [5], "completion": [999]}, 400, "invalid_request", "completion"),
    ("/v1/explain", {"text": "ab", "passages": -1}, 400, "invalid_request", "passages"),
    ("/v1/explain", {"text": "ab", "passages": 257}, 413, "too_large", "passages"),
    ("/v1/explain", {"text": "ab", "passage_tokens": 257}, 413, "too_large", "passage_tokens"),
    ("/v1/explain", {"text": "a" * 200, "passages": 100}, 413, "too_large", "passages"),
    ("/v1/explain", {"text": "a" * 20_000}, 413, "too_large", "text"),
    ("/v1/explain", {"prompt": "a", "completion": "a" * 20_000, "passages": 0}, 413, "too_large", "completion"),
    ("/v1/explain", {"prompt": "a" * (1 << 20), "completion": "a"}, 413, "too_large", "prompt"),
    ("/v1/explain", {"text": "abc", "min_context": 32}, 400, "invalid_request", "min_context"),
    ("/v1/explain", {"text": "ab", "model": "toy+law"}, 404, "unknown_domain", "model"),
    ("/v1/explain", {"text": "ab", "knn": {"domain": "cat", "version": "v7"}}, 404, "unknown_version", "knn.version"),
    ("/v1/explain", {"text": "ab", "knn": {"domain": "cat", "k": 5000}}, 413, "too_large", "knn.k"),
    ("/v1/explain", {"text": "ab", "knn": {"domain": "raw"}}, 400, "invalid_request", "knn.temperature"),
    ("/v1/explain", {"text": "ab", "neighbors": 3}, 400, "invalid_request", "neighbors"),
    ("/tokenize", {"prompt": "é" * (1 << 19) + "x"}, 413, "too_large", "prompt"),
    ("/v1/next_token", {"text": ["x" * (1 << 19)] * 3}, 413, "too_large", "text"),
    ("/v1/score", {"text": "x" * (1 << 20) + "y"}, 413, "too_large", "text"),
    ("/tokenize", {"prompt": "x" * (6 << 20)}, 413, "too_large", "prompt"),
    ("/tokenize", {"prompt": "x" * (7 << 20)}, 413, "too_large", None),
    ("/detokenize", {"tokens": [9] * 131_073}, 413, "too_large", "tokens"),
    ("/detokenize", {"tokens": [999]}, 400, "invalid_request", "tokens"),
    ("/v1/domains/cat:activate", {"version": "v2", "wait": "yes"}, 400, "invalid_request", "wait"),
    ("/v1/domains/cow:activate", {"version": "v2", "wait": True}, 404, "unknown_domain", "domain"),
    ("/v1/domains/cat:activate", {"version": "v7", "wait": True}, 404, "unknown_version", "version"),
]


def test_bad_input_is_refused_by_name(store: Path) -> None:
    async def check(s: System) -> None:
        for path, body, status, code, param in REFUSED:
            error = (await s.post(path, body, status=status))["error"]
            assert error["code"] == code, (body, error)
            assert error["param"] == param, (body, error)
            assert error["message"], body
        headers = {"content-type": "application/json"}
        for content in (
            b'{"text": "a\\ud800"}',
            b'{"text": "a", "knn": {"domain": "cat", "exclude_documents": ["\\ud800"]}}',
        ):
            lonely = await s.client.post("/v1/next_token", content=content, headers=headers)
            assert lonely.status_code == 400
            assert lonely.json()["error"]["param"] in ("text", "knn.exclude_documents.0")

    with_system(store, check)


@pytest.mark.parametrize(
    "body",
    [
        b'{"tokens":[' + b"1," * 140_000 + b"1]}",
        b'{"tokens":[' + b"[1]," * 140_000 + b"[1]]}",
        b'{"knn":{"domains":[' + b'"a",' * 140_000 + b'"a"]}}',
        b'{"knn":{' + b",".join(b'"%d":1' % i for i in range(140_000)) + b"}}",
        b'{"text":"' + b"x" * (7 << 20) + b'"}',
    ],
    ids=["ids", "rows of ids", "domains", "fields", "text"],
)
async def test_a_body_with_too_much_in_it_is_not_parsed(
    store: Path, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(self: Request) -> object:
        raise AssertionError("the body is parsed")

    monkeypatch.setattr(Request, "json", parse)
    async with system(store) as s:
        for path in ("/v1/next_token", "/v1/score", "/v1/explain", "/tokenize", "/detokenize", "/v1/detokenize"):
            answer = await s.client.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 413, path
            assert "--max-text-bytes, --max-score-tokens" in answer.json()["error"]["message"]


async def test_a_body_is_read_as_utf_8_alone(store: Path) -> None:
    headers = {"content-type": "application/json"}
    async with system(store) as s:
        for encoding in ("utf-16", "utf-16-le", "utf-32-be"):
            content = json.dumps({"tokens": [5]}).encode(encoding)
            answer = await s.client.post("/detokenize", content=content, headers=headers)
            assert answer.status_code == 400
            assert "UTF-8" in answer.json()["error"]["message"]
        text = {"prompt": '",' * (1 << 18)}  # commas and quotes of a text are counted as text
        assert (await s.post("/tokenize", text))["count"] > 1 << 18


def test_as_many_neighbors_as_the_documentation_says_are_shown(store: Path) -> None:
    async def check(s: System) -> None:
        body = {"text": "a", "model": "toy+cat", "neighbors": AggregatorSettings().max_neighbors}
        assert (await s.post("/v1/next_token", body))["results"][0]["neighbors"]
        most = DatastoreSettings(store=store).max_passages
        error = (await s.post("/v1/next_token", {**body, "neighbors": most + 1}, status=413))["error"]
        assert error["param"] == "neighbors"
        assert error["message"].startswith(f"neighbors must be at most {most}, got")

    with_system(store, check, max_neighbors=1000)


def test_a_text_that_is_too_long_is_refused(store: Path) -> None:
    async def check(s: System) -> None:
        assert (await s.post("/v1/score", {"text": "a" * 60}, status=413))["error"]["param"] == "text"
        await s.post("/v1/score", {"text": "a" * 40})

    with_system(store, check, max_score_tokens=50)


def test_retrieval_down_is_503_unless_asked_otherwise(store: Path) -> None:
    async def check(s: System) -> None:
        body = {"text": "the cat", "model": "toy+cat"}
        await s.post("/v1/next_token", body)
        await s.hosts["datastore"].shut()
        assert (await s.post("/v1/next_token", body, status=503))["error"]["code"] == "unavailable"
        for path in ("/v1/next_token", "/v1/score", "/v1/explain"):
            answer = await s.post(path, {**body, "on_datastore_error": "lm_only"})
            assert answer["degraded"]
            assert answer["domains"] == []
        assert (await s.post("/v1/next_token", {"text": "the cat"}))["degraded"] is None
        assert [m["id"] for m in (await s.client.get("/v1/models")).json()["data"]] == ["toy"]

    with_system(store, check, datastore_wait_s=0.1)


def test_every_route_is_denied_without_a_key(store: Path) -> None:
    async def check(s: System) -> None:
        for path, methods in (await openapi(s)).items():
            for method in methods:
                url = path.replace("{domain}", "cat").replace("{model}", "toy")
                response = await s.client.request(method, url, json={})
                public = path in ("/livez", "/readyz", "/metrics")
                assert (response.status_code != 401) == public, (method, path, response.status_code)
                if "activate" in path:
                    headers = {"authorization": "Bearer user"}
                    denied = await s.client.request(method, url, json={"version": "v2"}, headers=headers)
                    assert denied.status_code == 403
                    headers = {"authorization": "Bearer admin"}
                    allowed = await s.client.request(method, url, json={"version": "v2"}, headers=headers)
                    assert allowed.status_code == 200

    async def openapi(s: System) -> Any:  # JSON
        return (await s.client.get("/openapi.json", headers={"authorization": "Bearer user"})).json()["paths"]

    with_system(store, check, api_keys="user", admin_api_keys="admin")
