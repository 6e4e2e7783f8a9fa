"""Work on a cluster that has no room, with a stand-in for Ray."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from knnlm.cluster import pool
from knnlm.errors import Unavailable


def test_work_that_no_worker_takes_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when replicas of shards have reserved all processors: Ray waits, and says nothing."""

    def remote(**_: Any) -> Any:
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
