"""Versions of domains as applications of Ray Serve: `<domain>@<version>`, one deployment per shard.

Ray places, restarts and scales the replicas of each shard. What is deployed, and which gateways need it, is written in
the cluster's own key-value store: any gateway may deploy, and what is there is used as it is. A gateway that is done
with a version deletes its application, unless another gateway holds it or the store says that the version is current.

All methods block. Nothing of Ray's is opened to the outside: no HTTP proxy of Serve is started.
"""

import hashlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.experimental import internal_kv
from ray.serve.exceptions import RayServeException

from knnlm.cluster.shard import ShardReplica
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.layout import Checksums
from knnlm.datastore.manifest import Manifest
from knnlm.errors import DatastoreError, KnnlmError, NotFound, Unavailable

NAMESPACE = "knnlm"
SPECS, LEASES = "application/", "lease/"  # prefixes of keys: the application; the application and who holds it
LEASE_SECONDS = 60.0  # a gateway that does not renew its lease for this long is gone
RENEW_SECONDS = 10.0
LOOK_SECONDS = 1.0
LOAD_SECONDS = 1800.0  # the longest that a version may take until every shard answers
MAX_ONGOING = 4  # calls that a replica is given at once: one is searched, others are unpacked or wait
HEALTH_PERIOD_SECONDS, HEALTH_TIMEOUT_SECONDS = 3.0, 15.0
LOG = logging.getLogger(__name__)

FAILURES = (RayError, RayServeException, ConnectionError)  # what Ray raises when a part of it does not answer


@dataclass(frozen=True)
class ShardOptions:
    """How shards are opened and how many replicas each has. index, resident, device, max_candidates, check: as in
    Searcher.open. min_replicas, max_replicas: per shard; where they differ, Serve adds replicas while one has more than
    target_requests at a time. cpus: that Ray reserves for one. replicas_per_node: of one shard at most, None = any."""

    index: str | None = None
    resident: bool = False
    device: str = "cpu"
    max_candidates: int | None = None
    check: Checksums = "none"
    min_replicas: int = 1
    max_replicas: int = 1
    target_requests: float = 2.0
    cpus: float = 1.0
    replicas_per_node: int | None = None

    @property
    def opening(self) -> dict[str, Any]:  # Any: of the fields' types
        """The options of Searcher.open."""
        return {name: value for name, value in asdict(self).items() if name not in SCALE}


