"""One call to a service of many replicas: to which it goes, and whether it is made again when it fails.

Only calls that are safe to repeat are repeated: elsewhere when a replica is down or does not have the domain, later
when none answers, elsewhere once when a queue is full. One deadline holds over all attempts.
"""

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import grpc

from knnlm.clients.failures import Failed, Kind, deadline_exceeded, unreachable
from knnlm.clients.fleet import Fleet
from knnlm.clients.replica import Metadata, Method, Rank, Replica
from knnlm.clients.resolve import Address, parse
from knnlm.errors import KnnlmError
from knnlm.transport.context import PROBE, outgoing_id, outgoing_metadata, time_limit
from knnlm.transport.security import ApiKey, Tls, current_key

FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.05, 1.0  # between two rounds over replicas that do not answer
MIN_ATTEMPT_SECONDS = 0.02  # with less time left, no further attempt is made

Stub = TypeVar("Stub")
Message = TypeVar("Message")
Reply = TypeVar("Reply")


class Observer:
    """Hooks for metrics of outgoing calls, which do nothing here. Called in the client's event loop: must return at
    once. service: "lm" or "datastore"."""

    def called(self, service: str, code: str, seconds: float) -> None:
        """A call is over, retries included. code: the name of a gRPC status."""

    def retried(self, service: str) -> None:
        """A call that failed is made again."""

    def replica(self, service: str, address: str, problem: str | None) -> None:
        """A replica was found down, or (None) has come back."""

    def replicas(self, service: str, up: int, down: int) -> None:
        """The number of replicas changed."""


@dataclass(frozen=True)
class Connection:
    """How to reach a service of any number of replicas over gRPC.

    target: host:port, [IPv6]:port, dns:///host:port, unix:PATH, or several of them with commas between; a name stands
    for all its addresses, and is resolved again every few seconds. api_key: the key, or a function that gives it for
    each call (a SecretFile). timeout: seconds per call; the deadline of the request that is served holds too. wait:
    seconds for which a call is made again while no replica answers. look_seconds: between two looks at every replica.
    """

    target: str
    api_key: ApiKey = None
    tls: Tls | None = None
    timeout: float = 60.0
    wait: float = 1.0
    observer: Observer = field(default_factory=Observer)
    look_seconds: float = 1.0


@dataclass(frozen=True)
class Service(Generic[Stub]):
    """name: in full, for messages. label: one word, for an observer. stub: made over a channel."""

    name: str
    label: str
    stub: Callable[[grpc.aio.Channel], Stub]


@dataclass(slots=True)
class _Request(Generic[Stub, Message, Reply]):
    """A call, however often it is attempted. domain, version: what the replica must have. deadline: time.monotonic.
    preferred: asked first, unless it is down."""

    method: Callable[[Stub], Method[Message, Reply]]
    message: Message
    metadata: Metadata
    deadline: float
    domain: str | None
    version: str | None
    preferred: Replica[Stub] | None

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


