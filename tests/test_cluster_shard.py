"""A replica of a shard, without Ray."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from knnlm.cluster.shard import ShardReplica, unpack
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from knnlm.testing import toy_datastore
from knnlm.v1 import datastore_pb2
from knnlm.wire.protos import to_proto


async def test_what_nobody_waits_for_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toy_datastore(tmp_path)
    replica = ShardReplica(str(path), 0, {})
    asked = SearchRequest(path.parent.name, np.zeros((1, 16), np.float32), SearchOptions(k=1), ids=True)
    packed = to_proto(asked, datastore_pb2.SearchRequest).SerializeToString()
    begun, going_on, searched = threading.Event(), threading.Event(), []
    search = replica._search

    def slow(request: bytes) -> bytes:
        searched.append(request)
        begun.set()
        going_on.wait(60)
        return search(request)

    monkeypatch.setattr(replica, "_search", slow)
    first = asyncio.create_task(replica.search(packed))
    await asyncio.to_thread(begun.wait, 60)
    left = asyncio.create_task(replica.search(packed))
    await asyncio.sleep(0.05)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    going_on.set()
    header, _ = unpack(await first)
    assert header == {"unknown": []}
    unpack(await replica.search(packed))
    assert len(searched) == 2


async def test_memory_that_ends_is_no_fault_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = ShardReplica(str(toy_datastore(tmp_path)), 0, {})

    def ends(request: bytes) -> bytes:
        raise MemoryError("8 GiB")

    monkeypatch.setattr(replica, "_search", ends)
    header, body = unpack(await replica.search(b""))
    assert header == {
        "error": {"code": "unavailable", "message": "memory ended while the shard worked: 8 GiB", "param": None}
    }
    assert body == b""
