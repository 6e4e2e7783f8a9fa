"""A collector of traces for tests: takes what OpenTelemetry sends over HTTP, or refuses to."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

__all__ = ["Collector", "Sent", "collecting"]


@dataclass(frozen=True)
class Sent:
    """One span. kind: by its name in OTLP, without SPAN_KIND_. start, end: nanoseconds of the calendar."""

    service: str
    name: str
    kind: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    attributes: Mapping[str, object]
    failed: bool


class Collector:
    def __init__(self, url: str) -> None:
        self.url = url
        self.paths: list[str] = []
        self._spans: list[Sent] = []
        self._lock = threading.Lock()

    @property
    def spans(self) -> list[Sent]:
        with self._lock:
            return list(self._spans)

    def take(self, path: str, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        with self._lock:
            self.paths.append(path)
            for group in request.resource_spans:
                service = str(_attributes(group.resource.attributes)["service.name"])
                self._spans.extend(_sent(service, span) for scope in group.scope_spans for span in scope.spans)


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.path, self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Tests have their own words."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def _sent(service: str, span: Any) -> Sent:  # a message that has no types of ours
    return Sent(
        service=service,
        name=span.name,
        kind={1: "INTERNAL", 2: "SERVER", 3: "CLIENT"}[span.kind],
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        failed=span.status.code == 2,
    )


def _attributes(pairs: Any) -> dict[str, object]:  # as above
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
