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
