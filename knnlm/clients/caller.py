"""One call to a service of many replicas: to whom it goes, and to whom again when that fails or takes long.

Made again is only what is safe to make twice, and only where it makes sense: elsewhere when a replica is away or does
not have the domain, later when nobody answers, elsewhere once when a queue is full. The deadline holds over all of it.
"""

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import grpc

from knnlm.clients.context import PROBE, outgoing_id, outgoing_metadata, time_limit
from knnlm.clients.failure import Failed, Kind, away, over
from knnlm.clients.fleet import Fleet
from knnlm.clients.hedging import Hedging
from knnlm.clients.observer import Silent
from knnlm.clients.replica import Call, Metadata, Method, Rank, Replica, is_cancelled, open_channel
from knnlm.clients.request import Options, Request, Service
from knnlm.clients.resolve import Address, parse
from knnlm.errors import KnnlmError

__all__ = ["Caller"]

FIRST_BACKOFF, MOST_BACKOFF = 0.05, 1.0  # seconds between two rounds when nobody answers
LEAST_SECONDS = 0.02  # with less time left, a call that nobody answered is not made once more

Stub = TypeVar("Stub")
Message = TypeVar("Message")
Reply = TypeVar("Reply")


class Caller(Generic[Stub]):
    """probe: asks one replica how it is, with the metadata and seconds it is given. Raises InvalidRequest for a target
    that is none, and for files of TLS that cannot be used."""

    def __init__(
        self,
        target: str,
        service: Service[Stub],
        options: Options,
        probe: Callable[[Replica[Stub], Metadata, float], Awaitable[None]],
    ) -> None:
        self.target = target
        self.timeout = options.timeout
        self._service = service
        self._options = options
        self._observer = Silent() if options.observer is None else options.observer
        self._hedging = Hedging() if options.hedge else None
        self._probe = probe
        # a trace that is not recorded: services would begin one for every probe else
        self._untraced = ("traceparent", f"00-{uuid.uuid4().hex}-{uuid.uuid4().hex[:16]}-00")
        self._credentials = None if options.tls is None else options.tls.channel_credentials()
        self.fleet: Fleet[Stub] = Fleet(parse(target), self._open, self._look_at, self._changed)

    async def call(
        self,
        method: Callable[[Stub], Method[Message, Reply]],
        message: Message,
        kind: tuple[object, ...] = (),
        *,
        domain: str | None = None,
        version: str | None = None,
    ) -> Reply:
        """A call that is safe to make more than once. kind: calls of the same kind take about as long.

        Raises the KnnlmError of the service; Unavailable when nobody answers for `wait` seconds; DeadlineExceeded.
        """
        limit = time_limit(self.timeout)
        begun = time.monotonic()
        request = Request(method, message, self._metadata(), begun + limit, domain, version)
        await self.fleet.ready(limit)
        code = grpc.StatusCode.CANCELLED
        try:
            reply = await self._first(request, kind)
            code = grpc.StatusCode.OK
            return reply
        except Failed as failed:
            code = failed.code
            raise failed.error from failed
        finally:
            self._observer.called(self._service.label, code.name, time.monotonic() - begun)

    async def once(
        self, replica: Replica[Stub], method: Callable[[Stub], Method[Message, Reply]], message: Message, limit: float
    ) -> Reply:
        """A call to this replica and no other, never repeated, of at most `limit` seconds. Raises as `call` does."""
        begun = time.monotonic()
        code = grpc.StatusCode.CANCELLED
        try:
            reply = await replica.once(method(replica.stub), message, limit, self._metadata())
            code = grpc.StatusCode.OK
            return reply
        except Failed as failed:  # which says nothing of the replica: this may be about what it was told to do
            code = failed.code
            raise failed.error from failed
        finally:
            self._observer.called(self._service.label, code.name, time.monotonic() - begun)

    async def every(
        self,
        replicas: Sequence[Replica[Stub]],
        method: Callable[[Stub], Method[Message, Reply]],
        message: Message,
        limit: float,
    ) -> list[Reply | KnnlmError]:
        """What each of the replicas answers within `limit` seconds."""

        async def one(replica: Replica[Stub]) -> Reply | KnnlmError:
            try:
                return await self.once(replica, method, message, limit)
            except KnnlmError as err:
                return err

        return await asyncio.gather(*(one(replica) for replica in replicas))

    async def aclose(self) -> None:
        await self.fleet.aclose()

    async def _first(self, request: Request[Stub, Message, Reply], kind: tuple[object, ...]) -> Reply:
        begun = time.monotonic()
        tried: set[Replica[Stub]] = set()
        replica = self.fleet.choose(request.domain, request.version)
        if replica is None:
            return await self._again(request, tried, away(f"{self._service.name}: {self.target} has no address now"))
        hedging = self._hedging if self.fleet.several else None
        delay = None if hedging is None else hedging.delay(kind)
        try:
            if delay is None:
                reply = await self._ask(replica, request)
            else:
                reply = await self._hedged(replica, request, delay, tried)
        except Failed as failed:
            tried.add(replica)
            return await self._again(request, tried, failed)
        if hedging is not None:
            hedging.record(kind, time.monotonic() - begun)
        return reply

    async def _ask(self, replica: Replica[Stub], request: Request[Stub, Message, Reply]) -> Reply:
        """Raises Failed."""
        call = self._begin(replica, request)
        try:
            return await replica.result(call)
        except Failed as failed:
            self.fleet.failed(replica, failed)
            raise

    def _begin(self, replica: Replica[Stub], request: Request[Stub, Message, Reply]) -> Call[Reply]:
        left = request.deadline - time.monotonic()
        if left <= 0:
            raise over(replica.where)
        return replica.begin(request.method(replica.stub), request.message, left, request.metadata)

    async def _hedged(
        self,
        replica: Replica[Stub],
        request: Request[Stub, Message, Reply],
        delay: float,
        tried: set[Replica[Stub]],
    ) -> Reply:
        """Ask a second replica, too, when the first takes longer than `delay`; the first good answer is the answer.

        The second call is a task, and there is one only then. When it has won it cancels the first one. Raises Failed.
        """
        first = self._begin(replica, request)
        second: asyncio.Task[Reply | Failed] | None = None

        async def ask_another(other: Replica[Stub]) -> Reply | Failed:
            try:
                reply = await self._ask(other, request)
            except Failed as failed:
                return failed
            first.cancel()
            return reply

        def late() -> None:
            nonlocal second
            other = self.fleet.choose(request.domain, request.version, (replica,), Rank.MAY)
            if other is not None and self._hedging is not None and self._hedging.spend():
                tried.add(other)
                second = self.fleet.spawn(ask_another(other))

        timer = asyncio.get_running_loop().call_later(delay, late)
        won = False
        try:
            try:
                return await replica.result(first)
            except asyncio.CancelledError:
                if second is None or not second.done() or is_cancelled():
                    raise
                outcome = second.result()
            except Failed as failed:
                self.fleet.failed(replica, failed)
                if second is None or failed.kind is Kind.FINAL:
                    raise
                outcome = await second
                if isinstance(outcome, Failed):
                    raise
            if isinstance(outcome, Failed):  # cannot be: it cancels nothing then
                raise outcome
            won = True
            return outcome
        finally:
            timer.cancel()
            if second is not None:
                second.cancel()
                self._observer.hedged(self._service.label, won)

    async def _again(self, request: Request[Stub, Message, Reply], tried: set[Replica[Stub]], failed: Failed) -> Reply:
        """Make a call again that has failed, as long as that makes sense. Raises Failed."""
        give_up = min(time.monotonic() + self._options.wait, request.deadline)
        backoff = FIRST_BACKOFF
        absent: Failed | None = None  # what one said who answered, but does not have it
        lost: Failed | None = None
        while True:
            if failed.kind is Kind.FINAL:
                raise failed
            if failed.kind is Kind.OVERLOADED:
                return await self._once_more(request, tried, failed)
            if failed.kind is Kind.ABSENT:
                absent = failed
            else:
                lost = failed
            worst = Rank.NEITHER if absent is None else Rank.DOWN
            replica = self.fleet.choose(request.domain, request.version, tried, worst)
            if replica is None:
                if absent is not None and not self.fleet.may_return(request.domain, request.version):
                    raise absent
                now = time.monotonic()
                if now >= give_up:
                    raise lost or failed
                await asyncio.sleep(min(backoff * random.uniform(0.5, 1), give_up - now))  # noqa: S311
                await self.fleet.look_again(max(0.0, request.deadline - time.monotonic()))
                if request.deadline - time.monotonic() < LEAST_SECONDS:
                    raise lost or failed
                backoff = min(2 * backoff, MOST_BACKOFF)
                tried.clear()
                absent = None
                continue
            self._observer.retried(self._service.label)
            tried.add(replica)
            try:
                return await self._ask(replica, request)
            except Failed as err:
                failed = err

    async def _once_more(
        self, request: Request[Stub, Message, Reply], tried: set[Replica[Stub]], refused: Failed
    ) -> Reply:
        """Where another replica is up, ask it; more would only add to the load. Raises Failed."""
        replica = self.fleet.choose(request.domain, request.version, tried, Rank.MAY)
        if replica is None:
            raise refused
        self._observer.retried(self._service.label)
        try:
            return await self._ask(replica, request)
        except Failed as failed:
            raise failed if failed.kind is Kind.FINAL else refused from failed

    def _metadata(self) -> Metadata:
        key = self._options.api_key
        key = key() if callable(key) else key
        metadata = [] if key is None else [("authorization", f"Bearer {key}")]
        request_id = outgoing_id()
        if request_id is not None:
            metadata.append(("x-request-id", request_id))
        metadata.extend(outgoing_metadata())
        return metadata

    def _open(self, address: Address) -> Replica[Stub]:
        channel = open_channel(address, self._credentials)
        return Replica(self._service.name, address, channel, self._service.stub(channel))

    async def _look_at(self, replica: Replica[Stub], seconds: float) -> None:
        await self._probe(replica, [*self._metadata(), self._untraced, (PROBE, "1")], seconds)

    def _changed(self, replica: Replica[Stub] | None) -> None:
        if replica is not None:
            self._observer.replica(self._service.label, replica.address.text, replica.problem)
        up = sum(r.up for r in self.fleet.replicas)
        self._observer.replicas(self._service.label, up, len(self.fleet.replicas) - up)
