"""The gRPC face of any service: one interceptor for ids, keys, limits, errors and metrics; health and reflection.

Everything grpc.aio must be made and used in one event loop.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from knnlm.errors import DeadlineExceeded, InvalidRequest, KnnlmError, Overloaded
from knnlm.transport.context import HTTP2, PROBE
from services.runtime import errors
from services.runtime.context import RequestContext, entered, new_id
from services.runtime.observability import event
from services.runtime.protobuf_routes import parse
from services.runtime.service import Admission, Received, Service
from services.runtime.settings import GrpcSettings
from services.runtime.tracing import Outcome

LOG = logging.getLogger(__name__)
HEALTH = "/grpc.health.v1.Health/"  # public, as the probes of HTTP are
SPARE_RPCS = 1024  # health watches, and calls that are refused
PROBE_RECEIVE_SECONDS = 1.0  # probes of other services must never wait for uploads
FAILURES = frozenset(  # the service's fault, as OpenTelemetry has it
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)

# grpc.aio is generic over message classes that are known to generated code only
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Answer: TypeAlias = Callable[[Any, Any], Any]


class RpcServer:
    """A grpc.aio server over the rpcs of one service; NOT_SERVING until told otherwise."""

    def __init__(self, service: Service, admission: Admission) -> None:
        settings = service.settings
        if not isinstance(settings, GrpcSettings):
            raise TypeError(f"{type(settings).__name__} has no gRPC port: derive it from GrpcSettings")
        self._server = grpc.aio.server(
            interceptors=[_Interceptor(service, admission)],
            options=[
                ("grpc.max_send_message_length", settings.grpc_max_message_bytes),
                ("grpc.max_receive_message_length", settings.grpc_max_message_bytes),
                *HTTP2,
                ("grpc.so_reuseport", 0),  # a second process on the port must fail, not share it
                # a caller whose machine is gone is noticed, and what it asked for is dropped
                ("grpc.keepalive_time_ms", 15_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),  # our clients ping every 10 s
                ("grpc.http2.max_ping_strikes", 0),  # pings pile up while the process is held up, and come at once
                # clients with round_robin find new replicas only when a connection ends
                ("grpc.max_connection_age_ms", round(1000 * settings.grpc_max_connection_age_s)),
                ("grpc.max_connection_age_grace_ms", round(1000 * settings.request_timeout_s)),
            ],
            # the last fence, before any code of ours: health watches count as well, one per client
            maximum_concurrent_rpcs=2 * settings.max_concurrent_requests + SPARE_RPCS,
        )
        self._names = [rpc.name for rpc in service.rpc]
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for rpc in service.rpc:
            rpc.register(self._server)
        reflection.enable_server_reflection((*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
        """Listen, over TLS when there are credentials; the port it got. Raises RuntimeError when it cannot."""
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        where = address(host, port)
        if credentials is None:
            bound = self._server.add_insecure_port(where)
        else:
            bound = self._server.add_secure_port(where, credentials)
        await self._server.start()
        return bound

    async def serving(self) -> None:
        await self._set(health_pb2.HealthCheckResponse.SERVING)

    async def draining(self) -> None:
        """NOT_SERVING from here on."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Refuse new calls; give running ones `grace` seconds."""
        await self._server.stop(grace)

    async def _set(self, status: int) -> None:
        for name in ("", *self._names):
            await self._health.set(name, status)


class _ReceiveSlots:
    """Slots in which messages arrive. A message has no size before it is there: the slots are as many as would fit into
    memory if every message were the largest.

    A slot is held until the message is there, or for ever if nobody else wants it. While calls wait, each slot is
    taken away early enough for all that wait to have theirs within `seconds`: a caller that sends nothing delays the
    others by no more than that.
    """

    def __init__(self, slots: int, seconds: float) -> None:
        self._slots = slots
        self._seconds = seconds
        self._free = asyncio.Semaphore(slots)
        self._waiting = 0
        self._holders: dict[asyncio.Timeout, tuple[float, float]] = {}  # to when they began and must end

    async def receive(self, messages: AsyncIterator[bytes], seconds: float) -> bytes | None:
        """The next message, None when there is none. Raises Overloaded when its slot is taken away, DeadlineExceeded
        after `seconds`.
        """
        now = asyncio.get_running_loop().time
        deadline = now() + seconds
        limit = asyncio.timeout_at(deadline)
        try:
            async with limit:
                await self._wait_for_slot()
                self._holders[limit] = now(), deadline
                try:
                    self._hurry()
                    return await anext(messages, None)
                finally:
                    del self._holders[limit]
                    self._free.release()
        except TimeoutError as err:
            if limit.when() != deadline:
                raise Overloaded("no message came, and other calls wait to send theirs") from err
            raise DeadlineExceeded("the request's time was over before its message had arrived") from err

    async def _wait_for_slot(self) -> None:
        self._waiting += 1
        try:
            self._hurry()
            await self._free.acquire()
        finally:
            self._waiting -= 1

    def _hurry(self) -> None:
        """Shorten what holders have left, when others wait."""
        if self._waiting == 0 or not self._free.locked():
            return
        share = self._seconds / math.ceil(self._waiting / self._slots)
        for limit, (since, deadline) in self._holders.items():
            if not limit.expired():
                limit.reschedule(min(since + share, deadline))


