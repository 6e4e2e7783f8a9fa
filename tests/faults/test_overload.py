"""Three times as much as the services can do, for a minute: who is not served is told when to come again, who is served
waits no longer than the bounds say, memory stays, and afterwards all is as before.

KNNLM_FAULTS_SECONDS sets for how long (default 60).
"""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from knnlm.v1 import datastore_pb2
from knnlm.wire.protos import to_proto
from tests.faults.figures import Held, held, percentile, report, span
from tests.faults.fleet import Fleet, Replica, fleet
from tests.faults.loads import Ask, closed_loop, figures, grpc_asks, http_asks, open_loop
from tests.reference import CONTEXTS, licence_store

pytestmark = pytest.mark.faults

OVER = 3.0  # times the capacity
MEASURE_SECONDS = 6.0
CLIENTS = 32  # of the closed loop that finds the capacity: enough for full batches
MEGABYTE = 1 << 20
# of the memory at half time: the allocator's heaps settle during the first half, and vary by what is in work just then
GROWTH, SPARE = 1.1, 24 * MEGABYTE
BATCH = 128  # queries in a search that goes to the datastore directly


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return licence_store(tmp_path_factory.mktemp("store") / "store")


def _bodies() -> list[tuple[str, bytes]]:
    return [
        (path, json.dumps({"text": text, "knn": {"domain": domain}}).encode())
        for domain in ("licence", "docs")
        for text in CONTEXTS
        for path in ("/v1/next_token", "/v1/score")
    ]


def _search(store: Path) -> bytes:
    keys = np.load(store / "licence" / "v1" / "keys.npy", mmap_mode="r")
    queries = np.resize(np.asarray(keys, np.float32), (BATCH, keys.shape[1]))
    request = SearchRequest("licence", queries, SearchOptions(k=64))
    return to_proto(request, datastore_pb2.SearchRequest).SerializeToString()


def _overloaded(asks: AbstractAsyncContextManager[Ask], replicas: list[Replica], most_inside: int, name: str) -> None:
    """most_inside: requests that the service works on or lets wait at once."""
    middle: list[Held] = []

    async def load() -> tuple[float, list[Any], float, list[Any]]:
        async with asks as ask:
            await closed_loop(ask, 4, 2.0)
            capacity = figures(await closed_loop(ask, CLIENTS, MEASURE_SECONDS), MEASURE_SECONDS)["accepted_per_s"]
            warm.extend(held(replica.pid) for replica in replicas)
            begun = time.monotonic()
            outcomes = await open_loop(
                ask, OVER * capacity, span(60), lambda: middle.extend(held(replica.pid) for replica in replicas)
            )
            seconds = time.monotonic() - begun
            after = await closed_loop(ask, 1, 3.0)
            return capacity, outcomes, seconds, after

    warm: list[Held] = []
    capacity, outcomes, seconds, after = asyncio.run(load())
    end = [held(replica.pid) for replica in replicas]
    found = figures(outcomes, seconds)
    # who is let in waits for those before it: as many as are inside at once, at the rate they are answered. Three times
    # that, as the rate is a mean: batches are uneven, and the cores are shared. And a second for a stall of the machine
    bound = 3 * most_inside / found["accepted_per_s"] + 1.0
    calm = [one.seconds for one in after]
    report(
        "overload", face=name, capacity_per_s=capacity, offered_per_s=round(len(outcomes) / span(60), 1),
        seconds=round(seconds, 1), **found, bound_s=round(bound, 2), after_p50_s=round(percentile(calm, 0.5), 3),
        resident_mb={
            replica.service: [round(one.resident / MEGABYTE, 1) for one in states]
            for replica, *states in zip(replicas, warm, middle, end, strict=True)
        },
    )  # fmt: skip
    problems = [one for one in outcomes if one.problem is not None]
    assert not problems, f"{len(problems)} of {len(outcomes)}: {problems[:3]}"
    assert found["statuses"].get(429, 0) > 0, "nothing was refused: this was no overload"
    assert found["accepted_p99_s"] <= bound
    assert {one.status for one in after} == {200}, "not as before once the load is over"
    for replica, half, last in zip(replicas, middle, end, strict=True):
        assert last.resident <= GROWTH * half.resident + SPARE, f"{replica.service} grew: {half} to {last}"


@pytest.fixture(scope="module")
def services(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(store, tmp_path_factory.mktemp("logs")) as whole:
        yield whole


DEFAULT_PLACES = 256  # --max-concurrent-requests


def test_the_aggregator_with_the_default_bounds(services: Fleet) -> None:
    asks = http_asks(services.aggregator.http_port, _bodies())
    _overloaded(asks, services.replicas, DEFAULT_PLACES, "aggregator")


def test_the_datastore_over_grpc(services: Fleet, store: Path) -> None:
    asks = grpc_asks(services.datastores[0].target, "/knnlm.v1.Datastore/Search", _search(store))
    _overloaded(asks, services.datastores, DEFAULT_PLACES, "datastore grpc")


def test_the_datastore_over_http(services: Fleet, store: Path) -> None:
    requests = [("/v1/domains/licence/search", _search(store))]
    asks = http_asks(services.datastores[0].http_port, requests, "application/protobuf")
    _overloaded(asks, services.datastores, DEFAULT_PLACES, "datastore http")


def test_the_aggregator_with_few_places(store: Path, tmp_path: Path) -> None:
    """What an operator sets who wants answers soon or not at all."""
    places = 32
    with fleet(store, tmp_path / "logs", aggregator_flags=["--max-concurrent-requests", str(places)]) as whole:
        asks = http_asks(whole.aggregator.http_port, _bodies())
        _overloaded(asks, whole.replicas, places, f"aggregator, {places} places")
