"""How a gateway deploys and holds applications when Serve is slow, fails or is busy with the same: moments that a real
cluster is rarely in. Ray is installed, but none runs: Serve's state is in this process.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from knnlm.cluster.registry import Registry, ShardOptions, Spec
from knnlm.errors import DatastoreError, Unavailable
from knnlm.testing import toy_datastore
from tests.sharding import sharded
from tests.test_cluster_registry import Clock, Values

NAME = "law@v1"
SPEC = Spec("/store/law/v1", [10, 10], "content", ShardOptions())


@dataclass
class Serve:
    """ray.serve as knnlm.cluster.applications uses it. outcome: the status of what is deployed next."""

    outcome: str = "RUNNING"
    known: dict[str, Any] = field(default_factory=dict)
    deployed: list[Spec] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)

    RunTarget = SimpleNamespace

    def put(self, status: str, *replicas: int, name: str = NAME) -> None:
        shards = {
            f"shard-{n}": SimpleNamespace(message="no such file", replica_states={"RUNNING": count})
            for n, count in enumerate(replicas or (0, 0))
        }
        self.known[name] = SimpleNamespace(status=status, message="", deployments=shards)

    def start(self, **_: Any) -> None: ...

    def status(self) -> Any:
        return SimpleNamespace(applications=dict(self.known))

    def run_many(self, targets: Sequence[Any], **_: Any) -> None:
        for target in targets:
            self.deployed.append(target.target)
            self.put(self.outcome, name=target.name)

    def delete(self, name: str, **_: Any) -> None:
        self.deleted.append(name)
        self.known.pop(name, None)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    from knnlm.cluster import applications

    fake = Serve()
    monkeypatch.setattr(applications, "serve", fake)
    monkeypatch.setattr(applications, "_graph", lambda spec: spec)
    monkeypatch.setattr(applications, "STATUS_SECONDS", 0.02)
    monkeypatch.setattr(applications.Applications, "connect", lambda _: None)
    fake.RunTarget = lambda spec, **more: SimpleNamespace(target=spec, **more)  # type: ignore[assignment]
    return fake


@pytest.fixture
def new(serve: Serve) -> Callable[[], Any]:
    """Another gateway's view of the cluster: Applications."""
    from knnlm.cluster.applications import Applications

    del serve
    values = Values()

    def made() -> Any:
        one = Applications("nowhere")
        one.registry = Registry(values, Clock())
        return one

    return made


def test_a_second_gateway_waits_for_what_the_first_is_deploying(serve: Serve, new: Callable[[], Any]) -> None:
    serve.outcome = "DEPLOYING"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(new().hold, NAME, SPEC)
        while not serve.deployed:
            time.sleep(0.01)
        second = pool.submit(new().hold, NAME, SPEC)
        time.sleep(0.3)
        assert not first.done()
        assert not second.done()  # or it would answer from shards that nobody has opened
        serve.put("DEPLOYING", 1, 1)
        assert first.result(60) == second.result(60) == SPEC
    assert serve.deployed == [SPEC]


def test_applications_are_deployed_one_after_another(
    serve: Serve, new: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from knnlm.cluster import applications

    under_way, most = 0, 0

    def graph(spec: Spec) -> Spec:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        time.sleep(0.2)
        under_way -= 1
        return spec

    monkeypatch.setattr(applications, "_graph", graph)
    one = new()
    with ThreadPoolExecutor() as pool:  # a gateway opens several versions at once
        assert list(pool.map(lambda n: one.hold(f"law@v{n}", SPEC), range(3))) == [SPEC] * 3
    assert len(serve.deployed) == 3
    assert most == 1


def test_a_version_that_is_opened_twice_at_once_and_cannot_be_is_held_by_nobody(
    serve: Serve, new: Callable[[], Any]
) -> None:
    serve.outcome = "DEPLOYING"
    one = new()
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(one.hold, NAME, SPEC) for _ in range(2)]
        while not serve.deployed:
            time.sleep(0.01)
        serve.outcome = "DEPLOY_FAILED"
        serve.put("DEPLOY_FAILED")
        for held in both:
            with pytest.raises(DatastoreError, match="no such file"):
                held.result(60)
    assert one._held == {}
    assert one.registry.holders(NAME) == 0
    assert NAME not in serve.known


def test_a_former_opening_that_ends_while_the_next_one_fails_is_not_deployed_again(
    serve: Serve, new: Callable[[], Any]
) -> None:
    one = new()
    one.hold(NAME, SPEC)
    serve.outcome = "DEPLOYING"
    with ThreadPoolExecutor() as pool:
        held = pool.submit(one.hold, NAME, replace(SPEC, content="another index"))
        while len(serve.deployed) < 2:
            time.sleep(0.01)
        one.release(NAME)
        serve.put("DEPLOY_FAILED")
        with pytest.raises(DatastoreError, match="no such file"):
            held.result(60)
    assert one._held == {}
    assert one.registry.holders(NAME) == 0


