"""What operators see: events in the log and metrics for Prometheus.

Events are one line each, key=value or JSON, with the ids of request and trace; never prompt text, never a secret. There
is one registry of metrics per service object; label values come from bounded sets only.
"""

import json
import logging
import math
import re
import sys
import time
from collections.abc import Mapping
from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

import knnlm
from services.runtime.context import ids

_FIELDS = "knnlm_fields"
_SUSPECT = re.compile(r'[ "=]|[^\x20-\x7e]')  # what may need quotes; letters beyond ASCII that print do not

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def event(logger: logging.Logger, name: str, level: int = logging.INFO, /, **fields: object) -> None:
    """Log one event with its fields; at level ERROR, with the traceback of the exception being handled."""
    traced = level == logging.ERROR and sys.exc_info()[0] is not None
    if logger.isEnabledFor(level):
        # made here: Logger.log looks through the stack for its caller, which no line shows
        record = logging.LogRecord(logger.name, level, "", 0, name, (), sys.exc_info() if traced else None)
        setattr(record, _FIELDS, fields)
        logger.handle(record)


def configure_logs(log_format: str, log_level: str) -> None:
    """Send every log line of the process to stderr in one form. Called once, by the process' main."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _KeyValue())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(log_level.upper())
    for chatty in ("uvicorn", "grpc", "httpx", "httpcore", "asyncio", "faiss", "opentelemetry", "urllib3"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


def _record(record: logging.LogRecord) -> dict[str, object]:
    stamp = f"{_second(int(record.created))}.{int(record.msecs):03d}Z"
    fields: Mapping[str, object] = getattr(record, _FIELDS, {})
    line: dict[str, object] = {"time": stamp, "level": record.levelname.lower(), "event": record.getMessage()}
    return {**line, **ids(), **fields}


@lru_cache(maxsize=8)  # many lines share a second
def _second(number: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(number))


class _KeyValue(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = " ".join(f"{key}={_plain(value)}" for key, value in _record(record).items())
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = _record(record)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps({key: _finite(value) for key, value in line.items()}, default=str)


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: they are text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if text and _SUSPECT.search(text) is None:
        return text
    return text if text and not any(c in ' "=' or not c.isprintable() for c in text) else json.dumps(text)


class Metrics:
    """What every service counts. A service adds its own with `registry=metrics.registry`."""

    def __init__(self, service: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Gauge("knnlm_build_info", "Always 1.", ["service", "version"], registry=self.registry)
        build.labels(service, knnlm.__version__).set(1)
        self.requests = Counter(
            "knnlm_requests_total",
            "Requests answered, by face, route template or rpc, and HTTP status or gRPC code.",
            ["face", "route", "code"],
            registry=self.registry,
        )
        self.duration = Histogram(
            "knnlm_request_duration_seconds",
            "Time from a request's arrival to the end of its answer.",
            ["face", "route"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.inflight = Gauge("knnlm_inflight_requests", "Requests in work.", registry=self.registry)
        self.receiving = Gauge(
            "knnlm_receiving_requests", "Requests whose body or message is still arriving.", registry=self.registry
        )
        self.inflight_bytes = Gauge(
            "knnlm_inflight_bytes", "Bytes of the requests that arrive or are in work.", registry=self.registry
        )
        self.rejected = Counter(
            "knnlm_rejected_total",
            "Requests refused or dropped: queue_full, bytes_full, deadline, disconnected, too_large.",
            ["reason"],
            registry=self.registry,
        )
        self.queue_items = Gauge("knnlm_queue_items", "Items (rows or tokens) held.", registry=self.registry)
        self.queue_wait = Histogram(
            "knnlm_queue_wait_seconds", "Time in the queue.", buckets=LATENCY_BUCKETS, registry=self.registry
        )
        self.batch_rows = Histogram(
            "knnlm_batch_rows",
            "Items (rows or tokens) worked on at once.",
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )

    def expose(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
