"""What a service is to the runtime: a core, the routes and rpcs over it, and the door every request passes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import grpc
from fastapi import APIRouter

from knnlm.errors import Overloaded, Unavailable
from services.runtime.auth import Keys
from services.runtime.calls import Call
from services.runtime.metrics import Metrics
from services.runtime.packed import PackedRoute
from services.runtime.settings import HttpSettings
from services.runtime.traces import tracing

__all__ = ["Core", "Door", "Readiness", "Received", "RpcService", "Service"]


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

    name: one word ("datastore"). rpc: needs GrpcSettings; without any, no gRPC port is opened. packed: routes of the
    routers that take protobuf, too. public_paths: exact HTTP paths that need no key and take no body, beside /livez,
    /readyz and /metrics; they answer while loading, too.
    """

    name: str
    title: str
    settings: HttpSettings
    core: Core
    metrics: Metrics
    routers: Sequence[APIRouter]
    rpc: Sequence[RpcService] = ()
    packed: Sequence[PackedRoute] = ()
    public_paths: frozenset[str] = frozenset()


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


class Door:
    """What every request passes, whichever face it knocks at: its key, the service's state, room for one more.

    Raises InvalidRequest that names the setting when the files of keys, or what traces need, cannot be used.
    """

    def __init__(self, service: Service) -> None:
        self.readiness = Readiness(service.core)
        self.keys = Keys(service.settings)
        self.tracing = tracing(service.name, service.settings)
        self._most = service.settings.max_concurrent_requests
        self._most_bytes = service.settings.max_inflight_bytes
        self._metrics = service.metrics
        self._inside = 0
        self._receiving = 0
        self._bytes = 0

    def authenticate(self, call: Call, authorization: str | None) -> None:
        """Note on the call whether it is an admin's. Raises Unauthenticated."""
        call.admin = self.keys.admits(authorization)

    @contextmanager
    def receive(self) -> Iterator["Received"]:
        """Count the bytes of one request from their arrival to its answer; it holds no place among those in work yet.

        Raises Unavailable while loading or draining, and Overloaded when no place is free: then nothing is received.
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
    def inside(self) -> Iterator[None]:
        """Hold a place during the work. Raises Unavailable while loading or draining, Overloaded when full."""
        self._check()
        self._inside += 1
        self._metrics.inflight.set(self._inside)
        try:
            yield
        finally:
            self._inside -= 1
            self._metrics.inflight.set(self._inside)

    def _check(self) -> None:
        if self.readiness.phase != "ready":
            raise Unavailable(f"the service is {self.readiness.phase}")
        if self._inside >= self._most:
            self._metrics.rejected.labels("queue_full").inc()
            raise Overloaded(f"{self._inside} requests are in work, the most this service takes at once")

    def _count_receiving(self, more: int) -> None:
        self._receiving += more
        self._metrics.receiving.set(self._receiving)

    def _hold(self, size: int) -> None:
        """Count bytes of requests in work. Raises Overloaded when they are too many together."""
        if size > 0 and self._bytes + size > self._most_bytes:
            self._metrics.rejected.labels("bytes_full").inc()
            raise Overloaded(
                f"the requests in work hold {self._bytes} of {self._most_bytes} bytes (--max-inflight-bytes), "
                f"there is no room for {size} more"
            )
        self._bytes += size
        self._metrics.inflight_bytes.set(self._bytes)


class Received:
    """What one request was sent, held until it is answered. size: bytes, counted as they come."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._complete = False
        self.size = 0

    def complete(self) -> None:
        """All of it has arrived. May be called twice."""
        if not self._complete:
            self._complete = True
            self._door._count_receiving(-1)

    def hold(self, size: int) -> None:
        """Count so many bytes more. Raises Overloaded when the requests in work have too many together."""
        self._door._hold(size)
        self.size += size