def test_what_vanished_is_deployed_again_with_the_replicas_it_was_scaled_to(
    serve: Serve, new: Callable[[], Any]
) -> None:
    one = new()
    one.hold(NAME, SPEC)
    new().scale(NAME, 4, 5)
    serve.known.clear()
    deployed = len(serve.deployed)
    watcher = threading.Thread(target=one._watch)
    watcher.start()
    try:
        while len(serve.deployed) == deployed:
            time.sleep(0.01)
    finally:
        one._ended.set()
        watcher.join(60)
    options = serve.deployed[-1].options
    assert (options.min_replicas, options.max_replicas) == (4, 5)
    assert one.registry.spec(NAME) == serve.deployed[-1]


def test_what_cannot_replace_a_version_leaves_the_former_one(serve: Serve, new: Callable[[], Any]) -> None:
    one = new()
    one.hold(NAME, SPEC)
    serve.outcome = "DEPLOY_FAILED"
    for _ in range(2):  # and is not taken for good when it is asked for again
        with pytest.raises(DatastoreError, match="no such file"):
            one.hold(NAME, replace(SPEC, content="another index"))
    assert serve.deployed[-1] == one.registry.spec(NAME) == SPEC
    assert not serve.deleted
    assert one.registry.holders(NAME) == 1


def test_what_cannot_be_opened_is_deleted_by_the_last_that_wants_it(serve: Serve, new: Callable[[], Any]) -> None:
    serve.outcome = "DEPLOY_FAILED"
    first, second = new(), new()
    second.registry.take(NAME)
    second.registry.renew()
    with pytest.raises(DatastoreError):
        first.hold(NAME, SPEC)
    assert not serve.deleted
    second.registry.give_up(NAME)
    second.registry.withdraw(NAME)
    with pytest.raises(DatastoreError):
        first.hold(NAME, SPEC)
    assert serve.deleted == [NAME]
    assert first.registry.holders(NAME) == 0


def test_a_gateway_that_ends_while_a_version_is_deployed_deletes_nothing(serve: Serve, new: Callable[[], Any]) -> None:
    serve.outcome = "DEPLOYING"
    one = new()
    with ThreadPoolExecutor() as pool:
        held = pool.submit(one.hold, NAME, SPEC)
        while not serve.deployed:
            time.sleep(0.01)
        one.leave()
        with pytest.raises(Unavailable, match="this gateway is shutting down"):
            held.result(60)
    assert not serve.deleted
    assert one.registry.holders(NAME) == 0


def test_a_version_that_was_opened_anew_is_held_when_the_former_opening_is_closed(
    serve: Serve, new: Callable[[], Any]
) -> None:
    one = new()
    one.hold(NAME, SPEC)
    one.hold(NAME, SPEC)
    one.release(NAME)
    assert one.registry.holders(NAME) == 1
    one.release(NAME)
    assert one.registry.holders(NAME) == 0
    assert serve.deleted == [NAME]  # the store does not know it


def test_each_outage_is_logged_once(
    serve: Serve, new: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks = []
    away = threading.Event()

    def status() -> Any:
        looks.append(away.is_set())
        if away.is_set():
            raise ConnectionError("no head")
        return SimpleNamespace(applications={})

    monkeypatch.setattr(serve, "status", status)
    one = new()
    watcher = threading.Thread(target=one._watch)
    watcher.start()
    try:
        for _ in range(2):
            for state in (away.set, away.clear):
                state()
                seen = len(looks)
                while len(looks) < seen + 10:
                    time.sleep(0.01)
    finally:
        one._ended.set()
        watcher.join(60)
    assert sum(looks) >= 16
    assert [record.message for record in caplog.records] == ["the state of the Ray cluster cannot be read"] * 2


def test_an_index_that_the_gateway_is_set_to_and_a_version_has_not_is_no_fault_of_the_caller(
    serve: Serve, tmp_path: Path
) -> None:
    from services.datastore.cluster import ClusterOpener
    from services.datastore.settings import DatastoreSettings

    del serve
    path = sharded(toy_datastore(tmp_path), 2)
    opener = ClusterOpener(DatastoreSettings(store=tmp_path, cluster="nowhere", index="ivf16"))
    with pytest.raises(DatastoreError, match="this service is set to index 'ivf16'"):
        opener(path, None)


def test_what_serve_does_not_take_is_not_registered(
    serve: Serve, new: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next gateway would deploy it, and so on."""
    from knnlm.cluster import applications

    def graph(spec: Spec) -> Spec:
        if spec.options.min_replicas > 1:
            raise ValueError("Value out of range: 999999999999")
        return spec

    monkeypatch.setattr(applications, "_graph", graph)
    many = replace(SPEC, options=replace(SPEC.options, min_replicas=2, max_replicas=2))
    one = new()
    with pytest.raises(DatastoreError, match="does not take law@v1 so: Value out of range"):
        one.hold(NAME, many)
    assert one.registry.spec(NAME) is None
    one.hold(NAME, SPEC)
    with pytest.raises(DatastoreError, match="out of range"):
        one.scale(NAME, 2, 2)
    assert one.registry.spec(NAME) == SPEC
