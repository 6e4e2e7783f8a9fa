"""Metrics of the versions that are opened and served: one series for each domain, whatever the number of versions."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

from prometheus_client import Counter, Gauge, Histogram

from knnlm.messages import Memory
from services.datastore.loaded import Loaded
from services.runtime.observability import Metrics

LOAD_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class VersionMetrics:
    """What the pool says of its versions."""

    def __init__(self, metrics: Metrics) -> None:
        self._places: dict[str, list[tuple[str, str]]] = {}  # by domain, labels of its memory
        self._loads = Counter(
            "knnlm_domain_loads_total", "Versions opened, by domain and result.", ["domain", "result"],
            registry=metrics.registry,
        )  # fmt: skip
        self._load_seconds = Histogram(
            "knnlm_domain_load_seconds", "From opening a version to having it warm.", ["domain"],
            buckets=LOAD_SECONDS, registry=metrics.registry,
        )  # fmt: skip
        self._entries = Gauge(
            "knnlm_domain_entries", "Entries served, and of which version.", ["domain", "version"],
            registry=metrics.registry,
        )  # fmt: skip
        self._replicas = Gauge(
            "knnlm_shard_replicas", "Replicas that answer, of each shard that a cluster serves.", ["domain", "shard"],
            registry=metrics.registry,
        )  # fmt: skip
        self._memory = Gauge(
            "knnlm_domain_memory_bytes", "Size of index and keys, and where they lie: resident, mapped or device.",
            ["domain", "part", "place"], registry=metrics.registry,
        )  # fmt: skip

    def opening(self, domain: str) -> AbstractContextManager[None]:
        """Measures how long what happens inside takes."""
        return self._load_seconds.labels(domain).time()

    def failed(self, domain: str) -> None:
        self._loads.labels(domain, "failed").inc()

    def serves(self, domain: str, loaded: Loaded) -> None:
        self._loads.labels(domain, "ok").inc()
        self._entries.labels(domain, loaded.version).set(loaded.searcher.info([]).entries)
        self._show_memory(domain, loaded.memory)

    def replaced(self, domain: str, version: str) -> None:
        """`version` does not answer any more; `serves` or `removed` follows."""
        self._entries.remove(domain, version)

    def removed(self, domain: str) -> None:
        self._show_memory(domain, None)

    def replicas(self, versions: Mapping[str, Loaded]) -> None:
        """Show those of all domains that are served."""
        self._replicas.clear()
        for domain, loaded in versions.items():
            for shard, count in loaded.replicas.items():
                self._replicas.labels(domain, str(shard)).set(count)

    def _show_memory(self, domain: str, memory: Memory | None) -> None:
        for labels in self._places.pop(domain, []):
            self._memory.remove(domain, *labels)
        if memory is None:
            return
        parts = (("index", memory.index, memory.index_bytes), ("keys", memory.keys, memory.keys_bytes))
        for part, place, size in parts:
            self._memory.labels(domain, part, place).set(size)
        self._places[domain] = [(part, place) for part, place, _ in parts]
