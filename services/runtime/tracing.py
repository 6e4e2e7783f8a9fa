"""Traces: W3C trace context comes in and goes out with every call to another service, and spans go to a collector.

Without a collector the context is handed on as it came. With one, a request is a span of kind SERVER, its context is
what is handed on, and a thread that no request waits for sends it. Stages whose beginning is known (the queue, the work
after it, what a handler timed itself) are spans below it; of stages that are known by their duration alone, each is an
attribute knnlm.<stage>_s: a beginning is never made up. What cannot be sent is dropped.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from opentelemetry.context import Context
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import knnlm
from knnlm.errors import InvalidRequest
from services.runtime.context import RequestContext
from services.runtime.settings import HttpSettings, named

EXPORT_SECONDS = 3.0  # one attempt to reach the collector, and so about what shutting down may wait for it
PATH = "/v1/traces"
W3C = TraceContextTextMapPropagator()


@dataclass(frozen=True)
class Outcome:
    """How a request ended. name: of its span. attributes: of the face, as OpenTelemetry calls them. failed: by the
    service's fault.
    """

    name: str
    attributes: dict[str, str | int]
    failed: bool


class Tracing(Protocol):
    def begin(self, request: RequestContext, traceparent: str | None, tracestate: str | None) -> None:
        """Put on the request what its own calls carry, and the trace's id."""
        ...

    def end(self, request: RequestContext, outcome: Outcome) -> None:
        """Called once per request that was begun."""
        ...

    def close(self) -> None:
        """Send what is left. Blocks, at most some seconds."""
        ...


def make_tracing(service: str, settings: HttpSettings) -> Tracing:
    """Tracing that the settings ask for. Raises InvalidRequest when spans are to be sent and the SDK is missing."""
    if not settings.otlp_endpoint:
        return _Propagating()
    try:
        return _Recording(*_exporting_tracer(service, settings))
    except ModuleNotFoundError as err:
        if not (err.name or "").startswith("opentelemetry"):
            raise
        raise InvalidRequest(
            f"{named(settings, 'otlp_endpoint')} needs OpenTelemetry: pip install 'knnlm[tracing]'"
        ) from err


def _extract(traceparent: str | None, tracestate: str | None) -> Context:
    """The caller's trace context, empty when it is not valid W3C; never the surrounding one, which is nobody's."""
    given = {"traceparent": traceparent, "tracestate": tracestate}
    return W3C.extract({name: value for name, value in given.items() if value is not None}, Context())


def _carry(request: RequestContext, context: Context) -> None:
    carrier: dict[str, str] = {}
    W3C.inject(carrier, context)
    request.carried = tuple(carrier.items())
    request.trace_id = f"{get_current_span(context).get_span_context().trace_id:032x}"


class _Propagating:
    """No collector: the caller's context is handed on."""

    def begin(self, request: RequestContext, traceparent: str | None, tracestate: str | None) -> None:
        if traceparent is not None:
            context = _extract(traceparent, tracestate)
            if get_current_span(context).get_span_context().is_valid:
                _carry(request, context)

    def end(self, request: RequestContext, outcome: Outcome) -> None:
        pass

    def close(self) -> None:
        pass


def _exporting_tracer(service: str, settings: HttpSettings) -> tuple[Tracer, Callable[[], None]]:
    """A tracer whose spans go to the collector, and what sends those left. Raises ModuleNotFoundError."""
    # only where it is asked for: it loads requests and more
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    endpoint = settings.otlp_endpoint.rstrip("/")
    url = endpoint if endpoint.endswith(PATH) else endpoint + PATH
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.trace_sample_ratio)),
        resource=Resource.create({"service.name": f"knnlm-{service}", "service.version": knnlm.__version__}),
        shutdown_on_exit=False,  # the lifecycle does it, while the loop still runs
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url, timeout=EXPORT_SECONDS)))
    return provider.get_tracer("knnlm"), provider.shutdown


class _Recording:
    """Spans of one service. shut_down: sends those that are left."""

    def __init__(self, tracer: Tracer, shut_down: Callable[[], None]) -> None:
        self._tracer = tracer
        self.close = shut_down
        self._spans: dict[int, Span] = {}  # by the identity of the request in work

    def begin(self, request: RequestContext, traceparent: str | None, tracestate: str | None) -> None:
        parent = _extract(traceparent, tracestate)
        started = _wall(request, request.started)
        span = self._tracer.start_span("request", parent, kind=SpanKind.SERVER, start_time=started)
        _carry(request, set_span_in_context(span, Context()))
        self._spans[id(request)] = span

    def end(self, request: RequestContext, outcome: Outcome) -> None:
        span = self._spans.pop(id(request))
        if not span.is_recording():
            return
        below = set_span_in_context(span, Context())
        for stage in request.stages:
            child = self._tracer.start_span(stage.name, below, start_time=_wall(request, stage.started))
            child.end(_wall(request, stage.started + stage.seconds))
        span.update_name(outcome.name)
        span.set_attributes(_attributes(request, outcome))
        if outcome.failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(_wall(request, time.perf_counter()))


def _attributes(request: RequestContext, outcome: Outcome) -> Mapping[str, str | int | float]:
    known = {stage.name for stage in request.stages}
    durations = {f"knnlm.{stage}_s": seconds for stage, seconds in request.timings.items() if stage not in known}
    error = {} if request.error is None else {"error.type": request.error}
    return {**outcome.attributes, **error, "knnlm.request_id": request.id, **durations}


def _wall(request: RequestContext, moment: float) -> int:
    """A moment on the clock of time.perf_counter as nanoseconds of the calendar, by what both said at the beginning."""
    return request.began_ns + round(1e9 * (moment - request.started))