SCALE = ("min_replicas", "max_replicas", "target_requests", "cpus", "replicas_per_node")


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
        fields = json.loads(text)
        return cls(**{**fields, "options": ShardOptions(**fields["options"])})

    def text(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def deployment(number: int) -> str:
    """The name of a shard's deployment."""
    return f"shard-{number}"


class Applications:
    """One process's view of a Ray cluster. address: auto, local or HOST:PORT, as ray.init takes it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._me = uuid.uuid4().hex
        self._held: dict[str, Spec] = {}
        self._replicas: Mapping[str, Mapping[str, int]] = {}  # by application and deployment, those that answer
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    def connect(self) -> None:
        """Raises Unavailable when no cluster answers. Further calls do nothing."""
        with self._lock:
            if self._watcher is not None:
                return
            for name in ("ray", "ray.serve"):
                logging.getLogger(name).setLevel(logging.WARNING)
            try:
                ray.init(
                    address=self._address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False,
                    ignore_reinit_error=True,
                )  # fmt: skip
                self._start_serve()
                self._look()
            except (*FAILURES, RuntimeError, ValueError) as err:
                raise Unavailable(f"no Ray cluster answers at {self._address}: {_first_line(err)}") from err
            self._watcher = threading.Thread(target=self._watch, name="applications", daemon=True)
            self._watcher.start()

    def close(self) -> None:
        """Leave the cluster; applications stay as they are."""
        self._ended.set()
        if self._watcher is not None:
            self._watcher.join()
            ray.shutdown()

    def hold(self, name: str, spec: Spec) -> Spec:
        """Deploy the application, unless it is there already, and wait until every shard has a replica. What is there
        keeps its number of replicas; of what was there before, a shard may have none.

        Raises DatastoreError with Ray's words when a shard cannot be opened, or for an application of another store.
        """
        self.connect()
        try:
            self._put_lease(name)
            known = self.spec(name)
            if known is not None and known.path != spec.path:
                raise DatastoreError(
                    f"application {name} on this Ray cluster serves {known.path}, not {spec.path}: give each store a "
                    "cluster, or other names to its domains"
                )
            if known is not None:
                scale = {option: getattr(known.options, option) for option in SCALE}
                spec = replace(spec, options=replace(spec.options, **scale))
            there = known == spec and name in self._look()
            if not there:
                self._deploy(name, spec)
            with self._lock:
                self._held[name] = spec
            if not there:
                self._wait(name, new=known is None)
        except BaseException as err:
            with self._lock:
                self._held.pop(name, None)
            if isinstance(err, FAILURES):
                raise Unavailable(f"the Ray cluster does not deploy {name}: {_first_line(err)}") from err
            raise
        return spec

    def release(self, name: str) -> None:
        """Hold it no longer, and delete what no gateway needs any more."""
        with self._lock:
            spec = self._held.pop(name, None)
        if spec is None:
            return
        with suppress(*FAILURES):  # a cluster that does not answer: its other gateways do it
            internal_kv._internal_kv_del(f"{LEASES}{name}/{self._me}", namespace=NAMESPACE)
            self._sweep(Path(spec.path).parent.parent)

    def spec(self, name: str) -> Spec | None:
        """What is deployed under the name."""
        text = internal_kv._internal_kv_get(SPECS + name, namespace=NAMESPACE)
        return None if text is None else Spec.parse(text)

    def names(self) -> list[str]:
        """The applications that were deployed here, in alphabetical order."""
        keys = internal_kv._internal_kv_list(SPECS, namespace=NAMESPACE)
        return sorted(key.decode().removeprefix(SPECS) for key in keys)

    def scale(self, name: str, least: int, most: int) -> Spec:
        """Change the bounds of the replicas of every shard, under load. Raises NotFound for what is not deployed."""
        spec = self.spec(name)
        if spec is None:
            known = ", ".join(self.names()) or "none"
            raise NotFound(f"no application {name} on this cluster; there are: {known}", param="domain")
        spec = replace(spec, options=replace(spec.options, min_replicas=least, max_replicas=most))
        self._deploy(name, spec)
        return spec

    def replicas(self, name: str) -> Mapping[str, int]:
        """How many replicas answer, by the names of deployments, as of the last second."""
        return self._replicas.get(name, {})

    def look(self) -> None:
        """Bring `replicas` up to date."""
        self._look()

    def _start_serve(self) -> None:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})

    def _deploy(self, name: str, spec: Spec) -> None:
        """The same of the same content changes nothing; other numbers of replicas leave the running ones alone."""
        internal_kv._internal_kv_put(SPECS + name, spec.text(), namespace=NAMESPACE)
        self._start_serve()  # or run_many would, with a proxy on every node
        target = serve.RunTarget(_graph(spec), name=name, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)

    def _wait(self, name: str, *, new: bool) -> None:
        """new: nobody used the application before, so that it is deleted when it does not come up."""
        until = time.monotonic() + LOAD_SECONDS
        while time.monotonic() < until and not self._ended.wait(LOOK_SECONDS / 4):
            status = serve.status().applications.get(name)
            if status is not None and status.status == "RUNNING":
                self._look()
                return
            if status is not None and status.status == "DEPLOY_FAILED":
                problems = [one.message for one in status.deployments.values() if one.message]
                if new:
                    self._delete(name)
                raise DatastoreError(f"{name} cannot be served by the cluster: {' '.join(problems) or status.message}")
        if new:
            self._delete(name)
        raise DatastoreError(
            f"{name} was not ready within {LOAD_SECONDS:g} s: has the cluster room for all its shards?"
        )

    def _watch(self) -> None:
        renewed = 0.0
        while not self._ended.wait(LOOK_SECONDS):
            try:
                found = self._look()
                with self._lock:
                    held = dict(self._held)
                if time.monotonic() - renewed > RENEW_SECONDS:
                    for name in held:
                        self._put_lease(name)
                    renewed = time.monotonic()
                for name in held.keys() - found.keys():  # Serve was shut down, or lost what it knew
                    LOG.warning("application %s is gone: deployed again", name)
                    self._deploy(name, held[name])
            except Exception:
                LOG.warning("the Ray cluster does not tell its state", exc_info=True)

    def _look(self) -> Mapping[str, Mapping[str, int]]:
        self._replicas = {
            name: {shard: one.replica_states.get("RUNNING", 0) for shard, one in status.deployments.items()}
            for name, status in serve.status().applications.items()
        }
        return self._replicas

    def _put_lease(self, name: str) -> None:
        now = f"{time.time():.0f}".encode()  # compared by other machines: on the calendar
        internal_kv._internal_kv_put(f"{LEASES}{name}/{self._me}", now, namespace=NAMESPACE)

    def gateways(self, name: str) -> int:
        """How many gateways hold the application."""
        keys = internal_kv._internal_kv_list(f"{LEASES}{name}/", namespace=NAMESPACE)
        renewed = [internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys]
        return sum(at is not None and time.time() - float(at) < LEASE_SECONDS for at in renewed)

    def _sweep(self, store: Path) -> None:
        """Delete the applications of this store that no gateway holds and whose version is not current."""
        catalog = Catalog(store)
        for name in self.names():
            spec = self.spec(name)
            domain, _, version = name.partition("@")
            if spec is None or Path(spec.path).parent.parent != store or self.gateways(name):
                continue
            with suppress(KnnlmError):  # a store that cannot be read does not say that it may go
                if not (store / domain).is_dir() or catalog.current(domain) != version:
                    self._delete(name)

    def _delete(self, name: str) -> None:
        internal_kv._internal_kv_del(SPECS + name, namespace=NAMESPACE)
        serve.delete(name, _blocking=False)


def _graph(spec: Spec) -> Any:  # Any: serve.Application
    """The deployments of all shards, those of the others bound to the first one: an application has one root."""

    def bound(number: int, others: Sequence[Any]) -> Any:
        one = serve.deployment(ShardReplica).options(name=deployment(number), **_serve_options(spec, number))
        one._version = spec.content[:16]  # the same content is no new version of the deployment
        return one.bind(spec.path, number, spec.options.opening, others)

    return bound(0, [bound(number, ()) for number in range(1, len(spec.sizes))])


def _serve_options(spec: Spec, number: int) -> dict[str, Any]:  # Any: as Serve takes them
    options = spec.options
    resources: dict[str, Any] = {"num_cpus": options.cpus}
    if options.device != "cpu":
        resources["num_gpus"] = 1
    if options.resident:
        resources["memory"] = spec.sizes[number]
    scale: dict[str, Any] = {"num_replicas": options.min_replicas}
    if options.min_replicas != options.max_replicas:
        bounds = {"min_replicas": options.min_replicas, "max_replicas": options.max_replicas}
        scale = {"autoscaling_config": {**bounds, "target_ongoing_requests": options.target_requests}}
    if options.replicas_per_node is not None:
        scale["max_replicas_per_node"] = options.replicas_per_node
    return {
        **scale,
        "ray_actor_options": resources,
        "max_ongoing_requests": MAX_ONGOING,
        "health_check_period_s": HEALTH_PERIOD_SECONDS,
        "health_check_timeout_s": HEALTH_TIMEOUT_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": 3,
    }


def _first_line(err: BaseException) -> str:
    return (str(err) or type(err).__name__).strip().splitlines()[0][:300]
