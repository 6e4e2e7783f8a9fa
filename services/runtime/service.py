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

__all__ = ["Core", "Door", "Readiness", "RpcService", "Service"]


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
    """What every request passes, whichever face it knocks at: its key, the service's state, room for one more."""

    def __init__(self, service: Service) -> None:
        self.readiness = Readiness(service.core)
        self._keys = Keys(service.settings)
        self._most = service.settings.max_concurrent_requests
        self._metrics = service.metrics
        self._inside = 0

    def authenticate(self, call: Call, authorization: str | None) -> None:
        """Note on the call whether it is an admin's. Raises Unauthenticated."""
        call.admin = self._keys.admits(authorization)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Hold a place during the work. Raises Unavailable while loading or draining, Overloaded when full."""
        if self.readiness.phase != "ready":
            raise Unavailable(f"the service is {self.readiness.phase}")
        if self._inside >= self._most:
            self._metrics.rejected.labels("queue_full").inc()
            raise Overloaded(f"{self._inside} requests are in work, the most this service takes at once")
        self._inside += 1
        self._metrics.inflight.set(self._inside)
        try:
            yield
        finally:
            self._inside -= 1
            self._metrics.inflight.set(self._inside)
