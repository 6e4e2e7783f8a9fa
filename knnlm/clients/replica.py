"""One replica of a service: its connection, its calls under way, and what is known of it.

A replica is *down* when it refuses a call because nobody listens, or because it starts or drains. It is *silent* when
something was asked of it and nothing at all has arrived for several looks, as from a paused container: its calls that
may be made elsewhere are then given up. Silence is counted in looks, not in seconds, so that a client that was held up
itself does not take every replica for dead.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import IntEnum
from typing import Generic, Protocol, TypeVar

import grpc

from knnlm.clients.failures import classify, unreachable
from knnlm.clients.resolve import Address
from knnlm.transport.context import HTTP2, MAX_MESSAGE_BYTES

SILENT_LOOKS = 5

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
