"""What happens to every HTTP request before and after its handler. Plain ASGI: streaming and cancelling pass through.

Before: request id, deadline, API key, readiness, room, body size. After: X-Request-Id and Server-Timing headers,
metrics, one log line. A request whose caller hangs up is cancelled, so that queued work is dropped.
"""

import asyncio
import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from knnlm.errors import DeadlineExceeded, KnnlmError, TooLarge
from services.runtime import errors
from services.runtime.calls import Call, entered, new_id, seconds_allowed
from services.runtime.logs import event
from services.runtime.service import Door, Service

__all__ = ["PROBES", "Edge"]

LOG = logging.getLogger(__name__)
PROBES = frozenset({"/livez", "/readyz", "/metrics"})  # no key, no log line
DESCRIPTIONS = frozenset({"/version", "/docs", "/openapi.json"})  # answered while loading
HUNG_UP = 499  # nginx's number for a caller that did not wait


class _CallerLeft(Exception):
    pass


class Edge:
    """Wraps the FastAPI application of a service."""

    def __init__(self, app: ASGIApp, service: Service, door: Door) -> None:
        self.app = app
        self._settings = service.settings
        self._metrics = service.metrics
        self._door = door
        self._public = PROBES | service.public_paths
        self._always = self._public | DESCRIPTIONS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} connections are not served")  # so none can pass by the keys
        headers = Headers(scope=scope)
        started = time.monotonic()
        limit = self._settings.request_timeout_s
        call = Call(new_id(headers.get("x-request-id")), "http", deadline=started + limit)
        answer = _Answer(send, call, started)
        with entered(call):
            try:
                call.deadline = started + seconds_allowed(headers.get("x-request-timeout"), limit)
                with entered(call):  # again, with the deadline for clients of other services
                    await self._pass(scope, receive, answer, call)
            except _CallerLeft:
                pass
            except KnnlmError as err:
                await answer.error(err)
            except Exception:  # noqa: BLE001  the process edge
                event(LOG, "unhandled", logging.ERROR, path=scope["path"])
                await answer.error(errors.Internal("internal error; the log has it under the id in X-Request-Id"))
            finally:
                self._note(scope, call, answer, time.monotonic() - started)

    async def _pass(self, scope: Scope, receive: Receive, answer: "_Answer", call: Call) -> None:
        headers = Headers(scope=scope)
        path = scope["path"]
        if path not in self._public:
            self._door.authenticate(call, headers.get("authorization"))
        if path in self._always:
            await self._run(scope, b"", receive, answer)
            return
        with self._door.inside():
            body = await self._body(headers, receive, call)
            await self._run(scope, body, receive, answer)

    async def _body(self, headers: Headers, receive: Receive, call: Call) -> bytes:
        """All of it, refused as soon as it is known to be too large, whatever the headers promise."""
        most = self._settings.max_body_bytes
        announced = headers.get("content-length", "0")
        too_large = TooLarge(f"the body has more than {most} bytes, the most this service takes (--max-body-bytes)")
        if announced.isdecimal() and int(announced) > most:
            self._metrics.rejected.labels("too_large").inc()
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(call.remaining()):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _CallerLeft
                    body += message.get("body", b"")
                    if len(body) > most:
                        self._metrics.rejected.labels("too_large").inc()
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as err:
            raise DeadlineExceeded("the request's time was over before its body had arrived") from err

    async def _run(self, scope: Scope, body: bytes, receive: Receive, answer: "_Answer") -> None:
        """Call the application with a body that is already here, and cancel it when the caller hangs up."""
        gone = asyncio.Event()
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if pending:
                return pending.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        work = asyncio.ensure_future(self.app(scope, replay, answer.send))
        watcher = asyncio.ensure_future(watch())
        try:
            await asyncio.wait((work, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not answer.complete:
                raise _CallerLeft
            await work
        finally:
            unfinished = [task for task in (work, watcher) if task.cancel()]
            await asyncio.gather(*unfinished, return_exceptions=True)

    def _note(self, scope: Scope, call: Call, answer: "_Answer", seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unrouted")  # the template: a bounded set of label values
        status = answer.status or HUNG_UP
        self._metrics.requests.labels("http", route, str(status)).inc()
        self._metrics.duration.labels("http", route).observe(seconds)
        if scope["path"] not in PROBES:
            fields = {"face": "http", "method": scope["method"], "route": route, "status": status}
            event(LOG, "request", **fields, seconds=seconds, **call.logged())


class _Answer:
    """The way back: adds headers to the first message, remembers what was sent."""

    def __init__(self, send: Send, call: Call, started: float) -> None:
        self._send = send
        self._call = call
        self._started = started
        self.status = 0
        self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._call.id
            stages = {**self._call.timings, "total": time.monotonic() - self._started}
            headers["server-timing"] = ", ".join(f"{stage};dur={1000 * spent:.3f}" for stage, spent in stages.items())
        self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def error(self, err: KnnlmError) -> None:
        """Answer with an error, unless an answer has begun: then all that is left is to end it short."""
        if self.status:
            return
        # the connection stays open: uvicorn discards a body nobody read, closing would reset the sending caller
        response = JSONResponse(errors.body(err), errors.row(err).status, errors.headers(err))
        await response({"type": "http"}, _nothing, self.send)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
