"""Streams of completions: how they end, whoever ends them, and that nothing is left behind."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from knnlm.datastore.updates.revise import with_tuning
from knnlm.errors import Unavailable
from knnlm.messages import ForwardRequest, ForwardResult
from knnlm.testing import ToyLanguageModel, toy_datastore
from services.aggregator.completions import stream
from services.aggregator.completions.stream import DONE
from services.aggregator.core import AggregatorCore
from tests.contract.system import TUNING, System, system
from tests.services.waiting import until

STREAMS, TOGETHER = 120, 40
BODY: dict[str, Any] = {
    "prompt": "the cat", "model": "toy+cat", "max_tokens": 200, "stream": True, "ignore_eos": True, "temperature": 0,
    "logprobs": 0,
}  # fmt: skip


class Unhurried(ToyLanguageModel):
    """Has room for long texts, takes its time, and waits at a gate."""

    def __init__(self) -> None:
        super().__init__(context_length=256)
        self.gate = threading.Event()
        self.gate.set()
        self.sequences: list[int] = []

    def forward(self, request: ForwardRequest) -> ForwardResult:
        if request.full or request.top_n:
            self.gate.wait()
            time.sleep(0.005)
            self.sequences.append(len(request.tokens))
        return super().forward(request)


@asynccontextmanager
async def served(path: Path, **settings: Any) -> AsyncIterator[tuple[System, Unhurried, AggregatorCore]]:
    lm = Unhurried()
    with_tuning(toy_datastore(path, lm, domain="cat"), TUNING)
    async with system(path, lm=lm, **settings) as running:
        core = running.hosts["aggregator"].service.core
        assert isinstance(core, AggregatorCore)
        try:
            yield running, lm, core
        finally:
            lm.gate.set()


def url(running: System) -> str:
    return f"http://127.0.0.1:{running.hosts['aggregator'].port}"


def inflight(running: System) -> float | None:
    return running.hosts["aggregator"].service.metrics.registry.get_sample_value("knnlm_inflight_requests")


async def test_streams_that_are_left_leave_nothing_behind(tmp_path: Path) -> None:
    async with served(tmp_path) as (running, lm, core), httpx.AsyncClient(base_url=url(running), timeout=60) as client:

        async def abandoned(number: int) -> None:
            async with client.stream("POST", "/v1/completions", json=BODY | {"n": 1 + number % 3}) as response:
                assert response.status_code == 200
                lines = response.aiter_lines()
                for _ in range(number % 4):
                    await anext(lines)

        await abandoned(1)
        await until(lambda: inflight(running) == 0)
        await asyncio.sleep(0.1)
        before = len(asyncio.all_tasks())
        for _ in range(STREAMS // TOGETHER):
            await asyncio.gather(*(abandoned(number) for number in range(TOGETHER)))
        await until(lambda: inflight(running) == 0)
        await until(lambda: len(asyncio.all_tasks()) <= before)
        completions = core.aggregator.completions
        assert (completions._running._left, completions._listed._left) == (1024, 1 << 22)
        assert core.aggregator._rounds._waiting == []
        passes = len(lm.sequences)
        await asyncio.sleep(0.1)
        assert len(lm.sequences) == passes


async def test_a_client_that_leaves_is_in_one_more_round_at_most(tmp_path: Path) -> None:
    async with served(tmp_path) as (running, lm, _), httpx.AsyncClient(base_url=url(running), timeout=60) as client:
        whole = asyncio.create_task(client.post("/v1/completions", json=BODY | {"stream": False}, timeout=60))
        async with client.stream("POST", "/v1/completions", json=BODY) as response:
            async for _line in response.aiter_lines():
                if 2 in lm.sequences:
                    break
        await until(lambda: inflight(running) == 1)
        seen = len(lm.sequences)
        assert (await whole).json()["usage"]["completion_tokens"] == 200
        assert sum(size == 2 for size in lm.sequences[seen:]) <= 1


def scope(**headers: str) -> dict[str, Any]:
    named = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
        "query_string": b"", "headers": [(name.encode(), value.encode()) for name, value in named.items()],
        "http_version": "1.1", "scheme": "http", "asgi": {"version": "3.0"},
    }  # fmt: skip


async def test_one_that_does_not_read_holds_up_nobody(tmp_path: Path) -> None:
    async with served(tmp_path) as (running, _, _):
        app = running.hosts["aggregator"].app
        stuck, left = asyncio.Event(), asyncio.Event()

        async def receive() -> dict[str, Any]:
            if stuck.is_set():
                await left.wait()
                return {"type": "http.disconnect"}
            stuck.set()
            return {"type": "http.request", "body": json.dumps(BODY | {"max_tokens": 200}).encode()}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        reader = asyncio.ensure_future(app(scope(), receive, send))
        made = await running.post("/v1/completions", BODY | {"stream": False})
        assert made["usage"]["completion_tokens"] == 200
        assert not reader.done()
        left.set()
        await asyncio.wait_for(reader, 10)
        assert inflight(running) == 0


@pytest.mark.parametrize("unread", [None, DONE], ids=["status", "end"])
async def test_one_that_does_not_read_is_let_go_of_when_its_time_is_over(
    tmp_path: Path, unread: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "READER_SECONDS", 0.1)
    async with served(tmp_path) as (running, _, _):
        bodies = [{"type": "http.request", "body": json.dumps(BODY | {"max_tokens": 3}).encode()}]

        async def receive() -> dict[str, Any]:
            if not bodies:
                await asyncio.Event().wait()
            return bodies.pop()

        async def send(message: Any) -> None:
            if message.get("body") == unread:
                await asyncio.Event().wait()

        app = running.hosts["aggregator"].app
        await asyncio.wait_for(app(scope(x_request_timeout="2"), receive, send), 20)
        assert inflight(running) == 0


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_the_time_of_a_request_ends_a_stream_with_an_event(tmp_path: Path) -> None:
    async with served(tmp_path) as (running, lm, _):
        headers = {"x-request-timeout": "0.4"}
        response = await running.client.post("/v1/completions", json=BODY, headers=headers)
        assert response.status_code == 200
        assert events(response.text)[-1]["error"]["code"] == "deadline_exceeded"
        lm.gate.clear()
        response = await running.client.post("/v1/completions", json=BODY, headers=headers)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("on_error", ["fail", "lm_only"])
async def test_a_datastore_that_dies_is_told_of(tmp_path: Path, on_error: str, monkeypatch: Any) -> None:
    async with served(tmp_path) as (running, _, core):
        datastore = core.aggregator._datastore
        search, calls = datastore.search, 0

        async def dying(request: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 3:
                raise Unavailable("no replica answers")
            return await search(request)

        monkeypatch.setattr(datastore, "search", dying)
        body = BODY | {"max_tokens": 8, "on_datastore_error": on_error}
        seen = events((await running.client.post("/v1/completions", json=body)).text)
        assert [chunk["domains"][0]["version"] for chunk in seen if "domains" in chunk] == ["v1"]
        if on_error == "fail":
            assert seen[3] == {
                "error": {
                    "message": "no replica answers", "type": "unavailable_error", "param": None, "code": "unavailable",
                }
            }  # fmt: skip
            calls = 3
            response = await running.client.post("/v1/completions", json=body)
            assert response.status_code == 503
        else:
            assert [chunk.get("degraded") for chunk in seen] == [None] * 3 + ["no replica answers"] * 5
            assert seen[-1]["choices"][0]["finish_reason"] == "length"
