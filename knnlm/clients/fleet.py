"""All replicas of a service: found by name, probed all the time, and chosen among for every call.

A replica is *down* when it refuses a call because nobody listens, or because it starts or drains. It is *silent* when
something was asked of it and nothing at all has arrived for several looks, as from a paused container: its calls that
may be made elsewhere are then given up. Silence is counted in looks, not in seconds, so that a client that was held up
itself does not take every replica for dead.

A first call waits for nothing that it does not need: a replica that is not known yet is taken for one that answers.
"""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from enum import IntEnum
from typing import Any, Generic, Protocol, TypeVar

import grpc

from knnlm.clients.failures import Failed, Kind, classify, unreachable
from knnlm.clients.resolve import Address, Target, resolve
from knnlm.transport.context import HTTP2, MAX_MESSAGE_BYTES

SILENT_LOOKS = 5
RESOLVE_LOOKS = 3  # looks between two resolutions of the names
PROBE_LOOKS = 5  # a busy replica may take long to say how it is, as long as it answers something meanwhile

Stub = TypeVar("Stub")
Got = TypeVar("Got")
Reply = TypeVar("Reply", covariant=True)
Message = TypeVar("Message", contravariant=True)
Metadata = Sequence[tuple[str, str]]


class PendingReply(Awaitable[Reply], Protocol[Reply]):
    def cancel(self) -> bool: ...


class Method(Protocol[Message, Reply]):
    def __call__(self, message: Message, /, *, timeout: float, metadata: Metadata) -> PendingReply[Reply]: ...


class Rank(IntEnum):
    """How well a replica suits a call, best first."""

    SURE = 0  # up, and known to answer from the version
    MAYBE = 1  # up, and may have the domain
    DOWN = 2  # may have the domain, but was down a moment ago
    ABSENT = 3  # up, and known not to have the domain
    NEITHER = 4


class Replica(Generic[Stub]):
    """One connection to one address, and what is known of the service there. service: its name, for messages.

    Belongs to the event loop in which it is made.
    """

    def __init__(
        self,
        service: str,
        address: Address,
        credentials: grpc.ChannelCredentials | None,
        stub: Callable[[grpc.aio.Channel], Stub],
    ) -> None:
        self.address = address
        self.where = f"{service} at {address.text}"
        self.channel = _open_channel(address, credentials)
        self.stub = stub(self.channel)
        self.problem: str | None = None  # why it is down
        self.domains: Mapping[str, str] | None = None  # the versions of the domains it serves; None: not known yet
        self._movable: set[PendingReply[object]] = set()
        self._given_up: set[PendingReply[object]] = set()
        self._bound = 0  # calls under way that are not movable
        self._looks_unheard = 0

    @property
    def up(self) -> bool:
        return self.problem is None

    @property
    def busy(self) -> int:
        """Calls under way."""
        return len(self._movable) + self._bound

    def rank(self, domain: str | None, version: str | None) -> Rank:
        serves = True if domain is None or self.domains is None else domain in self.domains
        if not self.up:
            return Rank.DOWN if serves else Rank.NEITHER
        if not serves:
            return Rank.ABSENT
        if domain is None or version is None or (self.domains is not None and self.domains[domain] == version):
            return Rank.SURE
        return Rank.MAYBE

    async def movable(self, method: Method[Message, Got], message: Message, limit: float, metadata: Metadata) -> Got:
        """The reply to a call that is given up when the replica falls silent. Raises Failed."""
        reply = method(message, timeout=limit, metadata=metadata)
        self._movable.add(reply)
        try:
            return await self._heard(reply)
        except asyncio.CancelledError:
            if reply in self._given_up and not _is_cancelled():
                raise unreachable(f"{self.where} does not answer: {self.problem}") from None
            raise
        finally:
            self._movable.discard(reply)
            self._given_up.discard(reply)

    async def bound(self, method: Method[Message, Got], message: Message, limit: float, metadata: Metadata) -> Got:
        """The reply to a call that is never given up for another replica: a change, or a probe. Raises Failed."""
        self._bound += 1
        try:
            return await self._heard(method(message, timeout=limit, metadata=metadata))
        finally:
            self._bound -= 1

    def look(self) -> bool:
        """Count a look, at even distances while something is asked. True when the replica is silent: its movable calls
        fail then."""
        if self._looks_unheard < SILENT_LOOKS:
            self._looks_unheard += 1
            return False
        self.problem = self.problem or "nothing was heard from it for a while"
        for reply in self._movable - self._given_up:
            self._given_up.add(reply)
            reply.cancel()
        return True

    async def aclose(self) -> None:
        await self.channel.close()

    async def _heard(self, reply: PendingReply[Got]) -> Got:
        try:
            answer = await reply
        except grpc.aio.AioRpcError as err:
            failed = classify(err, self.where)
            if failed.heard:
                self._looks_unheard = 0
            raise failed from err
        self._looks_unheard = 0
        return answer


