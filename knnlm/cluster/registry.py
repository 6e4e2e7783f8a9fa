"""What gateways write of a cluster's applications where all of them see it: what is deployed, and who holds it.

A gateway that does not renew its leases is gone, and what it held is nobody's. Nothing of Ray is imported here.
"""

import hashlib
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.layout import Checksums
from knnlm.datastore.manifest import Manifest
from knnlm.errors import DatastoreError, KnnlmError

__all__ = ["LEASE_SECONDS", "SCALE", "KeyValues", "Registry", "ShardOptions", "Spec"]

SPECS, LEASES = "application/", "lease/"  # prefixes of keys: the application; the application and who holds it
LEASE_SECONDS = 60.0  # a gateway that does not renew its lease for this long is gone


@dataclass(frozen=True)
class ShardOptions:
    """How shards are opened and how many replicas each has. index, resident, device, max_candidates, check: as in
    Searcher.open. min_replicas, max_replicas: per shard; where they differ, Serve adds replicas when one has had more
    than target_requests at a time for upscale_delay_s, and takes them away after fewer for downscale_delay_s. cpus:
    that Ray reserves for one. replicas_per_node: of one shard at most, None = any."""

    index: str | None = None
    resident: bool = False
    device: str = "cpu"
    max_candidates: int | None = None
    check: Checksums = "none"
    min_replicas: int = 1
    max_replicas: int = 1
    target_requests: float = 2.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    cpus: float = 1.0
    replicas_per_node: int | None = None

    @property
    def opening(self) -> dict[str, Any]:  # Any: of the fields' types
        """The options of Searcher.open."""
        return {name: value for name, value in asdict(self).items() if name not in SCALE}


SCALE = (
    "min_replicas", "max_replicas", "target_requests", "upscale_delay_s", "downscale_delay_s", "cpus",
    "replicas_per_node",
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """An application. path: the version's folder, the same on every node. sizes: bytes of each shard's files. content:
    the checksum of what shards answer from; another one makes Serve replace the replicas one by one."""

    path: str
    sizes: Sequence[int]
    content: str
    options: ShardOptions

    @classmethod
    def of(cls, path: Path, manifest: Manifest, options: ShardOptions) -> "Spec":
        parts = [Manifest.load(path / shard.name) for shard in manifest.shards] or [manifest]
        sizes = [sum(record.bytes for record in part.files.values()) for part in parts]
        answered_from = [manifest.content, [index.model_dump() for index in manifest.indexes], options.opening]
        content = hashlib.sha256(json.dumps(answered_from).encode()).hexdigest()
        return cls(str(path), sizes, content, options)

    @classmethod
    def parse(cls, text: bytes) -> "Spec":
        """The spec that `text` holds. Raises DatastoreError for what another version of this program wrote."""
        try:
            fields = json.loads(text)
            return cls(**{**fields, "options": ShardOptions(**fields["options"])})
        except (ValueError, TypeError, KeyError) as err:
            raise DatastoreError(f"this Ray cluster was used by another version of knnlm: {err}") from err

    def text(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @property
    def store(self) -> Path:
        return Path(self.path).parent.parent


class KeyValues(Protocol):
    """Keys and values that all processes of a cluster see. Its methods block, and raise as Ray does."""

    def get(self, key: str) -> bytes | None: ...
    def put(self, key: str, value: bytes) -> None: ...
    def delete(self, key: str) -> None: ...
    def keys(self, prefix: str) -> Sequence[str]: ...


class Registry:
    """All applications, and the leases of this process, which may hold one several times: a version is opened anew,
    beside the former opening, when its manifest changes. now: seconds since the epoch, which other machines compare."""

    def __init__(self, values: KeyValues, now: Callable[[], float] = time.time) -> None:
        self._values = values
        self._now = now
        self._me = uuid.uuid4().hex
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, name: str) -> None:
        """Hold the application once more; `renew` says so to the others."""
        with self._lock:
            self._held[name] += 1

    def give_up(self, name: str) -> bool:
        """Hold it once less; whether this process needs it no longer, and its lease may be withdrawn."""
        with self._lock:
            self._held[name] -= 1
            if self._held[name] > 0:
                return False
            del self._held[name]
            return True

    def withdraw(self, name: str) -> None:
        """Remove this process's lease, instead of letting it run out."""
        self._values.delete(self._key(name))

    def renew(self) -> None:
        """Write the leases of what this process holds."""
        with self._lock:
            held = list(self._held)
        for name in held:
            self._values.put(self._key(name), f"{self._now():.0f}".encode())

    def holders(self, name: str) -> int:
        """How many processes hold the application. Removes the leases of those that are gone."""
        count = 0
        for key in self._values.keys(f"{LEASES}{name}/"):
            renewed = self._values.get(key)
            if renewed is not None and self._now() - float(renewed) < LEASE_SECONDS:
                count += 1
            elif renewed is not None:
                self._values.delete(key)
        return count

    def spec(self, name: str) -> Spec | None:
        """What is deployed under the name. Raises DatastoreError as `Spec.parse`."""
        text = self._values.get(SPECS + name)
        return None if text is None else Spec.parse(text)

    def names(self) -> list[str]:
        """The applications that were deployed, in alphabetical order."""
        return sorted(key.removeprefix(SPECS) for key in self._values.keys(SPECS))

    def write(self, name: str, spec: Spec) -> None:
        self._values.put(SPECS + name, spec.text())

    def erase(self, name: str) -> None:
        self._values.delete(SPECS + name)

    def unneeded(self, store: Path) -> list[str]:
        """The applications of this store that no gateway holds and whose version is not current."""
        catalog, found = Catalog(store), []
        for name in self.names():
            domain, _, version = name.partition("@")
            with suppress(KnnlmError):  # a store that cannot be read does not say that it may go
                spec = self.spec(name)
                if spec is None or spec.store != store or self.holders(name):
                    continue
                if not (store / domain).is_dir() or catalog.current(domain) != version:
                    found.append(name)
        return found

    def _key(self, name: str) -> str:
        return f"{LEASES}{name}/{self._me}"
