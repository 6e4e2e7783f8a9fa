"""Hundreds of switches and a hundred thousand requests: the services hold afterwards what they held before.

KNNLM_FAULTS_SECONDS scales the counts (120 = all of them).
"""

import asyncio
import json
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest

from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from knnlm.v1 import datastore_pb2
from knnlm.wire.protos import to_proto
from tests.faults.damage import indexed
from tests.faults.figures import Held, held, report, span
from tests.faults.fleet import Replica, fleet, lone_datastore
from tests.faults.loads import Ask, grpc_asks, http_asks
from tests.reference import CONTEXTS, licence_store

pytestmark = pytest.mark.faults

SWITCHES = int(500 * span(120) / 120)
REQUESTS = int(100_000 * span(120) / 120)
CLIENTS = 16
SEARCH = to_proto(
    SearchRequest("toy", np.zeros((1, 16), np.float32), SearchOptions(k=4)), datastore_pb2.SearchRequest
).SerializeToString()
PATH = "/v1/domains/toy/search"
GRPC_PATH = "/knnlm.v1.Datastore/Search"
SOON = ["--watch-interval-s", "0.02", "--grace-s", "0"]
LET_GO_SECONDS = 0.05  # a version that is asked for again before it was let go is not opened again
SETTLE_SECONDS = 30.0


def _settles(pid: int, before: Held) -> Held:
    """What a process holds once what was retired is let go; the test fails when it keeps more.

    Descriptors: some connections end when their client notices. Threads: those of the loop's pool, made when first
    needed. Maps: glibc's arenas and stacks of those threads. Memory: a tenth, and what the allocator keeps of the
    largest batch.
    """

    def settled() -> bool:
        now = held(pid)
        return (
            now.descriptors <= before.descriptors + 8
            and now.threads <= before.threads + 6
            and now.maps <= before.maps + 40
            and now.resident <= 1.1 * before.resident + (24 << 20)
        )

    deadline = time.monotonic() + SETTLE_SECONDS
    while not settled() and time.monotonic() < deadline:
        time.sleep(0.2)
    after = held(pid)
    assert settled(), f"before {before}, after {after}"
    return after


async def _asked(ask: Ask, count: int) -> Counter[int]:
    """So many, some at a time."""
    numbers = iter(range(count))
    seen: Counter[int] = Counter()

    async def client() -> None:
        for number in numbers:
            status, problem = await ask(number)
            assert problem is None, problem
            seen[status] += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return seen


def test_five_hundred_switches(tmp_path: Path) -> None:
    """Three versions in turn, all with an index file and reduced keys, while searches go on: none fails."""
    for number in (1, 2, 3):
        indexed(tmp_path / "store", "pca8,ivf8,sq8+fp16", version=f"v{number}", activate=number == 1)
    with lone_datastore(tmp_path / "store", tmp_path / "logs", SOON) as running:
        pid = running.pid

        async def switched(count: int) -> None:
            async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
                for number in range(count):
                    version = f"v{number % 3 + 1}"
                    answer = await client.post("/v1/domains/toy:activate", json={"version": version})
                    assert answer.status_code == 200, answer.text
                    await asyncio.sleep(LET_GO_SECONDS)

        async def light_load(stop: asyncio.Event) -> int:
            count = 0
            async with grpc_asks(running.target, GRPC_PATH, SEARCH) as ask:
                while not stop.is_set():
                    status, problem = await ask(count)
                    assert (status, problem) == (200, None)
                    count += 1
                    await asyncio.sleep(0.01)
            return count

        async def both(count: int) -> int:
            stop = asyncio.Event()
            load = asyncio.create_task(light_load(stop))
            await switched(count)
            stop.set()
            return await load

        asyncio.run(both(30))
        time.sleep(1)  # the last of them is let go
        before, opened = held(pid), _opened(running)
        begun = time.monotonic()
        searches = asyncio.run(both(SWITCHES))
        seconds = time.monotonic() - begun
        opened = _opened(running) - opened
        after = _settles(pid, before)
    report(
        "leaks.switches", switches=SWITCHES, opened=opened, searches=searches, seconds=round(seconds),
        before=before.figures(),
        after=after.figures(),
    )  # fmt: skip
    assert opened >= 0.9 * SWITCHES, "versions were taken up again before they were let go: nothing was opened"


