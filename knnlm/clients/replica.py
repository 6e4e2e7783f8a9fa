"""One replica of a service: its channel, the calls that are under way there, and what is known about it.

A replica is *down* when it refuses a call because nobody listens, or because it is starting or draining. It is *silent*
when something is asked of it and nothing at all has been heard for several looks, as of a paused container: then the
calls that can be made elsewhere are given up here. That is counted in looks, not in seconds, so that a client that was
held up itself does not take everyone else for dead.
"""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from enum import IntEnum
from typing import Generic, Protocol, TypeVar

import grpc

from knnlm.clients.failure import Failed, away, understood
from knnlm.clients.resolve import Address

__all__ = [
    "HTTP2",
    "MAX_MESSAGE_BYTES",
    "Call",
    "Metadata",
    "Method",
    "Rank",
    "Replica",
    "is_cancelled",
    "open_channel",
]

MAX_MESSAGE_BYTES = 64 << 20
SILENT_LOOKS = 5

# an answer of 64 queries has 512 KiB: fewer, larger frames, and a window that need not grow to it first
HTTP2 = (("grpc.http2.max_frame_size", 1 << 20), ("grpc.http2.lookahead_bytes", 4 << 20))

Stub = TypeVar("Stub")
Got = TypeVar("Got")
Reply = TypeVar("Reply", covariant=True)
Message = TypeVar("Message", contravariant=True)
Metadata = Sequence[tuple[str, str]]


class Call(Awaitable[Reply], Protocol[Reply]):
    def cancel(self) -> bool: ...


class Method(Protocol[Message, Reply]):
    def __call__(self, message: Message, /, *, timeout: float, metadata: Metadata) -> Call[Reply]: ...


class Rank(IntEnum):
    """How well a replica suits a call, best first."""

    SURE = 0  # up, and known to answer from the version
    MAY = 1  # up, and may have the domain
    DOWN = 2  # may have it, but was down a moment ago
    ABSENT = 3  # up, and known not to have it
    NEITHER = 4


class Replica(Generic[Stub]):
    """service: its name, for messages. Belongs to one event loop."""

    def __init__(self, service: str, address: Address, channel: grpc.aio.Channel, stub: Stub) -> None:
        self.address = address
        self.where = f"{service} at {address.text}"
        self.stub = stub
        self.channel = channel
        self.problem: str | None = None  # why it is down
        self.domains: dict[str, str] | None = None  # what it said it serves, domain to version; None: not known
        self._movable: set[Call[object]] = set()
        self._given_up: set[Call[object]] = set()
        self._others = 0
        self._unheard = 0  # looks since anything was heard

    @property
    def up(self) -> bool:
        return self.problem is None

    @property
    def busy(self) -> int:
        """Calls under way."""
        return len(self._movable) + self._others

    def rank(self, domain: str | None, version: str | None) -> Rank:
        serves = True if domain is None or self.domains is None else domain in self.domains
        if not self.up:
            return Rank.DOWN if serves else Rank.NEITHER
        if not serves:
            return Rank.ABSENT
        if domain is None or version is None or (self.domains is not None and self.domains[domain] == version):
            return Rank.SURE
        return Rank.MAY

    def begin(self, method: Method[Message, Got], message: Message, limit: float, metadata: Metadata) -> Call[Got]:
        """Send a call that may be given up when the replica falls silent; `result` must be awaited."""
        call = method(message, timeout=limit, metadata=metadata)
        self._movable.add(call)
        return call

    async def result(self, call: Call[Got]) -> Got:
        """Raises Failed."""
        try:
            reply = await call
        except asyncio.CancelledError:
            if call in self._given_up and not is_cancelled():
                raise away(f"{self.where} does not answer: {self.problem}") from None
            raise
        except grpc.aio.AioRpcError as err:
            raise self._understood(err) from err
        finally:
            self._movable.discard(call)
            self._given_up.discard(call)
        self._unheard = 0
        return reply

    async def once(self, method: Method[Message, Got], message: Message, limit: float, metadata: Metadata) -> Got:
        """A call that is never given up for another replica: one that changes something, or asks how this one is.

        Raises Failed.
        """
        self._others += 1
        try:
            reply = await method(message, timeout=limit, metadata=metadata)
        except grpc.aio.AioRpcError as err:
            raise self._understood(err) from err
        finally:
            self._others -= 1
        self._unheard = 0
        return reply

    def look(self) -> bool:
        """Called at even distances while something is asked. True when the replica is silent; then its calls fail."""
        if self._unheard < SILENT_LOOKS:
            self._unheard += 1
            return False
        self.problem = self.problem or "nothing was heard from it for a while"
        for call in self._movable - self._given_up:
            self._given_up.add(call)
            call.cancel()
        return True

    def serves(self, domains: Mapping[str, str]) -> None:
        self.domains = dict(domains)

    async def aclose(self) -> None:
        await self.channel.close()

    def _understood(self, err: grpc.aio.AioRpcError) -> Failed:
        failed = understood(err, self.where)
        if failed.heard:
            self._unheard = 0
        return failed


def open_channel(address: Address, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """One connection to one address, kept alive; made in the event loop that uses it."""
    options: list[tuple[str, str | int]] = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        *HTTP2,
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.enable_retries", 0),  # that is done here, where the other replicas are known
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


def is_cancelled() -> bool:
    """Whether the task itself is to end, not only a call it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
