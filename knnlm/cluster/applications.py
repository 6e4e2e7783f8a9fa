"""Versions of domains as applications of Ray Serve: `<domain>@<version>`, one deployment per shard.

Ray places, restarts and scales the replicas of each shard. What is deployed, and which gateways need it, is written in
the cluster's own key-value store: any gateway may deploy, and what is there is used as it is. Gateways delete the
applications that none of them holds any more (registry.py), unless the store says that the version is current.

All methods block. No HTTP proxy of Serve is started. Replicas listen on every interface for one another: see
docs/scale.md.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.experimental import internal_kv
from ray.serve.exceptions import RayServeException

from knnlm.cluster.connection import NAMESPACE, connect, first_line
from knnlm.cluster.registry import SCALE, Registry, Spec
from knnlm.cluster.shard import ShardReplica
from knnlm.errors import DatastoreError, NotFound, Unavailable

RENEW_SECONDS = 10.0  # between two renewals of leases
SWEEP_SECONDS = 60.0  # between two looks for applications that no gateway holds
STATUS_SECONDS = 1.0  # between two readings of what Serve says of all applications
LOAD_SECONDS = 1800.0  # the longest that a version may take until every shard answers
MAX_CALLS_PER_REPLICA = 4  # at once: one is searched, others are unpacked or wait
LOOK_BACK_SECONDS = 30.0  # over which Serve averages the requests of a replica, at most
HEALTH_PERIOD_SECONDS, HEALTH_TIMEOUT_SECONDS = 3.0, 15.0
LOG = logging.getLogger(__name__)

FAILURES = (RayError, RayServeException, ConnectionError)  # what Ray raises when a part of it does not answer


def deployment(number: int) -> str:
    """The name of a shard's deployment."""
    return f"shard-{number}"


