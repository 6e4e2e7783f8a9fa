"""The calendar jumps by ten years while services work: deadlines, grace periods, queues and keys do not go by it."""

import asyncio
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from knnlm.clients.call import Connection
from knnlm.clients.rpc import GrpcDatastore
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.updates.documents import add
from knnlm.datastore.verify import verify
from knnlm.errors import DeadlineExceeded, UnknownVersion
from knnlm.messages import Document, SearchRequest
from knnlm.options import SearchOptions
from knnlm.testing import ToyLanguageModel, toy_datastore
from services.aggregator.app import service as aggregator_service
from services.aggregator.settings import AggregatorSettings
from services.datastore.app import service as datastore_service
from services.datastore.settings import DatastoreSettings
from services.lm.app import service as lm_service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import running
from tests.faults.serving import opened_at_last
from tests.services.waiting import Slow, held, until

YEARS = 10 * 365 * 86_400.0
REQUEST = SearchRequest("toy", np.zeros((3, 16), np.float32), SearchOptions(k=4))


# gRPC's Python makes of a timeout a time of day, for its C core to compare with the system's clock, and the other way
# round where services.runtime.rpc asks how much is left. A real jump moves both, this one would move one of them
TRUE_TIME = ("grpc.", "services.runtime.rpc")


def bounded_run(check: Coroutine[Any, Any, None]) -> None:
    """A service that goes by the calendar may wait for ever: then the test fails instead."""
    asyncio.run(asyncio.wait_for(check, 90))


class Calendar:
    """What time.time says, moved by `shift` seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shift = 0.0
        self.asked = 0
        seconds, nanoseconds = time.time, time.time_ns

        def shifted() -> float:
            if str(sys._getframe(1).f_globals.get("__name__")).startswith(TRUE_TIME):
                return seconds()
            self.asked += 1
            return seconds() + self.shift

        monkeypatch.setattr(time, "time", shifted)
        monkeypatch.setattr(time, "time_ns", lambda: nanoseconds() + int(1e9 * self.shift))

    def jumps(self) -> Iterator[float]:
        """Far ahead, far back, and to today again; each holds until the next is asked for."""
        for shift in (YEARS, -YEARS, 0.0, -YEARS, YEARS, 0.0):
            self.shift = shift
            yield shift


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> Calendar:
    return Calendar(monkeypatch)


def test_requests_are_answered_whatever_day_it_is(calendar: Calendar, tmp_path: Path) -> None:
    toy_datastore(tmp_path)
    keys = tmp_path / "keys"
    keys.write_text("first\n")

    async def check() -> None:
        async with AsyncExitStack() as stack:
            lm = await stack.enter_async_context(
                running(lm_service(LmSettings(model="toy", port=0, grpc_port=0), lambda _: ToyLanguageModel()))
            )
            store = await stack.enter_async_context(
                running(datastore_service(DatastoreSettings(store=tmp_path, port=0, grpc_port=0)))
            )
            settings = AggregatorSettings(
                port=0,
                lm_target=f"127.0.0.1:{lm.grpc_port}",
                datastore_target=f"127.0.0.1:{store.grpc_port}",
                api_keys_file=keys,
            )
            front = await stack.enter_async_context(running(aggregator_service(settings)))
            url = f"http://127.0.0.1:{front.port}"
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=20))
            body = {"text": "the cat", "knn": {"domain": "toy", "lambda": 0.5, "temperature": 1.0}}
            answers: list[tuple[int, str]] = []
            asking = asyncio.create_task(_keep_asking(client, body, answers))
            for number, _ in enumerate(calendar.jumps()):
                await until(partial(_longer, answers, len(answers) + 3))
                if number > 2:  # the file is looked at every second: enough was waited for
                    continue
                key = f"key{number}"
                keys.write_text(f"first\n{key}\n")  # a new key is good, and the one before it is not
                await until(partial(_status, client, key, 200))
                if number:
                    await until(partial(_status, client, f"key{number - 1}", 401))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert {status for status, _ in answers} == {200}
            assert len({p for _, p in answers}) == 1

    bounded_run(check())
    assert calendar.asked, "nothing asked for the time of day: the test moves the wrong clock"


async def _keep_asking(client: httpx.AsyncClient, body: object, answers: list[tuple[int, str]]) -> None:
    headers = {"authorization": "Bearer first", "x-request-timeout": "10"}
    while True:
        response = await client.post("/v1/next_token", json=body, headers=headers)
        answers.append((response.status_code, str(response.json().get("results"))))


async def _longer(answers: list[tuple[int, str]], than: int) -> bool:
    return len(answers) > than


async def _status(client: httpx.AsyncClient, key: str, status: int) -> bool:
    response = await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    return response.status_code == status


def test_deadlines_and_queues_do_not_move_with_the_calendar(calendar: Calendar, tmp_path: Path) -> None:
    toy_datastore(tmp_path)

    async def check() -> None:
        slow = Slow()
        settings = DatastoreSettings(store=tmp_path, port=0, grpc_port=0, request_timeout_s=30)
        async with (
            running(datastore_service(settings, slow)) as host,
            GrpcDatastore(f"127.0.0.1:{host.grpc_port}") as client,
            opened_at_last(slow),
        ):
            waiting = [asyncio.create_task(client.search(REQUEST)) for _ in range(4)]
            await until(lambda: held(host) == 12)
            for _ in calendar.jumps():  # nobody's time is over by it, and nobody has time without end
                assert not any(task.done() for task in waiting)
                hasty = GrpcDatastore(Connection(f"127.0.0.1:{host.grpc_port}", timeout=0.1))
                with pytest.raises(DeadlineExceeded):
                    await hasty.search(REQUEST)
                await hasty.aclose()
            slow.gate.set()
            assert {result.version for result in await asyncio.gather(*waiting)} == {"v1"}

    bounded_run(check())


def test_a_grace_period_lasts_as_long_as_it_says(calendar: Calendar, tmp_path: Path) -> None:
    """A jump neither ends it (the version that was replaced still answers) nor keeps it for ten years."""
    toy_datastore(tmp_path)
    toy_datastore(tmp_path, version="v2", activate=False)

    async def check(grace: float) -> None:
        settings = DatastoreSettings(store=tmp_path, port=0, grpc_port=0, watch_interval_s=0.02, grace_s=grace)
        async with (
            running(datastore_service(settings)) as host,
            GrpcDatastore(f"127.0.0.1:{host.grpc_port}") as client,
        ):

            async def gone(version: str) -> bool:
                try:
                    await client.search(replace(REQUEST, version=version))
                except UnknownVersion:
                    return True
                return False

            for number, _ in enumerate(calendar.jumps()):
                old, new = ("v1", "v2") if number % 2 == 0 else ("v2", "v1")
                await client.activate("toy", new)
                calendar.shift = -calendar.shift  # and once more while it runs
                if grace > 60:
                    await asyncio.sleep(0.1)  # several looks of the watcher
                    assert not await gone(old)
                else:
                    await until(partial(gone, old))

    bounded_run(check(3600.0))
    bounded_run(check(0.1))


def test_documents_are_added_whatever_day_it_is(calendar: Calendar, tmp_path: Path) -> None:
    toy_datastore(tmp_path)
    catalog = Catalog(tmp_path)
    for number, _ in enumerate(calendar.jumps()):
        documents = [Document(f"n{number}", "the dog sat on the log")]
        change = add(documents, ToyLanguageModel(), catalog, "toy", activate=catalog.activate)
        assert catalog.current("toy") == change.version
        assert [check for check in verify(catalog.path("toy", change.version)) if check.problem] == []
