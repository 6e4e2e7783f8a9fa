import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from benchmarks.concurrent import OTHER, Load, two_domains
from benchmarks.data import Prepared
from benchmarks.load import GrpcCallers, HttpCallers, keep, search_post
from knnlm.datastore.catalog import Catalog
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from knnlm.testing import toy_datastore
from services.datastore.app import service
from services.datastore.settings import DatastoreSettings
from services.runtime.lifecycle import Host, running

QUERIES = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
REQUESTS = [SearchRequest("toy", QUERIES, SearchOptions(k=3)), SearchRequest("toy", QUERIES[:1], SearchOptions(k=3))]


@asynccontextmanager
async def datastore(store: Path) -> AsyncIterator[Host]:
    toy_datastore(store)
    async with running(service(DatastoreSettings(store=store, port=0, grpc_port=0))) as host:
        yield host


def answered(host: Host, face: str) -> float | None:
    route = {"http": "/v1/domains/{domain}/search", "grpc": "/knnlm.v1.Datastore/Search"}[face]
    labels = {"face": face, "route": route, "code": "200" if face == "http" else "OK"}
    return host.service.metrics.registry.get_sample_value("knnlm_requests_total", labels)


async def test_every_call_that_is_counted_was_answered(tmp_path: Path) -> None:
    async with (
        datastore(tmp_path) as host,
        HttpCallers(f"http://127.0.0.1:{host.port}", [search_post(r) for r in REQUESTS], 3) as http,
        GrpcCallers(f"127.0.0.1:{host.grpc_port}", REQUESTS, 3) as over_grpc,
    ):
        for face, callers in (("http", http), ("grpc", over_grpc)):
            found = await keep(callers, 0.05)
            assert len(found) >= 3
            assert min(found) > 0
            assert answered(host, face) == len(found)


async def test_a_call_that_is_refused_ends_the_measurement(tmp_path: Path) -> None:
    wrong = [SearchRequest("nowhere", QUERIES, SearchOptions(k=3))]
    async with (
        datastore(tmp_path) as host,
        HttpCallers(f"http://127.0.0.1:{host.port}", [search_post(r) for r in wrong], 1) as http,
        GrpcCallers(f"127.0.0.1:{host.grpc_port}", wrong, 1) as over_grpc,
    ):
        with pytest.raises(RuntimeError, match=r"404 .*unknown_domain"):
            await keep(http, 0.05)
        with pytest.raises(grpc.aio.AioRpcError, match="unknown domain"):
            await keep(over_grpc, 0.05)


class Counted:
    """Two callers that note when they are called; a call takes one turn of the loop."""

    callers = 2

    def __init__(self) -> None:
        self.calls: list[int] = []

    async def call(self, number: int) -> None:
        self.calls.append(number)
        await asyncio.sleep(0)


def test_a_load_counts_its_own_queries_and_not_those_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.concurrent.SECONDS", 0.01)
    mine, others = Counted(), Counted()
    load = Load(mine, 64, beside=others)
    first = asyncio.run(load.run())
    second = asyncio.run(load.run())
    assert first + second == 64 * len(mine.calls)
    assert others.calls
    assert len(load.latency.seconds) == second // 64  # the first round is a warm-up


def test_two_domains_are_the_same_entries_under_two_names(tmp_path: Path) -> None:
    path = toy_datastore(tmp_path / "from")
    prepared = Prepared(
        tmp_path / "from", "toy", path, path, QUERIES, QUERIES[:, 0], QUERIES[:, 0].astype(np.int32), ()
    )
    two_domains(prepared, tmp_path / "to")
    catalog = Catalog(tmp_path / "to")
    assert sorted(catalog.domains()) == [OTHER, "toy"]
    for domain in catalog.domains():
        version = catalog.current(domain)
        assert version is not None
        found = Searcher.open(catalog.path(domain, version)).search(
            SearchRequest(domain, QUERIES, SearchOptions(k=3), ids=True)
        )
        assert found.domain == domain
        expected = Searcher.open(path).search(SearchRequest("toy", QUERIES, SearchOptions(k=3), ids=True))
        assert np.array_equal(found.neighbors.values, expected.neighbors.values)
