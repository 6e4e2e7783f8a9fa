"""Callers who do not take their answer: their connections end, and those who take it slowly get all of it."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.types import Receive, Scope, Send

from services.runtime import http_server
from services.runtime.http_server import HttpServer, bind
from tests.services.echo import EchoSettings
from tests.services.waiting import until

BYTES = 32 << 20  # more than the system keeps for a connection
SECONDS = 2.0  # --request-timeout-s


@asynccontextmanager
async def served(*, complete: bool) -> AsyncIterator[tuple[HttpServer, socket.socket]]:
    """A server, and a caller who has asked it for BYTES; whether the application says that these are all."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        length = str(BYTES).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        if complete:
            await send({"type": "http.response.body", "body": bytes(BYTES)})
        else:
            await send({"type": "http.response.body", "body": bytes(BYTES - 1), "more_body": True})
        written.set()

    written = asyncio.Event()
    server = HttpServer(app, EchoSettings(request_timeout_s=SECONDS, drain_timeout_s=60.0), None)
    listener = bind("127.0.0.1", 0, "--port")
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    with socket.create_connection(listener.getsockname()) as caller:
        caller.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(caller, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await written.wait()
        yield server, caller
        server.end()
        async with asyncio.timeout(20):
            await serving


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(http_server, "CLOSING_SECONDS", 0.2)


@pytest.mark.parametrize("complete", [True, False])
async def test_a_caller_who_takes_nothing_of_its_answer_loses_its_connection(complete: bool) -> None:
    async with served(complete=complete) as (server, _):
        await until(lambda: not server.server_state.connections)


async def test_a_caller_who_takes_nothing_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.services.runtime.test_unread.SECONDS", 3600.0)
    async with served(complete=True) as (server, _):
        assert server.server_state.connections  # `served` ends the server, which must not take its --drain-timeout-s


async def test_a_slow_caller_gets_all_of_its_answer() -> None:
    async with served(complete=True) as (_, caller):
        loop, taken = asyncio.get_running_loop(), 0
        for _ in range(25):  # longer than SECONDS
            taken += len(await loop.sock_recv(caller, 1 << 20))
            await asyncio.sleep(0.1)
        while taken < BYTES:
            taken += len(await loop.sock_recv(caller, 1 << 22))
        assert taken >= BYTES
