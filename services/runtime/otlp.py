"""Spans of one service, sent to an OpenTelemetry collector by a thread that no request waits for.

A request is a span of kind SERVER. Stages whose beginning is known (the queue, the work after it, what a handler timed
itself) are spans below it; of stages that are known by their duration alone, each is an attribute knnlm.<stage>_s: a
beginning is never made up. What cannot be sent is dropped.
"""

import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import knnlm
from services.runtime.calls import Call
from services.runtime.traces import Outcome

__all__ = ["Recording"]

EXPORT_SECONDS = 3.0  # one attempt to reach the collector, and so about what shutting down may wait for it
PATH = "/v1/traces"


class Recording:
    """Keeps runtime.traces.Tracing. endpoint: URL of the collector, or of where it takes traces."""

    def __init__(self, service: str, endpoint: str, ratio: float) -> None:
        url = endpoint if endpoint.rstrip("/").endswith(PATH) else endpoint.rstrip("/") + PATH
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            resource=Resource.create({"service.name": f"knnlm-{service}", "service.version": knnlm.__version__}),
            shutdown_on_exit=False,  # the lifecycle does it, while the loop still runs
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url, timeout=EXPORT_SECONDS)))
        self._tracer = self._provider.get_tracer("knnlm")
        self._format = TraceContextTextMapPropagator()
        self._spans: dict[int, Span] = {}  # by the identity of the call in work

    def begin(self, call: Call, traceparent: str | None, tracestate: str | None) -> None:
        given = {"traceparent": traceparent, "tracestate": tracestate}
        carrier = {name: value for name, value in given.items() if value is not None}
        parent = self._format.extract(carrier, Context())  # never the surrounding context: it is nobody's
        span = self._tracer.start_span("request", parent, kind=SpanKind.SERVER, start_time=_wall(call, call.started))
        carrier = {}
        self._format.inject(carrier, set_span_in_context(span, Context()))
        call.carried = tuple(carrier.items())
        call.trace_id = f"{span.get_span_context().trace_id:032x}"
        self._spans[id(call)] = span

    def end(self, call: Call, outcome: Outcome) -> None:
        span = self._spans.pop(id(call))
        if not span.is_recording():
            return
        below = set_span_in_context(span, Context())
        for stage in call.stages:
            child = self._tracer.start_span(stage.name, below, start_time=_wall(call, stage.started))
            child.end(_wall(call, stage.started + stage.seconds))
        span.update_name(outcome.name)
        span.set_attributes(_attributes(call, outcome))
        if outcome.failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(_wall(call, time.perf_counter()))

    def close(self) -> None:
        self._provider.shutdown()


def _attributes(call: Call, outcome: Outcome) -> Mapping[str, str | int | float]:
    known = {stage.name for stage in call.stages}
    durations = {f"knnlm.{stage}_s": seconds for stage, seconds in call.timings.items() if stage not in known}
    error = {} if call.error is None else {"error.type": call.error}
    return {**outcome.attributes, **error, "knnlm.request_id": call.id, **durations}


def _wall(call: Call, moment: float) -> int:
    """A moment on the clock of time.perf_counter as nanoseconds of the calendar, by what both said at the beginning."""
    return call.began_ns + round(1e9 * (moment - call.started))
