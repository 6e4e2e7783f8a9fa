"""Work on a cluster that has no room, with a stand-in for Ray."""

import os
import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from knnlm.cluster import connection, pool
from knnlm.errors import Unavailable


def test_work_that_no_worker_takes_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when replicas of shards have reserved all processors: Ray waits, and says nothing."""

    def remote(**options: Any) -> Any:
        assert options["max_retries"] == 3
        assert OSError in options["retry_exceptions"]  # by default Ray repeats only what lost its worker
        return lambda function: SimpleNamespace(remote=lambda *arguments: (function, arguments))

    ray = SimpleNamespace(
        remote=remote,
        wait=lambda references, **_: ([], references),
        cluster_resources=lambda: {"CPU": 4.0},
        nodes=list,
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(Unavailable, match="no worker was free for 0 seconds: the cluster has 4 processors and 0 GPUs"):
        pool.run_tasks(print, [(1,)], lambda *_: None, cpus=2, within=0.05)


@pytest.mark.parametrize(("free", "expected"), [(8.0, 6), (7.9, 5), (4.0, 2), (0.0, 1)])
def test_a_task_asks_for_what_is_free_of_one_node(monkeypatch: pytest.MonkeyPatch, free: float, expected: int) -> None:
    """The nodes have 6 and 2 processors, and whatever others took may be on the larger node."""
    nodes = [{"Alive": True, "Resources": {"CPU": count}} for count in (6.0, 2.0)]
    ray = SimpleNamespace(
        cluster_resources=lambda: {"CPU": 8.0}, available_resources=lambda: {"CPU": free}, nodes=lambda: nodes
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(pool, "FREEING_SECONDS", 0.01)
    assert pool.free_processors(6) == expected


def test_few_workers_start_at_once_however_many_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that starts does the only piece; the others are ended."""
    made: list[SimpleNamespace] = []
    ended: list[object] = []

    def actor() -> SimpleNamespace:
        made.append(
            SimpleNamespace(ready=SimpleNamespace(remote=object), do=SimpleNamespace(remote=lambda _: object()))
        )
        return made[-1]

    ray = SimpleNamespace(
        wait=lambda references, **_: (references[:1], references[1:]), kill=ended.append, get=lambda _: "done",
        exceptions=SimpleNamespace(RayTaskError=RuntimeError, RayError=RuntimeError),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", ray)
    workers: pool.Pool[str] = pool.Pool(actor, 100_000)
    done: list[object] = []
    workers.run(["piece"], lambda piece, result: done.append((piece, result)))
    workers.close()
    assert done == [("piece", "done")]
    assert pool.MAX_STARTING <= len(made) <= pool.MAX_STARTING + 1
    assert len(ended) == len(made)


@pytest.mark.parametrize("address", ["local", "auto"])
def test_a_cluster_of_its_own_is_on_the_loopback_address_alone(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """And so whether it builds or serves: both connect by this."""
    given: dict[str, Any] = {}
    ray = SimpleNamespace(init=lambda **options: given.update(options), exceptions=SimpleNamespace(RayError=OSError))
    monkeypatch.setitem(sys.modules, "ray", ray)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    connection.connect(address, 2, configure_logging=False)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert (given["address"], given["configure_logging"]) == (address, False)
    local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "num_cpus": 2}
    assert {name: given.get(name) for name in local} == (local if address == "local" else dict.fromkeys(local))
    assert os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == ("0" if address == "local" else None)


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise ConnectionError("nobody there\nand a page of what else")

    ray = SimpleNamespace(init=init, exceptions=SimpleNamespace(RayError=RuntimeError))
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(Unavailable, match=r"no Ray cluster answers at 'auto': nobody there$"):
        connection.connect("auto")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_at_which_nothing_listens_is_named_at_once(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(Unavailable, match=rf"no Ray cluster answers at '{address}': .*refused"):
        connection.connect(address)
