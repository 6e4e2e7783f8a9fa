"""All replicas of a service: found by name, probed all the time, and chosen among for every call.

A first call waits for nothing that it does not need: a replica that is not known yet is taken for one that answers.
"""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from knnlm.clients.failures import Failed, Kind
from knnlm.clients.replica import Rank, Replica
from knnlm.clients.resolve import Address, Target, resolve

RESOLVE_LOOKS = 3  # looks between two resolutions of the names
PROBE_LOOKS = 5  # a busy replica may take long to say how it is, as long as it answers something meanwhile

Stub = TypeVar("Stub")


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
