"""HTTP connections whose requests must begin in time and in measure.

uvicorn's protocol takes headers of any length, for any time, before anything of ours hears of the request: a caller
without a key could fill the memory, or hold connections for ever. From the first byte of a request, or from connecting,
to the end of its headers there are so many bytes and seconds; what comes after is bounded in edge.py.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["LARGEST_HEAD", "head_bounded"]

LARGEST_HEAD = 1 << 16  # bytes of request line and headers; what most servers take is less


def head_bounded(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, closing connections whose next request has no end of its headers after so many seconds."""

    class HeadBounded(HttpToolsProtocol):
        _in_head = True
        _head_bytes = 0
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
            super().connection_made(transport)
            self._timer = self.loop.call_later(seconds, transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._in_head and self._head_bytes > LARGEST_HEAD and not self.transport.is_closing():
                self.send_400_response(f"The request line and headers have more than {LARGEST_HEAD} bytes.")

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

    return HeadBounded