class Caller(Generic[Stub]):
    """Calls to one service. probe: asks one replica how it is, with the given metadata and seconds; raises Failed.

    Raises InvalidRequest for an invalid target or unusable TLS files.
    """

    def __init__(
        self,
        connection: Connection,
        service: Service[Stub],
        probe: Callable[[Replica[Stub], Metadata, float], Awaitable[None]],
    ) -> None:
        self.connection = connection
        self._service = service
        self._observer = connection.observer
        self._probe = probe
        # probes belong to one trace that is not recorded; otherwise services would begin a trace for each
        self._untraced = ("traceparent", f"00-{uuid.uuid4().hex}-{uuid.uuid4().hex[:16]}-00")
        self._credentials = None if connection.tls is None else connection.tls.channel_credentials()
        target = parse(connection.target)
        self.fleet: Fleet[Stub] = Fleet(target, self._open, self._ask, self._changed, connection.look_seconds)

    def time_limit(self) -> float:
        """Seconds the next call may take. Raises DeadlineExceeded when none are left."""
        return time_limit(self.connection.timeout)

    async def call(
        self,
        method: Callable[[Stub], Method[Message, Reply]],
        message: Message,
        *,
        domain: str | None = None,
        version: str | None = None,
        preferred: Replica[Stub] | None = None,
    ) -> Reply:
        """The reply to a call that is safe to make more than once. preferred: asked first, unless it is down.

        Raises the KnnlmError of the service; Unavailable when no replica answers for `wait` seconds; DeadlineExceeded.
        """
        limit = self.time_limit()
        request = _Request(method, message, self._metadata(), time.monotonic() + limit, domain, version, preferred)
        await self.fleet.ready(limit)
        return await self._observed(self._send(request))

    async def call_once(
        self, replica: Replica[Stub], method: Callable[[Stub], Method[Message, Reply]], message: Message, limit: float
    ) -> Reply:
        """The reply of this replica and no other, to a call of at most `limit` seconds. Raises as `call` does.

        A failure does not mark the replica as down: it may concern what the replica was told to do.
        """
        return await self._observed(replica.bound(method(replica.stub), message, limit, self._metadata()))

    async def call_each(
        self,
        replicas: Sequence[Replica[Stub]],
        method: Callable[[Stub], Method[Message, Reply]],
        message: Message,
        limit: float,
    ) -> list[Reply | KnnlmError]:
        """What each of the replicas answers within `limit` seconds."""

        async def one(replica: Replica[Stub]) -> Reply | KnnlmError:
            try:
                return await self.call_once(replica, method, message, limit)
            except KnnlmError as err:
                return err

        return await asyncio.gather(*(one(replica) for replica in replicas))

    async def aclose(self) -> None:
        await self.fleet.aclose()

    async def _observed(self, call: Awaitable[Reply]) -> Reply:
        begun = time.monotonic()
        code = grpc.StatusCode.CANCELLED
        try:
            reply = await call
            code = grpc.StatusCode.OK
            return reply
        except Failed as failed:
            code = failed.code
            raise failed.error from failed
        finally:
            self._observer.called(self._service.label, code.name, time.monotonic() - begun)

    async def _send(self, request: _Request[Stub, Message, Reply]) -> Reply:
        """Raises Failed."""
        replica = request.preferred
        if replica is None or not replica.up:
            replica = self.fleet.choose(request.domain, request.version)
        if replica is None:
            nobody = unreachable(f"{self._service.name}: {self.connection.target} has no address now")
            return await self._retry(request, set(), nobody)
        try:
            return await self._attempt(replica, request)
        except Failed as failed:
            return await self._retry(request, {replica}, failed)

    async def _attempt(self, replica: Replica[Stub], request: _Request[Stub, Message, Reply]) -> Reply:
        """Raises Failed."""
        left = request.seconds_left
        if left <= 0:
            raise deadline_exceeded(replica.where)
        try:
            return await replica.movable(request.method(replica.stub), request.message, left, request.metadata)
        except Failed as failed:
            self.fleet.failed(replica, failed)
            raise

    async def _retry(self, request: _Request[Stub, Message, Reply], tried: set[Replica[Stub]], failed: Failed) -> Reply:
        """Attempt a call that has failed again, as long as that makes sense. Raises Failed."""
        give_up = min(time.monotonic() + self.connection.wait, request.deadline)
        backoff = FIRST_BACKOFF_SECONDS
        absent: Failed | None = None  # the last answer of a replica that does not have the domain or version
        unanswered: Failed | None = None
        while True:
            if failed.kind is Kind.FINAL:
                raise failed
            if failed.kind is Kind.OVERLOADED:
                return await self._retry_elsewhere_once(request, tried, failed)
            if failed.kind is Kind.ABSENT:
                absent = failed
            else:
                unanswered = failed
            replica = self.fleet.choose(
                request.domain, request.version, tried, Rank.NEITHER if absent is None else Rank.DOWN
            )
            if replica is None:
                if absent is not None and not self.fleet.may_return(request.domain, request.version):
                    raise absent
                now = time.monotonic()
                if now >= give_up:
                    raise unanswered or failed
                await asyncio.sleep(min(backoff * random.uniform(0.5, 1), give_up - now))  # noqa: S311
                await self.fleet.look_again(max(0.0, request.seconds_left))
                if request.seconds_left < MIN_ATTEMPT_SECONDS:
                    raise unanswered or failed
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
                tried.clear()
                absent = None
                continue
            self._observer.retried(self._service.label)
            tried.add(replica)
            try:
                return await self._attempt(replica, request)
            except Failed as err:
                failed = err

    async def _retry_elsewhere_once(
        self, request: _Request[Stub, Message, Reply], tried: set[Replica[Stub]], refused: Failed
    ) -> Reply:
        """Ask one other replica that is up; further attempts would add to the load. Raises Failed."""
        replica = self.fleet.choose(request.domain, request.version, tried, Rank.MAYBE)
        if replica is None:
            raise refused
        self._observer.retried(self._service.label)
        try:
            return await self._attempt(replica, request)
        except Failed as failed:
            raise failed if failed.kind is Kind.FINAL else refused from failed

    def _metadata(self) -> Metadata:
        key = current_key(self.connection.api_key)
        metadata = [] if key is None else [("authorization", f"Bearer {key}")]
        request_id = outgoing_id()
        if request_id is not None:
            metadata.append(("x-request-id", request_id))
        return [*metadata, *outgoing_metadata()]

    def _open(self, address: Address) -> Replica[Stub]:
        return Replica(self._service.name, address, self._credentials, self._service.stub)

    async def _ask(self, replica: Replica[Stub], seconds: float) -> None:
        await self._probe(replica, [*self._metadata(), self._untraced, (PROBE, "1")], seconds)

    def _changed(self, replica: Replica[Stub] | None) -> None:
        if replica is not None:
            self._observer.replica(self._service.label, replica.address.text, replica.problem)
        up = sum(r.up for r in self.fleet.replicas)
        self._observer.replicas(self._service.label, up, len(self.fleet.replicas) - up)
