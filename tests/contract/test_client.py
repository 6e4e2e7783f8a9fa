"""knnlm.Client and knnlm.AsyncClient against the services: every route, typed as the service describes it."""

import asyncio
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import SecretStr

from knnlm import AsyncClient, Client, Document, DomainOptions, KnnOptions, SearchOptions
from knnlm.clients import answers, routes
from knnlm.clients.completions import ChatCompletion, Completion
from knnlm.clients.explained import Explained
from knnlm.clients.routes import Call
from knnlm.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    UnknownDomain,
    UnknownModel,
)
from knnlm.messages import DomainChange, DomainInfo
from knnlm.wire.records import Kind, List, Map, Nullable, Record, fields_of
from tests.contract.system import TEXT, System, store, system, with_system
from tests.services.certificates import Authority

__all__ = ["store"]

CALLS: Sequence[tuple[Call[Any], type | None]] = [  # Any: of any answer. With the record that the JSON becomes
    (routes.next_token("x"), answers.NextTokens),
    (routes.score("x"), answers.Scored),
    (routes.explain("x"), Explained),
    (routes.complete("x"), Completion),
    (routes.chat([]), ChatCompletion),
    (routes.models(), answers.ModelList),
    (routes.model("{model}"), answers.Model),
    (routes.domains(), answers.DomainList),
    (routes.domain("{domain}"), answers.DomainStatus),
    (routes.activate("{domain}", "v1"), DomainInfo),
    (routes.add_documents("{domain}", []), DomainChange),
    (routes.remove_documents("{domain}", []), DomainChange),
    (routes.tokenize("x"), answers.Tokenized),
    (routes.detokenize([1]), answers.Detokenized),
    (routes.tokenizer_info(), None),
]
OF_EVERY_SERVICE = r"/(livez|readyz|metrics|version)|/(de)?tokenize|/tokenizer_info"  # the last: also under /v1
SAID_TWICE = {"object"}  # fields with one value, which OpenAI's shapes have


def path_of(call: Call[Any]) -> str:
    return call.path.replace("%7B", "{").replace("%7D", "}")


async def described(s: System) -> dict[str, Any]:
    openapi: dict[str, Any] = (await s.client.get("/openapi.json")).json()
    return openapi


def test_every_route_of_the_aggregator_is_a_method(store: Path) -> None:
    async def check(s: System) -> None:
        offered = {
            (method.upper(), path)
            for path, methods in (await described(s))["paths"].items()
            for method in methods
            if not re.fullmatch(OF_EVERY_SERVICE, path)
        }
        assert offered == {(call.method, path_of(call)) for call, _ in CALLS}

    with_system(store, check)


def test_every_field_that_the_service_describes_is_a_field_of_the_record(store: Path) -> None:
    async def check(s: System) -> None:
        schemas = await described(s)
        for call, record in CALLS:
            if record is not None:
                operation = schemas["paths"][path_of(call)][call.method.lower()]
                shape = operation["responses"]["200"]["content"]["application/json"]["schema"]
                compare(shape, record, schemas["components"]["schemas"], path_of(call))

    def compare(shape: dict[str, Any], record: type, schemas: dict[str, Any], where: str) -> None:
        properties = resolved(shape, schemas)["properties"]
        fields = {field.wire: field for field in fields_of(record)}
        assert set(properties) - SAID_TWICE == set(fields), where
        for name, field in fields.items():
            inner = record_in(field.kind)
            if inner is not None and inner is not SearchOptions:
                for shape in object_shapes(properties[name], schemas):
                    compare(shape, inner, schemas, f"{where} {name}")

    with_system(store, check)


