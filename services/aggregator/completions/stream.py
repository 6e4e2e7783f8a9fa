"""Server-sent events: chunks as they come, each a line `data: JSON`, and `data: [DONE]` behind the last."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from knnlm.errors import DeadlineExceeded, KnnlmError
from services.runtime import errors
from services.runtime.context import RequestContext
from services.runtime.observability import event

LOG = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"
READER_SECONDS = 5.0  # seconds beyond the request's time that a reader who does not read has
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold back what is small
]


class EventStream(Response):
    """The answer begins with the first chunk: what goes wrong before is raised, and answered with its status. What goes
    wrong later is an event `{"error": ...}`. Chunks are let go of when the caller leaves."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], call: RequestContext) -> None:
        self.background = None
        self.status_code = 200
        self._chunks = chunks
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  ASGI
        async with aclosing(self._chunks) as chunks:
            first = await anext(chunks)
            try:
                async with asyncio.timeout(self._call.deadline - time.monotonic() + READER_SECONDS):
                    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                    await self._send_all(first, chunks, scope, send)
                    await send({"type": "http.response.body", "body": DONE})
            except TimeoutError:  # it does not read: nothing can be told to it
                self._call.error = DeadlineExceeded.code

    async def _send_all(self, first: bytes, chunks: AsyncGenerator[bytes, None], scope: Scope, send: Send) -> None:
        """Send the chunks, and what goes wrong between them as an event."""
        try:
            await _send(send, _event(first))
            async for chunk in chunks:
                await _send(send, _event(chunk))
        except KnnlmError as err:
            self._call.error = err.code
            await _send(send, _told(err))
        except Exception:  # noqa: BLE001  an edge: the answer has begun, and nobody behind this can say it
            event(LOG, "unhandled", logging.ERROR, path=scope["path"])
            self._call.error = errors.Internal.code
            await _send(send, _told(errors.Internal("internal error; the log has it under the id in X-Request-Id")))


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _event(chunk: bytes) -> bytes:
    return b"data: " + chunk + b"\n\n"


def _told(err: KnnlmError) -> bytes:
    return _event(json.dumps(errors.body(err), ensure_ascii=False).encode())
