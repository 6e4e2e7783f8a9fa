"""Protobuf over HTTP, where it differs from the other faces; that all answer alike is in tests/contract."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from knnlm.clients.http import HttpDatastore
from knnlm.messages import PassagesRequest, SearchRequest, SearchResult
from knnlm.options import SearchOptions
from knnlm.testing import toy_datastore
from knnlm.v1 import datastore_pb2
from knnlm.wire.protos import from_proto, to_proto
from services.datastore.app import service
from services.datastore.settings import DatastoreSettings
from services.runtime.lifecycle import Host, running
from tests.services.waiting import Slow, held, until

REQUEST = SearchRequest("toy", np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32), SearchOptions(k=4))
PATH = "/v1/domains/toy/search"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    toy_datastore(tmp_path)
    return tmp_path


@asynccontextmanager
async def datastore(store: Path) -> AsyncIterator[tuple[Host, httpx.AsyncClient]]:
    settings = DatastoreSettings(store=store, port=0, grpc_port=0)
    async with (
        running(service(settings)) as host,
        httpx.AsyncClient(base_url="http://test", transport=httpx.ASGITransport(host.app)) as client,
    ):
        yield host, client


@pytest.mark.parametrize("name", ["application/protobuf", "application/x-protobuf", "Application/Protobuf; charset=x"])
@pytest.mark.parametrize("domain", ["toy", ""])
async def test_a_message_is_answered_by_a_message(store: Path, name: str, domain: str) -> None:
    message = to_proto(REQUEST, datastore_pb2.SearchRequest)
    message.domain = domain
    async with datastore(store) as (host, client):
        answer = await client.post(PATH, content=message.SerializeToString(), headers={"content-type": name})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/protobuf")
        assert answer.headers["content-length"] == str(len(answer.content))
        assert {"x-request-id", "server-timing"} <= answer.headers.keys()
        found = from_proto(SearchResult, datastore_pb2.SearchResponse.FromString(answer.content))
        assert (found.domain, found.neighbors.values.shape) == ("toy", (3, 4))
        labels = {"face": "http", "route": "/v1/domains/{domain}/search", "code": "200"}
        assert host.service.metrics.registry.get_sample_value("knnlm_requests_total", labels) == 1


def message(**changes: object) -> bytes:
    fields = {
        "domain": "toy",
        "k": 4,
        "queries": to_proto(REQUEST, datastore_pb2.SearchRequest).queries,
        **changes,
    }
    return datastore_pb2.SearchRequest(**fields).SerializeToString()  # type: ignore[arg-type]  # of any field


def lookup(**changes: object) -> bytes:
    request = to_proto(PassagesRequest("toy", "v1", np.arange(3)), datastore_pb2.GetPassagesRequest)
    fields = {"domain": "toy", "version": "v1", "entries": request.entries, **changes}
    return datastore_pb2.GetPassagesRequest(**fields).SerializeToString()  # type: ignore[arg-type]  # of any field


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (PATH, b"\xff\xff", 400, None),
        (PATH, message(domain="other"), 400, "domain"),
        (PATH, message(k=0), 400, "k"),
        (PATH, message(queries=None), 400, "queries"),
        ("/v1/domains/other/search", message(domain=""), 404, "domain"),
        ("/v1/domains/a/b/search", message(), 404, None),
        ("/v1/domains/toy/passages", b"\xff\xff", 400, None),
        ("/v1/domains/toy/passages", lookup(domain="other"), 400, "domain"),
        ("/v1/domains/toy/passages", lookup(version=""), 400, "version"),
        ("/v1/domains/toy/passages", lookup(entries=None), 400, "entries"),
        ("/v1/domains/toy:activate", message(), 400, "body"),
    ],
)
async def test_what_is_wrong_with_a_message_is_told_in_json(
    store: Path, path: str, body: bytes, status: int, param: str | None
) -> None:
    async with datastore(store) as (_, client):
        answer = await client.post(path, content=body, headers={"content-type": "application/protobuf"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


async def test_a_route_for_messages_takes_post_alone(store: Path) -> None:
    async with datastore(store) as (_, client):
        answer = await client.put(PATH, content=message(), headers={"content-type": "application/protobuf"})
        assert answer.status_code == 405


async def test_a_search_whose_caller_hangs_up_leaves_the_queue(store: Path) -> None:
    slow = Slow()
    settings = DatastoreSettings(store=store, port=0, grpc_port=0)
    async with (
        running(service(settings, slow)) as host,
        HttpDatastore(f"http://127.0.0.1:{host.port}") as client,
    ):
        search = asyncio.create_task(client.search(REQUEST))
        await until(lambda: held(host) == 3)
        search.cancel()
        await until(lambda: held(host) == 0)  # while the worker is still at it
        slow.gate.set()
