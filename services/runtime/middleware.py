"""What happens to every HTTP request before and after its handler. Plain ASGI: streaming and cancelling pass through.

Before: request id, trace, deadline, API key, readiness, room, body size. After: X-Request-Id and Server-Timing headers,
metrics, one log line, the trace's span. A request whose caller hangs up is cancelled, so that queued work is dropped.
"""

import asyncio
import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from knnlm.errors import DeadlineExceeded, InvalidRequest, KnnlmError, TooLarge
from services.runtime import errors
from services.runtime.context import RequestContext, entered, new_id, seconds_allowed
from services.runtime.observability import event
from services.runtime.protobuf_routes import PROTOBUF, is_protobuf
from services.runtime.service import Admission, Received, Service
from services.runtime.tracing import Outcome

LOG = logging.getLogger(__name__)
PROBES = frozenset({"/livez", "/readyz", "/metrics"})  # no key, no log line
DESCRIPTIONS = frozenset({"/version", "/docs", "/openapi.json"})  # answered while loading
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
HUNG_UP = 499  # nginx's number for a caller that did not wait


class _CallerLeft(Exception):
    pass


class HttpMiddleware:
    """Wraps the FastAPI application of a service."""

    def __init__(self, app: ASGIApp, service: Service, admission: Admission) -> None:
        self.app = app
        self._settings = service.settings
        self._metrics = service.metrics
        self._admission = admission
        self._protobuf_routes = service.protobuf
        self._open = PROBES.union(service.public)
        self._always = self._open | DESCRIPTIONS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} connections are not served")  # so none can pass by the keys
        headers = Headers(scope=scope)
        started = time.monotonic()
        request, problem = self._call(headers, started)
        if scope["path"] not in PROBES:
            self._admission.tracing.begin(
                request, headers.get("traceparent"), ",".join(headers.getlist("tracestate")) or None
            )
        answer = _Answer(send, request, started)
        with entered(request):
            try:
                if problem is not None:
                    raise problem
                await self._pass(scope, receive, answer, request, headers)
            except _CallerLeft:
                pass
            except KnnlmError as err:
                await answer.error(err)
            except Exception:  # noqa: BLE001  the process edge
                event(LOG, "unhandled", logging.ERROR, path=scope["path"])
                await answer.error(errors.Internal("internal error; the log has it under the id in X-Request-Id"))
            finally:
                self._note(scope, request, answer, time.monotonic() - started)

    def _call(self, headers: Headers, started: float) -> tuple[RequestContext, KnnlmError | None]:
        """The request, and what is wrong with how it was asked for: to be told once it can be logged and answered."""
        seconds = limit = self._settings.request_timeout_s
        problem: KnnlmError | None = None
        try:
            seconds = seconds_allowed(headers.get("x-request-timeout"), limit)
        except InvalidRequest as err:
            problem = err
        return RequestContext(new_id(headers.get("x-request-id")), "http", deadline=started + seconds), problem

    async def _pass(
        self, scope: Scope, receive: Receive, answer: "_Answer", request: RequestContext, headers: Headers
    ) -> None:
        path = scope["path"]
        if path not in self._open:
            self._admission.authenticate(request, headers.get("authorization"))
        if path in self._always:
            await self._run(scope, b"", receive, answer)
            return
        with self._admission.receive() as received:
            body = await self._body(headers, receive, request, received)  # before the slot: a slow sender holds none
            with self._admission.admit():
                await self._run(scope, body, receive, answer, protobuf=is_protobuf(headers.get("content-type")))

    async def _body(self, headers: Headers, receive: Receive, request: RequestContext, received: Received) -> bytes:
        """All of it, refused as soon as it is known to be too large, whatever the headers promise, or has no room."""
        most = self._settings.max_body_bytes
        announced = headers.get("content-length", "0")
        too_large = TooLarge(f"the body has more than {most} bytes, the most this service takes (--max-body-bytes)")
        if announced.isdecimal() and int(announced) > most:
            self._metrics.rejected.labels("too_large").inc()
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(request.remaining()):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _CallerLeft
                    part = message.get("body", b"")
                    received.hold(len(part))
                    body += part
                    if len(body) > most:
                        self._metrics.rejected.labels("too_large").inc()
                        raise too_large
                    if not message.get("more_body", False):
                        received.complete()
                        return bytes(body)
        except TimeoutError as err:
            raise DeadlineExceeded("the request's time was over before its body had arrived") from err

    async def _run(
        self, scope: Scope, body: bytes, receive: Receive, answer: "_Answer", *, protobuf: bool = False
    ) -> None:
        """Answer a request whose body is already here, and stop when the caller hangs up."""
        gone = asyncio.Event()
        worker = asyncio.current_task()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            if not answer.complete and worker is not None:
                worker.cancel()

        watcher = asyncio.create_task(watch())
        try:
            if not (protobuf and await self._answer_protobuf(scope, body, answer)):
                await self.app(scope, _replay(body, gone), answer.send)
        except asyncio.CancelledError:
            if gone.is_set() and worker is not None and worker.uncancel() == 0:
                raise _CallerLeft from None
            raise
        finally:
            watcher.cancel()

    async def _answer_protobuf(self, scope: Scope, body: bytes, answer: "_Answer") -> bool:
        """Answer from a route that takes protobuf. False when there is none."""
        if scope["method"] != "POST":
            return False
        for route in self._protobuf_routes:
            parts = route.match(scope["path"])
            if parts is not None:
                scope["route"] = route
                await answer.message(await route.answer(parts, body))
                return True
        return False

    def _note(self, scope: Scope, request: RequestContext, answer: "_Answer", seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unrouted")  # the template: a bounded set of label values
        status = answer.status or HUNG_UP
        self._metrics.requests.labels("http", route, str(status)).inc()
        self._metrics.duration.labels("http", route).observe(seconds)
        if scope["path"] not in PROBES:
            fields = {"face": "http", "method": scope["method"], "route": route, "status": status}
            event(LOG, "request", **fields, seconds=seconds, **request.logged())
            self._admission.tracing.end(request, _outcome(scope["method"], route, status))


def _outcome(method: str, route: str, status: int) -> Outcome:
    attributes: dict[str, str | int] = {"http.route": route, "http.response.status_code": status}
    known = method if method in METHODS else "_OTHER"  # OpenTelemetry's word for it, and a bounded set of names
    return Outcome(f"{known} {route}", {"http.request.method": known, **attributes}, failed=status >= 500)


class _Answer:
    """The way back: adds headers to the first message, remembers what was sent."""

    def __init__(self, send: Send, request: RequestContext, started: float) -> None:
        self._send = send
        self._call = request
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

    async def message(self, body: bytes) -> None:
        """A protobuf message, whole."""
        headers = [(b"content-type", PROTOBUF.encode()), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def error(self, err: KnnlmError) -> None:
        """Answer with an error, unless an answer has begun: then all that is left is to end it short."""
        self._call.error = err.code
        if self.status:
            return
        # the connection stays open: uvicorn discards a body nobody read, closing would reset the sending caller
        response = JSONResponse(errors.body(err), errors.row(err).status, errors.headers(err))
        await response({"type": "http"}, _nothing, self.send)


def _replay(body: bytes, gone: asyncio.Event) -> Receive:
    """What the application receives: the body, and nothing more until the caller is gone."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if pending:
            return pending.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