def resolved(shape: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schemas[shape["$ref"].rsplit("/", 1)[1]] if "$ref" in shape else shape
    return found


def object_shapes(shape: dict[str, Any], schemas: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects with named fields in a shape, whatever lists and alternatives they stand in."""
    found = resolved(shape, schemas)
    if "properties" in found:
        return [found]
    inner = [*found.get("anyOf", []), *([found["items"]] if "items" in found else [])]
    return [each for one in inner for each in object_shapes(one, schemas)]


def record_in(kind: Kind) -> type | None:
    match kind:
        case Record(type=record):
            return record
        case List(item=item) | Nullable(item=item) | Map(item=item):
            return record_in(item)
        case _:
            return None


def in_a_thread(store: Path, check: Callable[[Client], None], **options: Any) -> None:
    """Run the check with a Client over a socket."""

    async def run() -> None:
        async with system(store) as s:
            with Client(f"http://127.0.0.1:{s.hosts['aggregator'].port}", **options) as client:
                await asyncio.to_thread(check, client)

    asyncio.run(run())


def test_what_is_asked_is_answered_in_records(store: Path) -> None:
    def check(client: Client) -> None:
        knn = KnnOptions((DomainOptions("cat"), DomainOptions("dog", lmbda=0.1)))
        answer = client.next_token(["the cat", "a dog"], knn=knn, top_n=3, full=True, neighbors=2, neighbor_tokens=4)
        assert (answer.model, [used.domain for used in answer.domains]) == ("toy+cat+dog", ["cat", "dog"])
        assert answer.degraded is None
        first = answer.results[0]
        assert first.distribution is not None
        assert first.distribution.p_knn is not None
        np.testing.assert_allclose(first.distribution.p.sum(), 1, rtol=1e-5)
        np.testing.assert_allclose([t.p for t in first.top], np.sort(first.distribution.p)[:-4:-1], rtol=1e-6)
        assert sum(c.weight for c in first.components) == pytest.approx(1)
        assert first.neighbors is not None
        assert first.neighbors[0].distance <= first.neighbors[1].distance

        scored = client.score(TEXT, model="toy+cat")
        ids = [scored.first_token_id, *(t.token_id for t in scored.tokens)]
        assert sum(t.log_p for t in scored.tokens if t.log_p is not None) == pytest.approx(scored.total_log_p)
        assert client.score(tokens=ids, model="toy+cat").perplexity == pytest.approx(scored.perplexity)
        explained = client.explain(prompt=TEXT[:20], completion=TEXT[20:], model="toy+cat", passages=2)
        assert [t.log_p for t in explained.tokens] == pytest.approx([t.log_p for t in scored.tokens[20:]])
        for token in explained.tokens:
            (lm, cat) = token.components
            assert cat.log_p is None or token.log_p is not None
            given = 0 if cat.log_p is None else cat.weight * np.exp(cat.log_p - (token.log_p or 0))
            assert token.retrieved == pytest.approx(given)
            assert lm.weight + cat.weight == pytest.approx(1)
            assert len(cat.passages) <= 2
        assert explained.documents[0].share > 0

        certain = client.score(TEXT, knn={"domain": "raw", "lambda": 1.0, "temperature": 0.001})
        assert certain.total_log_p is None  # minus infinity

        tokens = client.tokenize(TEXT, add_special_tokens=False, return_token_strs=True)
        assert tokens.token_strs is not None
        assert tokens.count == len(tokens.tokens) == len(tokens.token_strs)
        assert client.detokenize(tokens.tokens) == TEXT
        assert "eos_token" in client.tokenizer_info()

    in_a_thread(store, check)


ASKED: dict[str, Any] = {
    "max_tokens": 12, "temperature": 0.8, "seed": 3, "logprobs": 2, "return_tokens_as_token_ids": True,
}  # fmt: skip


def together(parts: Sequence[Completion], index: int) -> str:
    return "".join(choice.text for part in parts for choice in part.choices if choice.index == index)


def test_completions_come_whole_and_in_parts(store: Path) -> None:
    def check(client: Client) -> None:
        whole = client.complete(["the cat", "a dog"], model="toy+cat", n=2, **ASKED)
        assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
        assert [used.domain for used in whole.domains] == ["cat"]
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 4 * 12
        logprobs = whole.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.top_logprobs is not None
        assert [row[t] for row, t in zip(logprobs.top_logprobs, logprobs.tokens, strict=True) if row] == list(
            logprobs.token_logprobs
        )
        usage = {"include_usage": True}
        parts = list(client.stream(["the cat", "a dog"], model="toy+cat", n=2, stream_options=usage, **ASKED))
        assert [together(parts, i) for i in range(4)] == [choice.text for choice in whole.choices]
        assert parts[-1].usage == whole.usage
        assert parts[0].domains == whole.domains

        echoed = client.complete("the cat", max_tokens=0, echo=True, logprobs=0).choices[0]
        assert (echoed.text, echoed.finish_reason) == ("the cat", "length")
        assert echoed.logprobs is not None
        assert echoed.logprobs.token_logprobs[0] is None
        explained = client.complete("the cat", knn={"domain": "cat", "explain": 2}, **ASKED).choices[0].explained
        assert explained is not None
        assert [len(token.components) for token in explained] == [2] * 12
        first = whole.choices[0].text
        stopped = client.complete("the cat", model="toy+cat", stop=first[3:6], **ASKED).choices[0]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", first[3:6])
        ids = client.tokenize("the cat", add_special_tokens=False).tokens
        assert client.complete(ids, model="toy+cat", **ASKED).choices[0].text == first

    in_a_thread(store, check)


def test_streams_that_are_refused_or_left(store: Path) -> None:
    def check(client: Client) -> None:
        with pytest.raises(UnknownModel):
            next(client.stream("the cat", model="bird/of prey?"))
        with pytest.raises(InvalidRequest) as raised:
            next(client.stream("the cat", temperature=-1.0))
        assert raised.value.param == "temperature"
        for _ in range(3):
            assert next(client.stream("the cat", max_tokens=200)).choices[0].index == 0
        assert client.complete("the cat", max_tokens=1).choices[0].finish_reason == "length"

    in_a_thread(store, check)


async def test_parts_come_to_an_event_loop(store: Path) -> None:
    async with system(store) as s, AsyncClient(f"http://127.0.0.1:{s.hosts['aggregator'].port}") as client:
        whole = await client.complete("the cat", model="toy+cat", **ASKED)
        several = [[part async for part in client.stream("the cat", model="toy+cat", **ASKED)] for _ in range(2)]
        assert [together(parts, 0) for parts in several] == [whole.choices[0].text] * 2


def test_domains_are_seen_switched_and_changed(store: Path) -> None:
    def check(client: Client) -> None:
        assert [model.id for model in client.models()] == ["toy", "toy+cat", "toy+dog", "toy+raw"]
        assert client.model("toy+cat").max_model_len > 0
        assert [domain.domain for domain in client.domains()] == ["cat", "dog", "raw"]
        assert client.activate("cat", "v2", wait=True).version == "v2"
        (replica,) = client.domain("cat").replicas
        assert (replica.version, replica.state, replica.problem) == ("v2", "ready", None)
        change = client.add_documents("cat", [Document("heron", "a heron stands in the water")])
        assert (change.parent, change.added_documents) == ("v2", 1)
        with pytest.raises(Conflict):
            client.add_documents("cat", [Document("heron", "a heron stands in the water")])
        assert client.remove_documents("cat", ["heron"]).removed_documents == 1
        with pytest.raises(NotFound):
            client.remove_documents("cat", ["heron"])
        with pytest.raises(UnknownDomain) as raised:
            client.next_token("x", knn={"domain": "bird"})
        assert raised.value.param == "knn.domain"
        with pytest.raises(UnknownModel, match="of prey"):
            client.model("bird/of prey")

    in_a_thread(store, check)


async def test_keys_and_tls(store: Path, tmp_path: Path) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    certificate, key = ours.issue("aggregator")
    settings: dict[str, Any] = {"api_keys": [SecretStr("callers")], "admin_api_keys": [SecretStr("admins")]}
    async with system(store, tls_cert_file=certificate, tls_key_file=key, **settings) as s:
        url = f"https://127.0.0.1:{s.hosts['aggregator'].port}"
        async with AsyncClient(url, api_key="callers", admin_key="admins", ca_file=ours.file) as client:
            assert (await client.model("toy+cat")).id == "toy+cat"
            assert (await client.activate("cat", "v2")).version == "v2"
        async with AsyncClient(url, api_key="callers", ca_file=ours.file) as client:
            with pytest.raises(PermissionDenied):
                await client.activate("cat", "v1")
        async with AsyncClient(url, ca_file=ours.file) as client:
            with pytest.raises(Unauthenticated):
                await client.models()
        async with AsyncClient(url, api_key="callers", ca_file=other.file, wait=0.0) as client:
            with pytest.raises(Unavailable, match="certificate"):
                await client.models()


async def test_both_clients_answer_the_same(store: Path) -> None:
    async with system(store) as s:
        url = f"http://127.0.0.1:{s.hosts['aggregator'].port}"
        transport = httpx.ASGITransport(s.hosts["aggregator"].app)
        async with AsyncClient("http://test", transport=transport) as over_asgi, AsyncClient(url) as over_tcp:
            with Client(url) as client:
                expected = await asyncio.to_thread(client.score, TEXT, model="toy+dog")
            for one in (over_asgi, over_tcp):
                assert await one.score(TEXT, model="toy+dog") == expected
            several = await asyncio.gather(*(over_tcp.next_token("the cat", model="toy+cat") for _ in range(8)))
            assert all(answer.results[0].top == several[0].results[0].top for answer in several)