class Applications:
    """One process's view of a Ray cluster. address: auto, local, HOST:PORT or ray://HOST:PORT. Call
    knnlm.cluster.connection.configure before this module is imported, which imports Ray."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.registry = Registry(_RayValues())
        self._held: dict[str, Spec] = {}  # what is deployed again should it vanish
        self._replicas: Mapping[str, Mapping[str, int]] = {}  # by application and deployment, those that answer
        self._lock = threading.Lock()
        self._deploying = threading.Lock()  # Serve's own deploying is not made for several threads
        # by application, while it is held
        self._holding: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._leaving = threading.Event()
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    def connect(self) -> None:
        """Connect to the cluster; further calls do nothing. Raises Unavailable when none answers."""
        with self._lock:
            if self._watcher is not None:
                return
            for name in ("ray", "ray.serve"):
                logging.getLogger(name).setLevel(logging.WARNING)
            connect(self._address, configure_logging=False, ignore_reinit_error=True)
            try:
                self._look()
            except (*FAILURES, RuntimeError, ValueError) as err:
                raise Unavailable(f"no Ray cluster answers at {self._address}: {first_line(err)}") from err
            self._watcher = threading.Thread(target=self._watch, name="applications", daemon=True)
            self._watcher.start()

    def close(self) -> None:
        """Leave the cluster; applications stay as they are."""
        self.leave()
        self._ended.set()
        if self._watcher is not None:
            self._watcher.join()
            ray.shutdown()

    def leave(self) -> None:
        """Wait no longer for what is being deployed: `hold` raises Unavailable."""
        self._leaving.set()

    def hold(self, name: str, spec: Spec) -> Spec:
        """Deploy the application, unless it is there already, and wait until every shard has a replica. What is there
        keeps its number of replicas; of what was there before, a shard may have none. `release` once for every call.

        Raises DatastoreError with Ray's words when a shard cannot be opened, or for an application of another store;
        what others use of it stays then.
        """
        self.connect()
        self.registry.take(name)
        try:
            self.registry.renew()  # before looking at what is there, or it might be deleted meanwhile
            with self._lock:
                holding = self._holding[name]
            with holding:
                return self._deployed(name, spec)
        except BaseException as err:
            if self.registry.give_up(name):
                with self._lock:
                    self._held.pop(name, None)
                with suppress(*FAILURES):  # it runs out
                    self.registry.withdraw(name)
            if isinstance(err, FAILURES):
                raise Unavailable(f"the Ray cluster does not deploy {name}: {first_line(err)}") from err
            raise

    def _deployed(self, name: str, spec: Spec) -> Spec:
        known = self.registry.spec(name)
        if known is not None and known.path != spec.path:
            raise DatastoreError(
                f"application {name} on this Ray cluster serves {known.path}, not {spec.path}: give each store a "
                "cluster, or other names to its domains"
            )
        if known is not None:
            scale = {option: getattr(known.options, option) for option in SCALE}
            spec = replace(spec, options=replace(spec.options, **scale))
        status = serve.status().applications.get(name)
        if known != spec or status is None or status.status == "DEPLOY_FAILED":
            self._deploy(name, spec)
        with self._lock:
            former = self._held.get(name)
            self._held[name] = spec
        try:
            self._wait(name, spec, known)
        except BaseException:
            with self._lock:
                if former is None:
                    del self._held[name]
                else:
                    self._held[name] = former
            raise
        return spec

    def release(self, name: str) -> None:
        """Hold it no longer, and delete what no gateway needs any more."""
        if not self.registry.give_up(name):
            return
        with self._lock:
            spec = self._held.pop(name)
        with suppress(*FAILURES):  # a cluster that does not answer: its other gateways do it
            self.registry.withdraw(name)
            self._sweep(spec.store)

    def scale(self, name: str, least: int, most: int) -> Spec:
        """Change the bounds of the replicas of every shard, under load. Raises NotFound for what is not deployed."""
        spec = self.registry.spec(name)
        if spec is None:
            known = ", ".join(self.registry.names()) or "none"
            raise NotFound(f"no application {name} on this cluster; there are: {known}", param="domain")
        spec = replace(spec, options=replace(spec.options, min_replicas=least, max_replicas=most))
        self._deploy(name, spec)
        return spec

    def replicas(self, name: str) -> Mapping[str, int]:
        """How many replicas answer, by the names of deployments, as of the last second."""
        return self._replicas.get(name, {})

    def _deploy(self, name: str, spec: Spec) -> None:
        """Register the application and deploy it. Equal content, or other bounds, restarts no replica. Raises
        DatastoreError for options that Serve refuses; then what was registered before stays."""
        with self._deploying:
            former = self.registry.spec(name)
            self.registry.write(name, spec)  # first: what Serve has and is not registered would be deployed again
            try:
                # run_many would start it with proxies
                serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
                target = serve.RunTarget(_graph(spec), name=name, route_prefix=None)
                serve.run_many([target], wait_for_applications_running=False)
            except (ValueError, TypeError) as err:
                if former is None:
                    self.registry.erase(name)
                else:
                    self.registry.write(name, former)
                raise DatastoreError(f"Ray Serve does not take {name} so: {first_line(err)}") from err

    def _wait(self, name: str, spec: Spec, known: Spec | None) -> None:
        """Wait until every shard answers as `spec` says. known: what was deployed before; it is deployed again when
        another one fails. What fails and is nobody else's is deleted, or Serve would not try it again."""
        until = time.monotonic() + LOAD_SECONDS
        problem = f"{name} was not ready within {LOAD_SECONDS:g} s: has the cluster room for all its shards?"
        while time.monotonic() < until:
            status = serve.status().applications.get(name)
            if status is not None and _is_ready(status, spec, known):
                self._look()
                return
            if status is not None and status.status == "DEPLOY_FAILED":
                problems = [one.message for one in status.deployments.values() if one.message]
                problem = f"{name} cannot be served by the cluster: {' '.join(problems) or status.message}"
                break
            if self._leaving.wait(STATUS_SECONDS / 4):
                raise Unavailable(f"{name} is still being deployed; this gateway is shutting down")
        if known is not None and known.content != spec.content:
            self._deploy(name, known)
        elif self.registry.holders(name) == 1:
            self._delete(name)
        raise DatastoreError(problem)

    def _watch(self) -> None:
        renewed = swept = time.monotonic()
        told = False  # one outage is one warning
        while not self._ended.wait(STATUS_SECONDS):
            try:
                found = self._look()
                with self._lock:
                    held = dict(self._held)
                if time.monotonic() - renewed > RENEW_SECONDS:
                    renewed = time.monotonic()
                    self.registry.renew()
                if time.monotonic() - swept > SWEEP_SECONDS:  # what gateways that died had held
                    swept = time.monotonic()
                    for store in {spec.store for spec in held.values()}:
                        self._sweep(store)
                for name in held.keys() - found.keys():  # Serve was shut down, or lost what it knew
                    LOG.warning("application %s is gone: deployed again", name)
                    self._deploy(name, self.registry.spec(name) or held[name])  # its bounds may have been changed
                told = False
            except Exception:  # the thread's edge: Ray says in many ways that it is away
                if not told:
                    LOG.warning("the state of the Ray cluster cannot be read", exc_info=True)
                told = True

    def _look(self) -> Mapping[str, Mapping[str, int]]:
        self._replicas = {
            name: {shard: one.replica_states.get("RUNNING", 0) for shard, one in status.deployments.items()}
            for name, status in serve.status().applications.items()
        }
        return self._replicas

    def _sweep(self, store: Path) -> None:
        """Delete the applications of this store that nobody needs."""
        for name in self.registry.unneeded(store):
            self._delete(name)

    def _delete(self, name: str) -> None:
        self.registry.erase(name)
        serve.delete(name, _blocking=False)


