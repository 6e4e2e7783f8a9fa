"""How a gateway searches when replicas are late, fail or die: moments that a real cluster is rarely in.

Ray is installed, but none runs: the replicas are in this process.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from knnlm.cluster.shard import ShardReplica
from knnlm.datastore.manifest import Manifest
from knnlm.errors import KnnlmError, Unavailable
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from knnlm.testing import toy_datastore
from tests.cluster.gateways import same
from tests.sharding import sharded


@dataclass
class Replica:
    """A handle of Serve's to one replica that is in this process. trouble: what an attempt does, by its number."""

    shard: ShardReplica
    trouble: Callable[[int], float] = lambda _: 0.0
    attempts: int = 0

    @property
    def search(self) -> "Replica":
        return self

    @property
    def describe(self) -> Any:
        return SimpleNamespace(remote=lambda _: Response(asyncio.run(self.shard.describe(b"")), 0.0))

    def remote(self, request: bytes) -> "Response":
        self.attempts += 1
        seconds = self.trouble(self.attempts)
        return Response(asyncio.run(self.shard.search(request)), time.monotonic() + seconds)


@dataclass
class Response:
    answer: bytes
    ready: float

    def result(self, timeout_s: float) -> bytes:
        left = self.ready - time.monotonic()
        threading.Event().wait(min(max(left, 0.0), timeout_s))
        if left > timeout_s:
            raise TimeoutError
        return self.answer

    def cancel(self) -> None: ...


@dataclass
class Searching:
    searcher: Any
    replicas: list[Replica]
    whole: Searcher
    request: SearchRequest


@pytest.fixture
def searching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Searching:
    from knnlm.cluster import serving

    whole = toy_datastore(tmp_path)
    path = sharded(whole, 3)
    manifest = Manifest.load(path)
    replicas = [Replica(ShardReplica(str(path), number, {})) for number in range(3)]
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda name, **_: replicas[int(name.split("-")[1])])
    monkeypatch.setattr(serving, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(serving, "SLICE_SECONDS", 0.01)
    monkeypatch.setattr(serving, "ATTEMPT_SECONDS", 0.05)
    there: Any = SimpleNamespace(replicas=lambda _: {f"shard-{n}": 1 for n in range(3)})
    queries = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    return Searching(
        serving.ClusterSearcher(there, "application", manifest, None), replicas, Searcher.open(whole),
        SearchRequest(manifest.domain, queries, SearchOptions(k=5), ids=True),
    )  # fmt: skip


def test_what_serve_raises_when_it_is_asked_is_no_error_of_the_caller(searching: Searching) -> None:
    from ray.serve.exceptions import RayServeException

    def trouble(attempt: int) -> float:
        if attempt < 3:
            raise RayServeException("no controller")
        return 0.0

    searching.replicas[1].trouble = trouble
    assert same(searching.searcher.search(searching.request), searching.whole.search(searching.request))


def test_only_shards_that_have_entries_to_follow_are_asked(searching: Searching) -> None:
    first, middle = 0, searching.whole.manifest.entries // 2
    follow = np.array([[middle, -1], [-1, middle + 1], [-1, -1]], np.int64)
    for entry, attempts in ((middle, [1, 1, 0]), (first, [2, 2, 0])):
        follow[2, 0] = entry
        request = replace(searching.request, follow=follow)
        assert same(searching.searcher.search(request), searching.whole.search(request))
        assert [replica.attempts for replica in searching.replicas] == attempts


def test_a_request_that_every_replica_dies_of_ends(searching: Searching) -> None:
    from ray.exceptions import ActorDiedError

    from knnlm.cluster.serving import MAX_REPLICA_DEATHS

    def trouble(_: int) -> float:
        raise ActorDiedError

    searching.replicas[1].trouble = trouble
    with pytest.raises(Unavailable, match=r"shard 1 of 3 .* failed 8 times"):
        searching.searcher.search(searching.request)
    assert searching.replicas[1].attempts == MAX_REPLICA_DEATHS + 1


def test_a_search_that_takes_long_is_finished(searching: Searching) -> None:
    searching.replicas[2].trouble = lambda _: 0.3  # six times what the first attempt may take
    found = searching.searcher.search(searching.request)
    assert same(found, searching.whole.search(searching.request))
    assert searching.replicas[2].attempts <= 4
    assert set(found.timings) >= {"shards", "merge"}


def test_what_a_shard_refuses_is_the_callers_error(searching: Searching) -> None:
    with pytest.raises(KnnlmError) as refused:
        searching.searcher.search(replace(searching.request, queries=searching.request.queries[:, :3]))
    assert refused.value.param == "queries"
