"""The services behind the aggregator: the clients made from its settings, and what is counted about their calls."""

import logging
from contextlib import AsyncExitStack

from prometheus_client import Counter, Gauge, Histogram

from knnlm.clients.call import Observer
from knnlm.clients.rpc import GrpcDatastore, GrpcLanguageModel
from knnlm.domains import NoDatastore
from knnlm.memories import KeyMemory
from knnlm.memory.served import open_mlp
from services.aggregator.settings import AggregatorSettings
from services.runtime.observability import LATENCY_BUCKETS, Metrics, event
from services.runtime.upstream import connection

LOG = logging.getLogger(__name__)


class UpstreamMetrics(Observer):
    """Counts how the clients' calls go. `degraded` counts answers without retrieval."""

    def __init__(self, metrics: Metrics) -> None:
        registry = metrics.registry
        self._seconds = Histogram(
            "knnlm_upstream_seconds", "Time of a call to another service, retries included.", ["service", "code"],
            buckets=LATENCY_BUCKETS, registry=registry,
        )  # fmt: skip
        self._retries = Counter(
            "knnlm_upstream_retries_total", "Calls to another service made again after a failure.", ["service"],
            registry=registry,
        )  # fmt: skip
        self._replicas = Gauge(
            "knnlm_upstream_replicas", "Replicas known, by state: up, down.", ["service", "state"], registry=registry
        )
        self._degraded = Counter(
            "knnlm_knn_degraded_total",
            "Answers by the LM alone because what was to be mixed was down.",
            registry=registry,
        )
        self._skipped = Counter(
            "knnlm_aggregator_searches_skipped_total",
            "Predictions that were not searched for, because the lambda rule gave retrieval no weight beforehand, or "
            "earlier neighbors led there.",
            registry=registry,
        )

    def called(self, service: str, code: str, seconds: float) -> None:
        self._seconds.labels(service, code).observe(seconds)

    def retried(self, service: str) -> None:
        self._retries.labels(service).inc()

    def replica(self, service: str, address: str, problem: str | None) -> None:
        if problem is None:
            event(LOG, "replica_up", upstream=service, address=address)
        else:
            event(LOG, "replica_down", logging.WARNING, upstream=service, address=address, reason=problem)

    def replicas(self, service: str, up: int, down: int) -> None:
        self._replicas.labels(service, "up").set(up)
        self._replicas.labels(service, "down").set(down)

    def degraded(self) -> None:
        self._degraded.inc()

    def skipped(self, searches: int) -> None:
        self._skipped.inc(searches)


class Upstream:
    """The clients; without a target for it, the datastore is a NoDatastore. memories: by their names. Raises
    InvalidRequest for invalid targets and unusable files, DatastoreCorrupt for an unusable memory."""

    def __init__(self, settings: AggregatorSettings, metrics: UpstreamMetrics) -> None:
        self.lm = GrpcLanguageModel(connection(settings, "lm", wait=settings.lm_wait_s, observer=metrics))
        self.datastore: GrpcDatastore | NoDatastore = NoDatastore()
        if settings.datastore_target:
            wait = settings.datastore_wait_s
            self.datastore = GrpcDatastore(connection(settings, "datastore", wait=wait, observer=metrics))
        self.memories: dict[str, GrpcLanguageModel | KeyMemory] = {}
        for name, target in settings.memory_targets.items():
            if ":" not in target:
                self.memories[name] = open_mlp(target)
                continue
            reached = connection(settings, "lm", wait=settings.memory_wait_s, observer=metrics, target=target)
            self.memories[name] = GrpcLanguageModel(reached, label=f"memory {name}")

    async def aclose(self) -> None:
        async with AsyncExitStack() as all_clients:
            for client in (self.lm, *self.memories.values()):
                if isinstance(client, GrpcLanguageModel):
                    all_clients.push_async_callback(client.aclose)
            if isinstance(self.datastore, GrpcDatastore):
                all_clients.push_async_callback(self.datastore.aclose)