class Fleet(Generic[Stub]):
    """The replicas behind a target. Belongs to the event loop in which `ready` is first called.

    open_: makes the replica at an address. probe: asks a replica how it is within some seconds; raises Failed. changed:
    called after every change, with the replica that went up or down, or None when there are others. look_seconds:
    between two looks at every replica.
    """

    def __init__(
        self,
        target: Target,
        open_: Callable[[Address], Replica[Stub]],
        probe: Callable[[Replica[Stub], float], Awaitable[None]],
        changed: Callable[[Replica[Stub] | None], None],
        look_seconds: float,
    ) -> None:
        self.replicas: list[Replica[Stub]] = []
        self._target = target
        self._open = open_
        self._probe = probe
        self._changed = changed
        self._look_seconds = look_seconds
        self._leaving: list[Replica[Stub]] = []
        self._probed: set[Replica[Stub]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()  # Any: nobody reads their results
        self._resolving: asyncio.Task[None] | None = None
        self._resolved_at = 0.0
        self._next = 0
        self._started = self._closed = False

    @property
    def problem(self) -> str | None:
        """Why nobody is likely to answer; None when somebody may."""
        if not self._started or (self._resolving is not None and not self.replicas):
            return None
        if not self.replicas:
            return f"{self._target.text} has no address now"
        return None if any(r.up for r in self.replicas) else self.replicas[0].problem

    async def ready(self, limit: float) -> None:
        """Begin to look, and wait until names are resolved for the first time, at most `limit` seconds.

        Raises RuntimeError once closed.
        """
        if not self._started:
            if self._closed:
                raise RuntimeError("the client has been closed")
            self._started = True
            self._use(self._target.addresses)
            if self._target.names:
                self._resolve_soon()
            self._spawn(self._watch())
        if self._resolving is not None and not self.replicas:
            await asyncio.wait([self._resolving], timeout=limit)

    async def look_again(self, limit: float) -> None:
        """Resolve the names now, for at most `limit` seconds, when there is no replica to ask."""
        if self._target.names and not self.replicas:
            await asyncio.wait([self._resolve_soon()], timeout=limit)

    def choose(
        self,
        domain: str | None = None,
        version: str | None = None,
        tried: Collection[Replica[Stub]] = (),
        worst: Rank = Rank.NEITHER,
    ) -> Replica[Stub] | None:
        """The best replica that has not been tried and ranks better than `worst`, or as `worst` itself; among equals
        the one with the fewest calls under way, in turn."""
        self._next += 1
        count = len(self.replicas)
        turned = (self.replicas[(self._next + i) % count] for i in range(count))
        ranked = ((r.rank(domain, version), r.busy, r) for r in turned if r not in tried)
        best = min(ranked, key=lambda entry: entry[:2], default=None)
        return None if best is None or best[0] > worst else best[2]

    def may_return(self, domain: str | None, version: str | None) -> bool:
        """Whether a replica that is down is known to have what was asked for."""
        return any(
            not r.up and domain is not None and r.domains is not None
            and (domain in r.domains if version is None else r.domains.get(domain) == version)
            for r in self.replicas
        )  # fmt: skip

    def failed(self, replica: Replica[Stub], failure: Failed) -> None:
        """Take note of a call that failed there."""
        if failure.kind is Kind.UNREACHABLE and replica.up:
            replica.problem = failure.error.message
            self._changed(replica)

    async def aclose(self) -> None:
        self._closed = True
        self._started = False
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        replicas, self.replicas, self._leaving = [*self.replicas, *self._leaving], [], []
        for replica in replicas:
            await replica.aclose()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """A task that ends with the fleet, and knows nothing of the request during which it was made."""
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _watch(self) -> None:
        await asyncio.sleep(self._look_seconds / 4)  # a program that makes one call and ends pays for no look
        while True:
            for replica in [*self.replicas, *self._leaving]:
                self._look(replica)
            if self._target.names and time.monotonic() - self._resolved_at >= RESOLVE_LOOKS * self._look_seconds:
                self._resolve_soon()
            for replica in [r for r in self._leaving if not r.busy]:
                self._leaving.remove(replica)
                await replica.aclose()
            await asyncio.sleep(self._look_seconds)

    def _look(self, replica: Replica[Stub]) -> None:
        was_up = replica.up
        if replica.look() and was_up:
            self._changed(replica)
        if replica not in self._probed:
            self._probed.add(replica)
            self._spawn(self._ask(replica)).add_done_callback(lambda _: self._probed.discard(replica))

    async def _ask(self, replica: Replica[Stub]) -> None:
        try:
            await self._probe(replica, PROBE_LOOKS * self._look_seconds)
        except Failed as failure:
            self.failed(replica, failure)
            if failure.kind is Kind.UNREACHABLE or not failure.heard:
                return
        if not replica.up:
            replica.problem = None
            self._changed(replica)

    def _resolve_soon(self) -> "asyncio.Task[None]":
        if self._resolving is None:
            self._resolving = self._spawn(self._resolve())
        return self._resolving

    async def _resolve(self) -> None:
        try:
            found = await asyncio.gather(*(resolve(name) for name in self._target.names))
        finally:
            self._resolving = None
            self._resolved_at = time.monotonic()
        addresses = list(self._target.addresses)
        for name, resolved in zip(self._target.names, found, strict=True):
            # while no name server answers, the replicas that do are kept
            kept = [r.address for r in self.replicas if r.address.name == name and r.up]
            addresses += kept if resolved is None else resolved
        self._use(addresses)

    def _use(self, addresses: Sequence[Address]) -> None:
        known = {r.address.text: r for r in [*self.replicas, *self._leaving]}
        wanted = {address.text: address for address in addresses}
        if list(wanted) == [r.address.text for r in self.replicas]:
            return
        self._leaving = [r for text, r in known.items() if text not in wanted]
        self.replicas = [known.get(text) or self._open(address) for text, address in wanted.items()]
        self._changed(None)


def _open_channel(address: Address, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """One connection to one address, kept alive; made in the event loop that uses it."""
    options: list[tuple[str, str | int]] = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        *HTTP2,
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.enable_retries", 0),  # retries are ours: we know the other replicas
        # a service that comes back is found within a second; the default waits up to two minutes
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.min_reconnect_backoff_ms", 2_000),  # despite its name: how long connecting may take
    ]
    if address.name is not None:  # the certificate is made out to the name, not to what it was resolved to
        options.append(("grpc.default_authority", str(address.name)))
    if credentials is None:
        return grpc.aio.insecure_channel(address.uri, options=options)
    return grpc.aio.secure_channel(address.uri, credentials, options=options)


def _is_cancelled() -> bool:
    """Whether the task itself is to end, not only a call it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
