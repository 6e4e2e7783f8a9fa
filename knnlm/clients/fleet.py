"""All replicas of a service: found by their names, looked at all the time, chosen among for every call.

Nothing is waited for that a first call does not need: a replica that was never heard of is taken for one that answers.
"""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from knnlm.clients.failure import Failed, Kind
from knnlm.clients.replica import Rank, Replica
from knnlm.clients.resolve import Address, Target, resolve

__all__ = ["LOOK_SECONDS", "Fleet"]

LOOK_SECONDS = 1.0  # between two looks at every replica
FIRST_LOOK_SECONDS = 0.25  # who makes one call and leaves pays for none
RESOLVE_SECONDS = 3.0  # between two looks at what a name stands for
PROBE_SECONDS = 5.0  # a busy replica may take its time, as long as it answers something meanwhile

Stub = TypeVar("Stub")
Probe = Callable[[Replica[Stub], float], Awaitable[None]]  # with seconds it may take; raises Failed


class Fleet(Generic[Stub]):
    """open_: an address as a replica. probe: asks a replica how it is. changed: told after every change.

    Belongs to the event loop in which `ready` is first called.
    """

    def __init__(
        self,
        target: Target,
        open_: Callable[[Address], Replica[Stub]],
        probe: Probe[Stub],
        changed: Callable[[Replica[Stub] | None], None],
    ) -> None:
        self.replicas: list[Replica[Stub]] = []
        self._target = target
        self._open = open_
        self._probe = probe
        self._changed = changed
        self._leaving: list[Replica[Stub]] = []
        self._probed: set[Replica[Stub]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()  # of any result
        self._resolving: asyncio.Task[None] | None = None
        self._resolved_at = 0.0
        self._turn = 0
        self._started = self._closed = False

    @property
    def several(self) -> bool:
        return len(self.replicas) > 1

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
            self.spawn(self._watch())
        if self._resolving is not None and not self.replicas:
            await asyncio.wait([self._resolving], timeout=limit)

    async def look_again(self, limit: float) -> None:
        """Resolve the names now, when there is nobody to ask; for `limit` seconds."""
        if self._target.names and not self.replicas:
            await asyncio.wait([self._resolve_soon()], timeout=limit)

    def choose(
        self,
        domain: str | None = None,
        version: str | None = None,
        tried: Collection[Replica[Stub]] = (),
        worst: Rank = Rank.NEITHER,
    ) -> Replica[Stub] | None:
        """The best replica that has not been tried and suits no worse than `worst`; among equals the one with the
        fewest calls under way, in turn."""
        self._turn += 1
        count = len(self.replicas)
        best, least = None, (worst, 1 << 62)
        for i in range(count):
            replica = self.replicas[(self._turn + i) % count]
            if replica in tried:
                continue
            here = (replica.rank(domain, version), replica.busy)
            if here < least:
                best, least = replica, here
        return best

    def may_return(self, domain: str | None, version: str | None) -> bool:
        """Whether a replica that is down is known to have what was asked for."""
        return any(
            not r.up and domain is not None and r.domains is not None
            and (domain in r.domains if version is None else r.domains.get(domain) == version)
            for r in self.replicas
        )  # fmt: skip

    def failed(self, replica: Replica[Stub], failure: Failed) -> None:
        """Take note of a call that failed there."""
        if failure.kind is Kind.AWAY and replica.up:
            replica.problem = failure.error.message
            self._changed(replica)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """A task that ends with the fleet, and knows nothing of the request during which it was made."""
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

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

    async def _watch(self) -> None:
        await asyncio.sleep(FIRST_LOOK_SECONDS)
        while True:
            for replica in [*self.replicas, *self._leaving]:
                self._look(replica)
            if self._target.names and time.monotonic() - self._resolved_at >= RESOLVE_SECONDS:
                self._resolve_soon()
            for replica in [r for r in self._leaving if not r.busy]:
                self._leaving.remove(replica)
                await replica.aclose()
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self, replica: Replica[Stub]) -> None:
        was_up = replica.up
        if replica.look() and was_up:
            self._changed(replica)
        if replica not in self._probed:
            self._probed.add(replica)
            self.spawn(self._ask_how_it_is(replica)).add_done_callback(lambda _: self._probed.discard(replica))

    async def _ask_how_it_is(self, replica: Replica[Stub]) -> None:
        try:
            await self._probe(replica, PROBE_SECONDS)
        except Failed as failure:
            self.failed(replica, failure)
            if failure.kind is Kind.AWAY or not failure.heard:
                return
        if not replica.up:
            replica.problem = None
            self._changed(replica)

    def _resolve_soon(self) -> "asyncio.Task[None]":
        if self._resolving is None:
            self._resolving = self.spawn(self._resolve())
        return self._resolving

    async def _resolve(self) -> None:
        try:
            found = await asyncio.gather(*(resolve(name) for name in self._target.names))
        finally:
            self._resolving = None
            self._resolved_at = time.monotonic()
        addresses = list(self._target.addresses)
        for name, given in zip(self._target.names, found, strict=True):
            # a name server that is away must not take a service away that answers
            addresses += self._answering(name) if given is None else given
        self._use(addresses)

    def _answering(self, name: object) -> list[Address]:
        return [r.address for r in self.replicas if r.address.name == name and r.up]

    def _use(self, addresses: Sequence[Address]) -> None:
        known = {r.address.text: r for r in [*self.replicas, *self._leaving]}
        wanted = {address.text: address for address in addresses}
        if list(wanted) == [r.address.text for r in self.replicas]:
            return
        self._leaving = [r for text, r in known.items() if text not in wanted]
        self.replicas = [known.get(text) or self._open(address) for text, address in wanted.items()]
        self._changed(None)