def _opened(running: Replica) -> int:
    """How often a version was really read from disk."""
    text = httpx.get(f"{running.url}/metrics", timeout=30).text
    rows = [line for line in text.splitlines() if line.startswith("knnlm_domain_load_seconds_count{")]
    return sum(int(float(line.rpartition(" ")[2])) for line in rows)


def test_a_hundred_thousand_requests(tmp_path: Path) -> None:
    """Half over gRPC, half over HTTP: JSON and protobuf, right and wrong ones."""
    indexed(tmp_path / "store", "ivf8,sq8")
    with lone_datastore(tmp_path / "store", tmp_path / "logs", SOON) as running:
        pid = running.pid
        _requests(running, 2000)
        before = held(pid)
        begun = time.monotonic()
        seen = _requests(running, REQUESTS)
        seconds = time.monotonic() - begun
        after = _settles(pid, before)
    report(
        "leaks.requests", requests=sum(seen.values()), statuses=seen, seconds=round(seconds),
        before=before.figures(), after=after.figures(),
    )  # fmt: skip


def _requests(running: Replica, count: int) -> Counter[int]:
    port = running.http_port
    body = json.dumps({"queries": [[0.0] * 16], "k": 4}).encode()

    async def ask() -> Counter[int]:
        async with (
            grpc_asks(running.target, GRPC_PATH, SEARCH) as over_grpc,
            http_asks(port, [(PATH, body)]) as json_,
            http_asks(port, [(PATH, SEARCH)], "application/protobuf") as packed,
            http_asks(port, [(PATH, b"{}"), ("/nowhere", b"[")]) as wrong,
        ):

            async def mistaken(number: int) -> tuple[int, str | None]:
                status, _ = await wrong(number)
                return status, None if status in (400, 404) else f"status {status}"

            seen = await _asked(over_grpc, count // 2)
            seen += await _asked(json_, count // 5)
            seen += await _asked(packed, count // 5)
            return seen + await _asked(mistaken, count // 10)

    return asyncio.run(ask())


def test_all_three_services_under_mixed_requests(tmp_path: Path) -> None:
    """The aggregator, and the connections it holds; a domain is switched now and then."""
    store = licence_store(tmp_path / "store")
    count = REQUESTS // 20
    bodies = [
        (path, json.dumps({"text": text, "knn": {"domain": domain}}).encode())
        for text in CONTEXTS for domain in ("licence", "docs") for path in ("/v1/next_token", "/v1/score")
    ]  # fmt: skip
    with fleet(store, tmp_path / "logs", datastore_flags=SOON) as whole:

        async def ask(number: int) -> None:
            async with http_asks(whole.aggregator.http_port, bodies) as ask:
                await _asked(ask, number)

        def activated(version: str) -> None:
            url = f"{whole.datastores[0].url}/v1/domains/licence:activate"
            assert httpx.post(url, json={"version": version}, timeout=60).status_code == 200

        asyncio.run(ask(300))
        for version in ("v2", "v1"):
            activated(version)
        before = {replica.service: held(replica.pid) for replica in whole.replicas}
        for version in ("v2", "v1") * 5:
            asyncio.run(ask(count // 10))
            activated(version)
        after = {replica.service: _settles(replica.pid, before[replica.service]) for replica in whole.replicas}
    report(
        "leaks.system", requests=count // 10 * 10, before={name: one.figures() for name, one in before.items()},
        after={name: one.figures() for name, one in after.items()},
    )  # fmt: skip