class _RayValues:
    """The key-value store of Ray's head: KeyValues."""

    def get(self, key: str) -> bytes | None:
        value: bytes | None = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
        return value

    def put(self, key: str, value: bytes) -> None:
        internal_kv._internal_kv_put(key, value, namespace=NAMESPACE)

    def delete(self, key: str) -> None:
        internal_kv._internal_kv_del(key, namespace=NAMESPACE)

    def keys(self, prefix: str) -> list[str]:
        return [key.decode() for key in internal_kv._internal_kv_list(prefix, namespace=NAMESPACE)]


def _is_ready(status: Any, spec: Spec, known: Spec | None) -> bool:  # Any: serve's ApplicationStatusOverview
    """Whether the application can be searched as `spec` says. UNHEALTHY: it ran, and lost replicas since. One that is
    deployed for the first time is ready when each shard has one replica, of however many."""
    if status.status == "RUNNING":
        return True
    replaced = known is not None and known.content != spec.content  # then a replica may be one of the former content
    answering = [one.replica_states.get("RUNNING", 0) for one in status.deployments.values()]
    complete = len(answering) == len(spec.sizes) and all(answering)
    return not replaced and (status.status == "UNHEALTHY" or (status.status == "DEPLOYING" and complete))


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
        bounds = {
            name: getattr(options, name)
            for name in ("min_replicas", "max_replicas", "upscale_delay_s", "downscale_delay_s")
        }
        bounds["target_ongoing_requests"] = options.target_requests
        bounds["look_back_period_s"] = min(LOOK_BACK_SECONDS, max(1.0, options.upscale_delay_s))
        scale = {"autoscaling_config": bounds}
    if options.replicas_per_node is not None:
        scale["max_replicas_per_node"] = options.replicas_per_node
    return {
        **scale,
        "ray_actor_options": resources,
        "max_ongoing_requests": MAX_CALLS_PER_REPLICA,
        "health_check_period_s": HEALTH_PERIOD_SECONDS,
        "health_check_timeout_s": HEALTH_TIMEOUT_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": 3,
    }
