"""What a service counts, for Prometheus. One registry per service object; label values come from bounded sets only."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

import knnlm

__all__ = ["SECONDS", "Metrics"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


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
            buckets=SECONDS,
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
            "knnlm_queue_wait_seconds", "Time in the queue.", buckets=SECONDS, registry=self.registry
        )
        self.batch_rows = Histogram(
            "knnlm_batch_rows", "Items (rows or tokens) worked on at once.", buckets=_ROWS, registry=self.registry
        )

    def expose(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
