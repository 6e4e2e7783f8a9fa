"""Callers who do not take their answer: their connections end, and those who take it slowly get all of it."""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from services.runtime.http_server import HttpServer, bind
from tests.services.certificates import Authority
from tests.services.echo import EchoSettings
from tests.services.waiting import until

BYTES = 32 << 20  # more than the system keeps for a connection
SECONDS = 3.0  # --request-timeout-s
TAKEN = 128 << 10  # bytes taken at once
BYTES_PER_SECOND = 320 << 10  # taken by a slow caller
ON_LINUX = pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no TCP_USER_TIMEOUT")


@asynccontextmanager
async def served(folder: Path | None = None) -> AsyncIterator[tuple[HttpServer, socket.socket]]:
    """A server, over TLS with a folder for its certificate, that has written BYTES to a caller who has taken none."""
    written = asyncio.Event()

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        length = str(BYTES).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": bytes(BYTES)})
        written.set()

    context = None
    if folder is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*Authority(folder).issue("server"))
    server = HttpServer(app, EchoSettings(request_timeout_s=SECONDS, drain_timeout_s=60.0), context)
    listener = bind("127.0.0.1", 0, "--port")
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    with await asyncio.to_thread(asked, listener.getsockname(), context is not None) as caller:
        await written.wait()
        assert server.server_state.connections
        yield server, caller
        server.end()
        async with asyncio.timeout(20):  # which is less than --drain-timeout-s
            await serving


def asked(address: tuple[str, int], tls: bool) -> socket.socket:
    """A connection over which an answer has been asked for. The server's certificate is not looked at."""
    caller = socket.create_connection(address)
    if tls:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        caller = context.wrap_socket(caller)
    caller.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    return caller


@ON_LINUX
@pytest.mark.parametrize("tls", [False, True])
async def test_a_caller_who_takes_nothing_of_its_answer_loses_its_connection(tls: bool, tmp_path: Path) -> None:
    async with served(tmp_path if tls else None) as (server, _):
        await until(lambda: not server.server_state.connections)


@ON_LINUX
async def test_a_caller_who_takes_nothing_holds_up_the_end_no_longer() -> None:
    async with served():
        pass  # `served` ends the server within its time


@pytest.mark.parametrize("tls", [False, True])
async def test_a_slow_caller_gets_all_of_its_answer(tls: bool, tmp_path: Path) -> None:
    def take(caller: socket.socket) -> int:
        taken, begun = 0, time.monotonic()
        with caller:
            while taken < BYTES:
                got = len(caller.recv(TAKEN))
                assert got, f"the connection ended after {taken} bytes"
                taken += got
                if time.monotonic() - begun < 1.5 * SECONDS:
                    time.sleep(got / BYTES_PER_SECOND)
        return taken

    async with served(tmp_path if tls else None) as (_, caller):
        assert await asyncio.to_thread(take, caller) >= BYTES
