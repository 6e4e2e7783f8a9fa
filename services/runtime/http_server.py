"""uvicorn for one service: a port that is bound here, no signals, and limits on request heads.

uvicorn's protocol takes headers of any length, for any time, before anything of ours hears of the request: a caller
without a key could fill the memory, or hold connections forever. From the first byte of a request, or from connecting,
to the end of its headers the bytes and seconds are bounded here; what comes after is bounded in middleware.py. A caller
who takes nothing of its answer is bounded here as well, by the system: what is written waits behind the application.
"""

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.runtime.settings import HttpSettings

TICK_SECONDS = 1.0
SETTLE_SECONDS = 0.01  # in which a socket that was accepted a moment ago is among the connections
MAX_USER_TIMEOUT_MS = 2**31 - 1  # what the system can keep
MAX_HEAD_BYTES = 1 << 16  # bytes of request line and headers; what most servers take is less


class StartupFailed(Exception):
    """One sentence that the operator sees before the process ends with 1."""


class HttpServer(uvicorn.Server):
    """Serves one application. tls: HTTPS with this context."""

    def __init__(self, app: ASGIApp, settings: HttpSettings, tls: ssl.SSLContext | None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                http=bounded_protocol(settings.request_timeout_s),
                timeout_keep_alive=settings.keep_alive_timeout_s,
                timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
                ssl_context_factory=None if tls is None else lambda _config, _default: tls,
            )
        )

        self._ending = asyncio.Event()

    def end(self) -> None:
        """Let `serve` stop accepting, answer what was accepted, and return."""
        self.should_exit = True
        self._ending.set()

    async def main_loop(self) -> None:
        """Run until `end`, which it hears at once; as uvicorn's loop it renews the Date header every second."""
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._ending.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down as uvicorn does, but at once where nobody is connected: it would wait a tenth of a second."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(SETTLE_SECONDS)
        if self.server_state.connections or self.server_state.tasks:
            await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are for the whole process, not for one of its faces."""
        yield


def bind(host: str, port: int, flag: str) -> socket.socket:
    """A listening socket. Raises StartupFailed, naming the flag, when the address cannot be had."""
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as err:
        raise StartupFailed(f"cannot listen on {host}:{port} ({flag}): {err.strerror or err}") from err
    # connections inherit it. Without, the second part of an answer waits 40 ms for the caller to acknowledge the first;
    # asyncio sets it for sockets of its own making only
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def bounded_protocol(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, closing connections whose next request's headers do not end within `seconds`, or, on
    Linux, whose caller acknowledges nothing of what is sent for as long."""

    class BoundedProtocol(HttpToolsProtocol):
        _in_head = True
        _head_bytes = 0
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
            super().connection_made(transport)
            self._timer = self.loop.call_later(seconds, transport.close)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux: ends a connection that acknowledges nothing (RFC 5482)
                milliseconds = max(1, min(round(1000 * seconds), MAX_USER_TIMEOUT_MS))
                connection = transport.get_extra_info("socket")
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The request line and headers have more than {MAX_HEAD_BYTES} bytes.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_head = True
            if self._timer is None:
                self._timer = self.loop.call_later(seconds, self.transport.close)

        def on_headers_complete(self) -> None:
            self._in_head = False
            self._head_bytes = 0
            self._stop_timer()
            super().on_headers_complete()

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return BoundedProtocol
