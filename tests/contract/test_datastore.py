"""In process, over gRPC and over HTTP a datastore gives the same answers and the same errors."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm.datastore.catalog import Catalog
from knnlm.errors import InvalidRequest, KnnlmError, TooLarge, UnknownDomain, UnknownVersion
from knnlm.index.searcher import Searcher
from knnlm.local import LocalDatastore
from knnlm.messages import PassagesRequest, SearchRequest, SearchResult
from knnlm.options import SearchOptions
from knnlm.protocols import DatastoreClient
from knnlm.testing import TEXTS, toy_datastore
from services.datastore.app import service
from services.datastore.loaded import Opener
from services.datastore.settings import DatastoreSettings
from services.runtime.service import Service
from tests.grown import emptied
from tests.searching import asking
from tests.services.faces import datastore_faces
from tests.services.waiting import Slow, held, until

DIM = 16
QUERIES = np.random.default_rng(0).standard_normal((5, DIM)).astype(np.float32)
REQUEST = SearchRequest("toy", QUERIES, SearchOptions(k=4))
LOOKUP = PassagesRequest("toy", "v1", np.array([7, 0, 289, 7, 100]), passage_tokens=3)
FOLLOW = np.array([[0, 5, 9], [7, -1, 3], [-1, -1, -1], [250, 249, 20], [288, 289, 1]])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    toy_datastore(tmp_path)
    emptied(toy_datastore(tmp_path, domain="empty"))
    return tmp_path


def datastore_service(store: Path, opener: Opener | None = None, **settings: Any) -> Service:
    return service(DatastoreSettings(store=store, port=0, grpc_port=0, **settings), opener)


def same(left: SearchResult, right: SearchResult) -> bool:
    assert (left.domain, left.version) == (right.domain, right.version)
    passages = [
        [[(p.document, p.entry, p.position, p.before.tolist(), p.after.tolist()) for p in row] for row in side.passages]
        for side in (left, right)
    ]
    return (
        # searched alone or with others, distances differ in the last bits
        np.allclose(left.neighbors.distances, right.neighbors.distances, rtol=1e-5)
        and np.array_equal(left.neighbors.values, right.neighbors.values)
        and repr(left.neighbors.ids) == repr(right.neighbors.ids)
        and passages[0] == passages[1]
    )


async def outcome(client: DatastoreClient, request: SearchRequest | PassagesRequest) -> tuple[str, str | None]:
    try:
        await (client.search(request) if isinstance(request, SearchRequest) else client.passages(request))
    except KnnlmError as err:
        return err.code, err.param
    return "ok", None


async def test_large_answers_come_in_parts_over_grpc(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knnlm.clients.rpc.MAX_PART_BYTES", 2 * 4 * 16)  # two queries with k = 4 and entries
    exclude = np.array([0, 7, -1, 250, 289])
    requests = [
        replace(REQUEST, version="v1"),
        replace(REQUEST, version="v1", ids=True, exclude_entries=exclude),
        replace(REQUEST, version="v1", ids=True, passages=2, passage_tokens=3),
        replace(REQUEST, version="v1", options=SearchOptions(k=400)),
        replace(REQUEST, domain="empty", version="v1"),
    ]
    async with datastore_faces(datastore_service(store)) as (host, clients):
        whole, parted = clients["http protobuf"], clients["grpc"]

        def asked() -> float:
            labels = {"face": "grpc", "route": "/knnlm.v1.Datastore/Search", "code": "OK"}
            return host.service.metrics.registry.get_sample_value("knnlm_requests_total", labels) or 0.0

        for request, calls in zip(requests, (2, 3, 3, 5, 2), strict=True):
            before = asked()
            assert same(await parted.search(request), await whole.search(request))
            assert asked() - before == calls
        before = asked()
        await parted.search(REQUEST)  # of any version: parts might come from two
        assert asked() - before == 1
        for wrong in (exclude[:4], np.append(exclude, 1)):
            request = replace(requests[0], exclude_entries=wrong)
            assert (
                await outcome(parted, request)
                == await outcome(whole, request)
                == ("invalid_request", "exclude_entries")
            )


async def test_a_body_of_too_many_listed_numbers_is_not_parsed(store: Path) -> None:
    queries = np.zeros((1 << 14, DIM), np.float32)
    async with datastore_faces(datastore_service(store, max_queries=1 << 14)) as (_, clients):
        request = replace(REQUEST, queries=queries)
        with pytest.raises(TooLarge, match=r"262144 values .* \(pack large arrays"):
            await clients["http list"].search(request)
        assert await outcome(clients["http base64"], request) == ("ok", None)


async def test_every_face_answers_as_the_searcher_does(store: Path) -> None:
    requests = [
        REQUEST,
        replace(REQUEST, queries=QUERIES.astype(np.float16)),
        asking(REQUEST, k=4000),
        replace(REQUEST, ids=True, version="v1"),
        replace(REQUEST, passages=2, passage_tokens=3),
        asking(REQUEST, rescore=True, overfetch=2.0),
        replace(REQUEST, domain="empty"),
        replace(REQUEST, ids=True, exclude_entries=np.array([0, 7, -1, 250, 289])),
        asking(REQUEST, ids=True, exclude_entries=np.array([0, 7, -1, 250, 289]), exclude_own_documents=True),
        asking(REQUEST, ids=True, exclude_documents=("0", "3")),
        replace(REQUEST, ids=True, follow=FOLLOW),
        asking(REQUEST, k=2, follow=FOLLOW, exclude_documents=("0",)),
        asking(REQUEST, ids=True, exclude_documents=("0", "1", "2", "3")),
    ]

    catalog = Catalog(store)
    async with datastore_faces(datastore_service(store)) as (_, clients):
        for request in requests:
            expected = Searcher.open(catalog.path(request.domain, "v1")).search(request)
            for name, client in clients.items():
                if expected.neighbors.values.size or name != "http list":  # lists of nothing have no width
                    assert same(await client.search(request), expected), (name, request)


async def test_every_face_shows_the_same_passages(store: Path) -> None:
    lookups = [
        LOOKUP,
        replace(LOOKUP, passage_tokens=0),
        replace(LOOKUP, entries=np.arange(290), passage_tokens=100),
        replace(LOOKUP, entries=np.empty(0, np.int64)),
        replace(LOOKUP, domain="empty", entries=np.empty(0, np.int64)),
    ]
    local = LocalDatastore({d: Searcher.open(Catalog(store).path(d, "v1")) for d in ("toy", "empty")})
    async with datastore_faces(datastore_service(store)) as (_, clients):
        for lookup in lookups:
            expected = await local.passages(lookup)
            assert [p.entry for p in expected] == lookup.entries.tolist()
            for name, client in clients.items():
                assert repr(await client.passages(lookup)) == repr(expected), (name, lookup)


async def test_every_face_refuses_bad_lookups_alike(store: Path) -> None:
    bad = {
        "no such entry": (replace(LOOKUP, entries=np.array([0, 290])), InvalidRequest, "entries"),
        "padding": (replace(LOOKUP, entries=np.array([-1])), InvalidRequest, "entries"),
        "too many entries": (replace(LOOKUP, entries=np.zeros(1001, np.int64)), TooLarge, "entries"),
        "answer too large": (
            replace(LOOKUP, entries=np.zeros(1000, np.int64), passage_tokens=500),
            TooLarge,
            "entries",
        ),
        "passages too long": (replace(LOOKUP, passage_tokens=513), TooLarge, "passage_tokens"),
        "passages negative": (replace(LOOKUP, passage_tokens=-1), InvalidRequest, "passage_tokens"),
        "unknown version": (replace(LOOKUP, version="v9"), UnknownVersion, "version"),
        "no version": (replace(LOOKUP, version=""), InvalidRequest, "version"),
        "unknown domain": (replace(LOOKUP, domain="nowhere"), UnknownDomain, "domain"),
    }
    bounded = datastore_service(store, max_entries=1000, grpc_max_message_bytes=1 << 20)
    async with datastore_faces(bounded) as (_, clients):
        for name, (lookup, expected, param) in bad.items():
            outcomes = {face: await outcome(client, lookup) for face, client in clients.items()}
            assert set(outcomes.values()) == {(expected.code, param)}, (name, outcomes)


async def test_lookups_that_run_together_are_answered_as_alone(store: Path) -> None:
    """Among searches, and beside one that is refused."""
    searcher = Searcher.open(Catalog(store).path("toy", "v1"))
    lookups = [replace(LOOKUP, entries=np.arange(i, 40 + 2 * i)) for i in range(8)]
    slow = Slow()
    async with datastore_faces(datastore_service(store, slow)) as (host, clients):
        search = asyncio.create_task(clients["grpc"].search(REQUEST))
        await until(lambda: held(host) == len(QUERIES))
        tasks = [asyncio.create_task(clients["grpc"].passages(lookup)) for lookup in lookups]
        refused = asyncio.create_task(outcome(clients["grpc"], replace(LOOKUP, entries=np.array([290]))))
        await until(lambda: held(host) == len(QUERIES) + sum(-(-len(x.entries) // 16) for x in lookups) + 1)
        slow.gate.set()
        results = await asyncio.gather(*tasks)
        assert await refused == ("invalid_request", "entries")
        assert same(await search, searcher.search(REQUEST))
        batches = host.service.metrics.registry.get_sample_value("knnlm_batch_rows_count")
    assert [repr(r) for r in results] == [repr(searcher.passages(lookup)) for lookup in lookups]
    assert batches == 2


async def test_passages_of_a_version_that_was_replaced_are_shown_while_it_is_loaded(store: Path) -> None:
    toy_datastore(store, version="v2", texts=TEXTS[:1], activate=False)
    async with datastore_faces(datastore_service(store)) as (_, clients):
        before = await clients["grpc"].passages(LOOKUP)
        await clients["grpc"].activate("toy", "v2")
        assert repr(await clients["http protobuf"].passages(LOOKUP)) == repr(before)
    async with datastore_faces(datastore_service(store)) as (_, clients):
        assert await outcome(clients["grpc"], LOOKUP) == ("unknown_version", "version")


async def test_every_face_tells_the_same_of_the_domains(store: Path) -> None:
    expected = [Searcher.open(Catalog(store).path(domain, "v1")).info(["v1"]) for domain in ("empty", "toy")]
    async with datastore_faces(datastore_service(store)) as (_, clients):
        for client in clients.values():
            listed = [
                replace(info, versions=tuple(info.versions), indexes=tuple(info.indexes))
                for info in await client.list_domains()
            ]
            assert listed == expected
            assert all(info.indexes == ("flat",) and info.memory is not None for info in listed)
            assert all((info.context_length, info.min_context) == (32, 16) for info in listed)
            assert (await client.get_domain("toy")).entries == expected[1].entries
            assert (await client.get_domain("toy", "v1")).version == "v1"
            with pytest.raises(UnknownVersion):
                await client.get_domain("toy", "v9")


def with_nan() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    queries = QUERIES.copy()
    queries[2, 3] = np.nan
    return queries


FOLLOW_TWICE = np.tile(np.int64(4), (5, 2))
BAD = {
    "follow of other queries": (replace(REQUEST, follow=FOLLOW[1:]), InvalidRequest, "follow"),
    "follow of no such entry": (replace(REQUEST, follow=FOLLOW + 10**6), InvalidRequest, "follow"),
    "follow twice": (replace(REQUEST, follow=FOLLOW_TWICE), InvalidRequest, "follow"),
    "follow of too many": (replace(REQUEST, follow=np.zeros((5, 5000), np.int64)), TooLarge, "follow"),
    "wrong dimension": (replace(REQUEST, queries=QUERIES[:, :7]), InvalidRequest, "queries"),
    "not a number": (replace(REQUEST, queries=with_nan()), InvalidRequest, "queries"),
    "infinite": (replace(REQUEST, queries=QUERIES * np.float32(np.inf)), InvalidRequest, "queries"),
    "k too large": (asking(REQUEST, k=5000), TooLarge, "k"),
    "too many queries": (replace(REQUEST, queries=np.zeros((200, DIM), np.float32)), TooLarge, "queries"),
    "answer too large": (asking(REQUEST, queries=np.zeros((90, DIM), np.float32), k=4000), TooLarge, "queries"),
    "unknown domain": (replace(REQUEST, domain="nowhere"), UnknownDomain, "domain"),
    "a domain that is a path": (replace(REQUEST, domain="../toy"), UnknownDomain, "domain"),
    "unknown version": (replace(REQUEST, version="v9"), UnknownVersion, "version"),
    "ef_search without a graph": (asking(REQUEST, ef_search=64), InvalidRequest, "ef_search"),
    "an entry too few": (replace(REQUEST, exclude_entries=np.zeros(4, np.int64)), InvalidRequest, "exclude_entries"),
    "no such entry": (replace(REQUEST, exclude_entries=np.full(5, 290)), InvalidRequest, "exclude_entries"),
    "own documents of nothing": (asking(REQUEST, exclude_own_documents=True), InvalidRequest, "exclude_own_documents"),
    "no such document": (asking(REQUEST, exclude_documents=("0", "x")), InvalidRequest, "exclude_documents"),
    "nprobe without lists": (asking(REQUEST, nprobe=3), InvalidRequest, "nprobe"),
    "overfetch too large": (asking(REQUEST, overfetch=1e9), TooLarge, "overfetch"),
    "nprobe too large": (asking(REQUEST, nprobe=2**31 - 1), TooLarge, "nprobe"),
    "ef_search too large": (asking(REQUEST, ef_search=2**31 - 1), TooLarge, "ef_search"),
    "too many passages": (replace(REQUEST, passages=10**6), TooLarge, "passages"),
    "passages negative": (replace(REQUEST, passages=-1), InvalidRequest, "passages"),
}


async def test_every_face_refuses_bad_requests_alike(store: Path) -> None:
    bounded = datastore_service(store, max_queries=100, grpc_max_message_bytes=1 << 20)
    async with datastore_faces(bounded) as (_, clients):
        for name, (request, expected, param) in BAD.items():
            outcomes = {face: await outcome(client, request) for face, client in clients.items()}
            if name == "a domain that is a path":  # HTTP servers decode %2F before they route
                outcomes = {"grpc": outcomes["grpc"]}
            assert set(outcomes.values()) == {(expected.code, param)}, (name, outcomes)


async def test_searches_that_run_together_are_answered_as_alone(store: Path) -> None:
    searcher = Searcher.open(Catalog(store).path("toy", "v1"))
    requests = [replace(REQUEST, queries=QUERIES[i % 5 :], ids=True, passages=i % 2) for i in range(24)]
    slow = Slow()
    async with datastore_faces(datastore_service(store, slow)) as (host, clients):
        searches = [asyncio.create_task(clients["grpc"].search(request)) for request in requests]
        await until(lambda: held(host) == sum(len(r.queries) for r in requests))
        slow.gate.set()
        results = await asyncio.gather(*searches)
        batches = host.service.metrics.registry.get_sample_value("knnlm_batch_rows_count")
    assert all(same(result, searcher.search(request)) for result, request in zip(results, requests, strict=True))
    assert batches in (2, 3)  # what came first and held up the others, and the rest of each of the two kinds


async def test_exclusions_that_run_together_are_answered_as_alone(store: Path) -> None:
    searcher = Searcher.open(Catalog(store).path("toy", "v1"))
    plain = [replace(REQUEST, queries=QUERIES[i:], ids=True) for i in range(4)]
    nearest = [searcher.search(r).neighbors.ids for r in plain]
    entries = [replace(r, exclude_entries=ids[:, 0]) for r, ids in zip(plain, nearest, strict=True) if ids is not None]
    own = [asking(r, exclude_own_documents=True) for r in entries]
    named = [asking(r, exclude_documents=("1",)) for r in [*plain, *entries]]
    requests = [*plain, *entries, *own, *named]
    slow = Slow()
    async with datastore_faces(datastore_service(store, slow)) as (host, clients):
        searches = [asyncio.create_task(clients["grpc"].search(request)) for request in requests]
        await until(lambda: held(host) == sum(len(r.queries) for r in requests))
        slow.gate.set()
        results = await asyncio.gather(*searches)
        batches = host.service.metrics.registry.get_sample_value("knnlm_batch_rows_count")
    for request, result in zip(requests, results, strict=True):
        assert same(result, searcher.search(request)), request
    assert batches in (5, 6, 7)  # what came first and held up the others, and the rest of each of the five kinds


async def test_what_cannot_be_answered_is_refused_among_others_too(store: Path) -> None:
    """Each beside one that can, of the same k, so that they would be joined if they could be."""
    given = np.arange(5)
    entries, own = asking(REQUEST, k=5, exclude_entries=given), asking(REQUEST, k=6, exclude_entries=given)
    asked: list[tuple[SearchRequest, tuple[str, str | None]]] = [
        (entries, ("ok", None)),  # two wrong sizes that together are the right one
        (replace(entries, exclude_entries=given[:4]), ("invalid_request", "exclude_entries")),
        (replace(entries, exclude_entries=np.arange(6)), ("invalid_request", "exclude_entries")),
        (asking(own, exclude_own_documents=True), ("ok", None)),
        (
            asking(own, exclude_entries=None, exclude_own_documents=True),
            ("invalid_request", "exclude_own_documents"),
        ),
        (asking(entries, k=7), ("ok", None)),
        (asking(entries, k=7, exclude_entries=given + 290), ("invalid_request", "exclude_entries")),
        (asking(REQUEST, k=8), ("ok", None)),
        (asking(REQUEST, k=8, ef_search=7), ("invalid_request", "ef_search")),
        (asking(REQUEST, k=9, exclude_documents=("0",)), ("ok", None)),
        (asking(REQUEST, k=9, exclude_documents=("x",)), ("invalid_request", "exclude_documents")),
    ]

    slow = Slow()
    async with datastore_faces(datastore_service(store, slow)) as (host, clients):
        before = [asyncio.create_task(outcome(clients["grpc"], asking(REQUEST, k=k))) for k in (1, 2, 3, 4)]
        await until(lambda: held(host) == 20)  # and nothing else is begun
        tasks: list[asyncio.Task[tuple[str, str | None]]] = []

        async def all_are_in() -> bool:
            waiting = held(host)
            return waiting is not None and waiting + 5 * sum(t.done() for t in tasks) == 20 + 5 * len(tasks)

        for request, _ in asked:  # one after the other, so that the one that can be answered is the first
            tasks.append(asyncio.create_task(outcome(clients["grpc"], request)))
            await until(all_are_in)
        slow.gate.set()
        assert [await task for task in tasks] == [expected for _, expected in asked]
        assert [await task for task in before] == [("ok", None)] * 4


async def test_activation_switches_every_face(store: Path) -> None:
    toy_datastore(store, version="v2", texts=TEXTS[:1], activate=False)
    async with datastore_faces(datastore_service(store)) as (_, clients):
        for version, client in zip(("v2", "v1", "v2", "v1"), clients.values(), strict=True):
            info = await client.activate("toy", version)
            assert (info.version, list(info.versions), info.state) == (version, ["v1", "v2"], "ready")
            assert {(await c.search(REQUEST)).version for c in clients.values()} == {version}
        with pytest.raises(UnknownVersion):
            await clients["grpc"].activate("toy", "v7")
        with pytest.raises(UnknownDomain):
            await clients["http list"].activate("nowhere", "v1")
    assert Catalog(store).current("toy") == "v1"


async def test_entries_that_are_followed_together_are_answered_as_alone(store: Path) -> None:
    searcher = Searcher.open(Catalog(store).path("toy", "v1"))
    requests = [replace(REQUEST, queries=QUERIES[i:], ids=True, follow=FOLLOW[i:]) for i in range(4)]
    slow = Slow()
    async with datastore_faces(datastore_service(store, slow)) as (host, clients):
        searches = [asyncio.create_task(clients["grpc"].search(request)) for request in requests]
        await until(lambda: held(host) == sum(len(r.queries) for r in requests))
        slow.gate.set()
        results = await asyncio.gather(*searches)
    assert all(same(result, searcher.search(request)) for result, request in zip(results, requests, strict=True))
