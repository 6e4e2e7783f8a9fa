"""What a service is to the runtime: a core, the routes and rpcs over it, and the admission every request passes."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import grpc
from fastapi import APIRouter

from knnlm.errors import Overloaded, Unavailable
from services.runtime.context import RequestContext
from services.runtime.observability import Metrics
from services.runtime.protobuf_routes import ProtobufRoute
from services.runtime.security import Keys
from services.runtime.settings import HttpSettings
from services.runtime.tracing import make_tracing


class Core(Protocol):
    """What a service does, without transports. Called in this order: load, start, (requests), close."""

    def load(self) -> None:
        """Read models and indexes: may block for minutes, runs in a thread. KnnlmError or OSError ends the process."""
        ...

    async def start(self) -> None:
        """What must be made in the event loop: queues, watchers, channels. May wait, e.g. for another service."""
        ...

    def problems(self) -> Sequence[str]:
        """Why requests cannot be answered right now, for /readyz; empty when they can."""
        ...

    async def close(self) -> None:
        """Finish what was accepted and free what was made. Also called when start never ran or failed."""
        ...


@dataclass(frozen=True)
class RpcService:
    """name: in full, as "knnlm.v1.Datastore". register: adds the servicer to a grpc.aio server."""

    name: str
    register: Callable[[grpc.aio.Server], None]


@dataclass(frozen=True)
class Service:
    """All that the runtime needs to know of a service.

    name: one word ("datastore"). rpc: needs GrpcSettings; without any, no gRPC port is opened. protobuf: routes of the
    routers that take protobuf, too. public: paths of files that need no key and are answered while loading. omp_spins:
    see runtime.process.set_omp_wait_policy.
    """

    name: str
    title: str
    settings: HttpSettings
    core: Core
    metrics: Metrics
    routers: Sequence[APIRouter]
    rpc: Sequence[RpcService] = ()
    protobuf: Sequence[ProtobufRoute] = ()
    public: Collection[str] = ()
    omp_spins: int = 0


Phase = Literal["loading", "ready", "draining"]


class Readiness:
    """Where the process stands in its life, and whether its core can answer."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.phase: Phase = "loading"
        self.since = time.monotonic()

    def enter(self, phase: Phase) -> None:
        self.phase = phase
        self.since = time.monotonic()

    def reasons(self) -> list[str]:
        """Why the service is not ready; empty when it is."""
        if self.phase != "ready":
            return [f"{self.phase} for {time.monotonic() - self.since:.0f} s"]
        return list(self._core.problems())


class Admission:
    """Admission shared by HTTP and gRPC: authentication, readiness, limits of requests and of their bytes.

    Raises InvalidRequest that names the setting when the files of keys, or what traces need, cannot be used.
    """

    def __init__(self, service: Service) -> None:
        self.readiness = Readiness(service.core)
        self.keys = Keys(service.settings)
        self.tracing = make_tracing(service.name, service.settings)
        self._max_requests = service.settings.max_concurrent_requests
        self._max_bytes = service.settings.max_inflight_bytes
        self._metrics = service.metrics
        self._admitted = 0
        self._receiving = 0
        self._bytes = 0

    def authenticate(self, request: RequestContext, authorization: str | None) -> None:
        """Note on the request whether it is an admin's. Raises Unauthenticated."""
        request.admin = self.keys.admits(authorization)

    @contextmanager
    def receive(self) -> Iterator["Received"]:
        """Count the bytes of one request from their arrival to its answer; it holds no slot among those in work yet.

        Raises Unavailable while loading or draining, and Overloaded when no slot is free: then nothing is received.
        """
        self._check()
        received = Received(self)
        self._count_receiving(1)
        try:
            yield received
        finally:
            received.complete()
            self._hold(-received.size)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a slot during the work. Raises Unavailable while loading or draining, Overloaded when full."""
        self._check()
        self._admitted += 1
        self._metrics.inflight.set(self._admitted)
        try:
            yield
        finally:
            self._admitted -= 1
            self._metrics.inflight.set(self._admitted)

    def _check(self) -> None:
        if self.readiness.phase != "ready":
            raise Unavailable(f"the service is {self.readiness.phase}")
        if self._admitted >= self._max_requests:
            self._metrics.rejected.labels("queue_full").inc()
            raise Overloaded(f"{self._admitted} requests are in work, the most this service takes at once")

    def _count_receiving(self, more: int) -> None:
        self._receiving += more
        self._metrics.receiving.set(self._receiving)

    def _hold(self, size: int) -> None:
        """Count bytes of requests in work. Raises Overloaded when they are too many together."""
        if size > 0 and self._bytes + size > self._max_bytes:
            self._metrics.rejected.labels("bytes_full").inc()
            raise Overloaded(
                f"the requests in work hold {self._bytes} of {self._max_bytes} bytes (--max-inflight-bytes), "
                f"there is no room for {size} more"
            )
        self._bytes += size
        self._metrics.inflight_bytes.set(self._bytes)


class Received:
    """The bytes one request was sent, held until it is answered. size: bytes, counted as they come."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._complete = False
        self.size = 0

    def complete(self) -> None:
        """All of it has arrived. May be called twice."""
        if not self._complete:
            self._complete = True
            self._admission._count_receiving(-1)

    def hold(self, size: int) -> None:
        """Count `size` bytes more. Raises Overloaded when the requests in work have too many together."""
        self._admission._hold(size)
        self.size += size
