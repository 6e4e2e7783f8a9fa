"""The services behind the aggregator: the clients made from its settings, and what is counted about their calls."""

import logging
from contextlib import AsyncExitStack
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram
from pydantic import SecretStr

from knnlm.clients.rpc import GrpcDatastore, GrpcLanguageModel
from knnlm.clients.secrets import ApiKey, SecretFile
from knnlm.clients.tls import Tls
from services.aggregator.settings import AggregatorSettings
from services.runtime.observability import SECONDS, Metrics, event

__all__ = ["Upstream", "UpstreamMetrics"]

LOG = logging.getLogger(__name__)


class UpstreamMetrics:
    """An observer of the clients (knnlm.clients.observer). `degraded` is called by who answers without retrieval."""

    def __init__(self, metrics: Metrics) -> None:
        registry = metrics.registry
        self._seconds = Histogram(
            "knnlm_upstream_seconds", "Time of a call to another service, retries included.", ["service", "code"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._retries = Counter(
            "knnlm_upstream_retries_total", "Calls to another service made again after a failure.", ["service"],
            registry=registry,
        )  # fmt: skip
        self._hedges = Counter(
            "knnlm_hedges_total", "Calls made to a second replica as well, and whether that one was first.",
            ["service", "won"], registry=registry,
        )  # fmt: skip
        self._replicas = Gauge(
            "knnlm_upstream_replicas", "Replicas known, by state: up, down.", ["service", "state"], registry=registry
        )
        self._degraded = Counter(
            "knnlm_knn_degraded_total", "Answers by the LM alone because retrieval was down.", registry=registry
        )

    def called(self, service: str, code: str, seconds: float) -> None:
        self._seconds.labels(service, code).observe(seconds)

    def retried(self, service: str) -> None:
        self._retries.labels(service).inc()

    def hedged(self, service: str, won: bool) -> None:
        self._hedges.labels(service, "true" if won else "false").inc()

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


class Upstream:
    """The clients; datastore is None without a target. Raises InvalidRequest for targets and files that are none."""

    def __init__(self, settings: AggregatorSettings, metrics: UpstreamMetrics) -> None:
        self.lm = GrpcLanguageModel(
            settings.lm_target,
            api_key=_key(settings.lm_api_key, settings.lm_api_key_file),
            tls=Tls.of(settings.lm_tls_ca_file, settings.lm_tls_cert_file, settings.lm_tls_key_file),
            wait=settings.lm_wait_s,
            hedge=settings.hedge,
            observer=metrics,
        )
        self.datastore: GrpcDatastore | None = None
        if settings.datastore_target:
            self.datastore = GrpcDatastore(
                settings.datastore_target,
                api_key=_key(settings.datastore_api_key, settings.datastore_api_key_file),
                tls=Tls.of(
                    settings.datastore_tls_ca_file, settings.datastore_tls_cert_file, settings.datastore_tls_key_file
                ),
                wait=settings.datastore_wait_s,
                hedge=settings.hedge,
                observer=metrics,
            )

    async def aclose(self) -> None:
        async with AsyncExitStack() as both:
            both.push_async_callback(self.lm.aclose)
            if self.datastore is not None:
                both.push_async_callback(self.datastore.aclose)


def _key(secret: SecretStr | None, path: Path | None) -> ApiKey:
    if path is not None:
        return SecretFile(path)
    return None if secret is None else secret.get_secret_value()