class _Interceptor(grpc.aio.ServerInterceptor):
    def __init__(self, service: Service, admission: Admission) -> None:
        self._admission = admission
        self._metrics = service.metrics
        self._limit = service.settings.request_timeout_s
        settings = service.settings
        if not isinstance(settings, GrpcSettings):
            raise TypeError(f"{type(settings).__name__} has no gRPC port: derive it from GrpcSettings")
        slots = max(1, settings.max_inflight_bytes // settings.grpc_max_message_bytes)
        seconds = settings.grpc_receive_timeout_s
        self._slots = _ReceiveSlots(slots, seconds)
        self._probe_slots = _ReceiveSlots(slots, min(seconds, PROBE_RECEIVE_SECONDS))
        self._known: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        method = str(handler_call_details.method)
        known = self._known.get(method)  # the handler of a method never changes
        if known is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None or method.startswith(HEALTH):  # None: no such rpc, gRPC answers UNIMPLEMENTED
            return handler
        self._known[method] = guarded = self._guarded(handler, method)
        return guarded

    def _guarded(self, handler: Handler, method: str) -> Handler:
        """Check, receive, parse, call, and turn every failure into a status; for each of gRPC's four kinds of methods.

        To gRPC it is a handler that takes a stream, which on the wire is the same: a message is received when it is
        asked for, and not before the caller has shown a key and the service has room.
        """
        # typed for the synchronous server; exactly one of them is there
        kinds = (handler.unary_unary, handler.stream_unary, handler.unary_stream, handler.stream_stream)
        answer = cast("Answer", next(kind for kind in kinds if kind is not None))

        async def guarded(messages: AsyncIterator[bytes], context: Context) -> Any:
            started = time.monotonic()
            given = _metadata(context)
            left = cast("float | None", context.time_remaining())  # the stubs forget calls without a deadline
            seconds = self._limit if left is None else min(left, self._limit)
            call = RequestContext(new_id(given.get("x-request-id")), "grpc", started + seconds, probe=PROBE in given)
            self._admission.tracing.begin(call, given.get("traceparent"), given.get("tracestate"))
            context.set_trailing_metadata((("x-request-id", call.id),))
            code = grpc.StatusCode.CANCELLED
            with entered(call):
                try:
                    self._admission.authenticate(call, given.get("authorization"))
                    with self._admission.receive() as received:
                        if handler.request_streaming:
                            request: Any = self._stream(messages, handler, call, received)
                        elif (request := await self._message(messages, handler, call, received)) is None:
                            raise InvalidRequest("the call ended without a message, expected one")
                        with self._admission.admit():
                            result = answer(request, context)
                            if handler.response_streaming:
                                await _send_all(result, context, call)
                            else:
                                result = await result
                    code = grpc.StatusCode.OK
                    return None if handler.response_streaming else result
                except asyncio.CancelledError:
                    raise
                except KnnlmError as err:
                    code, call.error = errors.row(err).grpc, err.code
                    return await _abort(context, call, err)
                except Exception:  # noqa: BLE001  the process edge
                    event(LOG, "unhandled", logging.ERROR, route=method)
                    code, call.error = grpc.StatusCode.INTERNAL, errors.Internal.code
                    return await _abort(context, call, errors.Internal("internal error; see the log of the service"))
                finally:
                    # at the loop's next turn: the answer need not wait for it
                    asyncio.get_running_loop().call_soon(self._note, method, code, call, time.monotonic() - started)

        streams = handler.response_streaming
        made = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        return made(guarded, request_deserializer=None, response_serializer=handler.response_serializer)

    async def _message(
        self, messages: AsyncIterator[bytes], handler: Handler, call: RequestContext, received: Received
    ) -> Any:
        """The caller's next message, parsed; None when it has sent all. Raises DeadlineExceeded, Overloaded,
        InvalidRequest.
        """
        slots = self._probe_slots if call.probe else self._slots
        raw = await slots.receive(messages, call.remaining())
        received.complete()
        if raw is None:
            return None
        received.hold(len(raw))
        decode = handler.request_deserializer
        return raw if decode is None else parse(raw, decode)

    async def _stream(
        self, messages: AsyncIterator[bytes], handler: Handler, call: RequestContext, received: Received
    ) -> AsyncIterator[Any]:
        while (message := await self._message(messages, handler, call, received)) is not None:
            yield message

    def _note(self, method: str, code: grpc.StatusCode, call: RequestContext, seconds: float) -> None:
        self._metrics.requests.labels("grpc", method, code.name).inc()
        self._metrics.duration.labels("grpc", method).observe(seconds)
        level = logging.DEBUG if call.probe else logging.INFO
        event(LOG, "request", level, face="grpc", route=method, status=code.name, seconds=seconds, **call.logged())
        self._admission.tracing.end(call, _outcome(method, code))


async def _send_all(replies: AsyncIterator[Any], context: Context, call: RequestContext) -> None:
    """Send what an async generator gives. Raises DeadlineExceeded when the call's time is over before its end."""
    try:
        async with asyncio.timeout(call.remaining()), aclosing(replies):  # type: ignore[type-var]
            async for reply in replies:
                await context.write(reply)
    except TimeoutError as err:
        raise DeadlineExceeded("the request's time was over before the end of its answer") from err


def _outcome(method: str, code: grpc.StatusCode) -> Outcome:
    service, _, name = method.strip("/").partition("/")
    number: int = code.value[0]
    attributes: dict[str, str | int] = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
    return Outcome(method.strip("/"), {**attributes, "rpc.grpc.status_code": number}, failed=code in FAILURES)


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _metadata(context: Context) -> dict[str, str]:
    pairs = context.invocation_metadata() or ()
    return {key: value for key, value in pairs if isinstance(value, str)}


async def _abort(context: Context, call: RequestContext, err: KnnlmError) -> None:
    trailing = (("x-request-id", call.id), *errors.metadata(err))
    await context.abort(errors.row(err).grpc, err.message, trailing)
