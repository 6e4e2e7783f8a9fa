"""Messages that nobody should send, over gRPC and as protobuf over HTTP: refused in bounds, and the service lives."""

import asyncio
from collections import Counter
from pathlib import Path

import httpx
import pytest

from knnlm.v1 import datastore_pb2, lm_pb2
from services.runtime.lifecycle import Host
from tests.faults.knocking import MODULES, codes, datastore, lm, random_messages
from tests.faults.messages import SEEDS, hostile_tensors, methods
from tests.faults.reading import bounded

COUNT = 450


def test_every_rpc_has_a_message_to_begin_with() -> None:
    assert {taken for module in MODULES.values() for _, taken in methods(module)} == set(SEEDS)


def test_hostile_messages_are_refused_by_the_datastore(tmp_path: Path) -> None:
    async def check() -> Counter[str]:
        async with datastore(tmp_path) as host:
            return await codes(host, random_messages(list(methods(datastore_pb2)), COUNT, seed=1))

    with bounded(256 << 20):
        seen = asyncio.run(check())
    assert seen["Search OK"] > 5
    assert seen["Search INVALID_ARGUMENT"] > 20
    assert seen["GetPassages OK"] > 2
    assert seen["GetPassages INVALID_ARGUMENT"] > 5


def test_hostile_messages_are_refused_by_the_lm_service() -> None:
    async def check() -> Counter[str]:
        async with lm() as host:
            return await codes(host, random_messages(list(methods(lm_pb2)), COUNT, seed=2))

    with bounded(256 << 20):
        seen = asyncio.run(check())
    assert seen["Forward OK"] > 5
    assert seen["Forward INVALID_ARGUMENT"] > 20


def test_a_shape_is_not_believed(tmp_path: Path) -> None:
    """(2**40,) or (2**31, 2**31) with a few bytes must not be allocated, wherever a tensor can stand."""
    search, forward = SEEDS[datastore_pb2.SearchRequest][1], SEEDS[lm_pb2.ForwardRequest][0]
    fields = {
        "datastore": (search, ("queries", "exclude_entries")),
        "lm": (forward, ("tokens", "positions", "targets", "candidates", "temperatures")),
    }
    paths = {"datastore": "/knnlm.v1.Datastore/Search", "lm": "/knnlm.v1.LanguageModel/Forward"}

    def asked(service: str) -> list[tuple[str, type, bytes]]:
        message, names = fields[service]
        rows = []
        for name in names:
            for tensor in hostile_tensors():
                changed = type(message)()
                changed.CopyFrom(message)
                getattr(changed, name).CopyFrom(tensor)
                rows.append((paths[service], type(message), changed.SerializeToString()))
        return rows

    async def check() -> None:
        async with datastore(tmp_path) as store, lm() as model:
            for name, host in {"datastore": store, "lm": model}.items():
                seen = await codes(host, asked(name))
                assert sum(seen.values()) == len(asked(name))

    with bounded(64 << 20):
        asyncio.run(check())


@pytest.mark.parametrize("name", ["datastore", "lm"])
def test_hostile_messages_over_http_are_refused_alike(name: str, tmp_path: Path) -> None:
    taken, path = {
        "datastore": (datastore_pb2.SearchRequest, "/v1/domains/toy/search"),
        "lm": (lm_pb2.ForwardRequest, "/v1/forward"),
    }[name]

    async def check(host: Host) -> Counter[int]:
        seen: Counter[int] = Counter()
        headers = {"content-type": "application/protobuf"}
        async with httpx.AsyncClient(base_url="http://test", transport=httpx.ASGITransport(host.app)) as client:
            for _, _, raw in random_messages([("", taken)], 200, seed=3):
                response = await client.post(path, content=raw, headers=headers)
                seen[response.status_code] += 1
                assert response.status_code in (200, 400, 404, 409, 413), (raw[:200], response.text)
                if response.status_code != 200:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        return seen

    async def run() -> Counter[int]:
        async with datastore(tmp_path) if name == "datastore" else lm() as host:
            return await check(host)

    seen = asyncio.run(run())
    assert seen[200] > 5
    assert seen[400] > 20
