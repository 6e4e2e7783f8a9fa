"""Requests that end well, badly, early or never leave no task, no lease and no place behind."""

import asyncio
from pathlib import Path

import httpx
import numpy as np

from knnlm.clients.rpc import GrpcDatastore
from knnlm.errors import InvalidRequest
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from knnlm.testing import toy_datastore
from services.datastore.app import service
from services.datastore.settings import DatastoreSettings
from services.runtime.lifecycle import Host, running
from tests.faults.serving import opened_at_last
from tests.searching import asking
from tests.services.waiting import Slow, held, until

REQUEST = SearchRequest("toy", np.zeros((2, 16), np.float32), SearchOptions(k=4))
BODY = {"queries": [[0.0] * 16], "k": 4}
ROUNDS = 40


def _inflight(host: Host) -> float | None:
    return host.service.metrics.registry.get_sample_value("knnlm_inflight_requests")


async def _quiet(host: Host) -> bool:
    return held(host) in (0, None) and _inflight(host) in (0, None)


async def _tasks_are(count: int) -> bool:
    return len(asyncio.all_tasks()) <= count


async def test_no_task_is_left_behind(tmp_path: Path) -> None:
    toy_datastore(tmp_path)
    toy_datastore(tmp_path, version="v2", activate=False)

    async def rounds(host: Host, slow: Slow, count: int) -> None:
        url = f"http://127.0.0.1:{host.port}"
        async with (
            GrpcDatastore(f"127.0.0.1:{host.grpc_port}") as client,
            httpx.AsyncClient(base_url=url, timeout=60) as http,
        ):
            for number in range(count):
                slow.gate.set()
                await client.search(REQUEST)
                assert (await http.post("/v1/domains/toy/search", json=BODY)).status_code == 200
                await client.activate("toy", f"v{number % 2 + 1}")
                try:
                    await client.search(asking(REQUEST, k=0))
                except InvalidRequest:
                    pass
                else:
                    raise AssertionError("k = 0 was answered")
                slow.gate.clear()
                hasty = {"x-request-timeout": "0.03"}
                late = await http.post("/v1/domains/toy/search", json=BODY, headers=hasty)
                assert late.status_code == 504
                leaving = [asyncio.create_task(http.post("/v1/domains/toy/search", json=BODY)) for _ in range(3)]
                leaving += [asyncio.create_task(client.search(REQUEST)) for _ in range(3)]  # type: ignore[arg-type]
                await until(lambda: (_inflight(host) or 0) >= 6)
                for task in leaving:
                    task.cancel()
                await asyncio.gather(*leaving, return_exceptions=True)
                await until(lambda: _quiet(host))
                slow.gate.set()

    slow = Slow()
    settings = DatastoreSettings(store=tmp_path, port=0, grpc_port=0, grace_s=0.05, watch_interval_s=0.02)
    async with running(service(settings, slow)) as host, opened_at_last(slow):
        await rounds(host, slow, 2)
        await until(lambda: len(slow.opened) - len(slow.closed) == 1)
        before = len(asyncio.all_tasks())
        await rounds(host, slow, ROUNDS)
        await until(lambda: _tasks_are(before))
        await until(lambda: len(slow.opened) - len(slow.closed) == 1)  # the current version
