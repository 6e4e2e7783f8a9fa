"""Which versions of which domains answer, and how they change while serving.

A domain's CURRENT file says which version is wanted. The new version is opened and warmed beside the old, then one
reference is rebound: searches in flight finish on the old one, and callers that pin it are answered for a while longer.
A version that cannot be opened, or for which there is no memory, changes nothing but the domain's state. Blocking work
runs in threads, all else in the event loop.

Opening may take half an hour. Meanwhile other versions are opened, unless they would take the same memory, and one that
is loaded is switched to at once. An activation is refused when the domain was switched after it was asked for; what the
store asked for answers only if CURRENT still names it when it is open.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count as counting
from pathlib import Path

from knnlm.datastore.catalog import Catalog
from knnlm.errors import Conflict, DatastoreError, KnnlmError, NotFound, Unavailable, UnknownDomain, UnknownVersion
from knnlm.messages import DomainInfo
from services.datastore.loaded import Loaded, Opener, Stamp, stamp_of
from services.datastore.settings import DatastoreSettings
from services.datastore.version_metrics import VersionMetrics
from services.runtime.observability import Metrics, event

LOG = logging.getLogger(__name__)
RETRY_AFTER_S = 30.0  # a version that could not be opened is tried again
MAX_OPENINGS = 3  # versions that are opened at once, each in a thread; one where each would count on the same memory


class Pool:
    """The loaded versions of a store."""

    def __init__(self, settings: DatastoreSettings, metrics: Metrics, open_searcher: Opener) -> None:
        self._settings = settings
        self._catalog = Catalog(settings.store)
        self._open = open_searcher
        self._current: dict[str, Loaded] = {}
        self._retired: list[tuple[str, Loaded]] = []
        self._failed: dict[str, tuple[Stamp | None, float, KnnlmError]] = {}
        self._turns = counting(1)  # the order in which switches were asked for
        self._switched: dict[str, int] = {}  # by domain, the turn of the one that was done last
        self._asked: Counter[tuple[str, str]] = Counter()  # switches under way, by domain and version
        self._switching = asyncio.Lock()  # held to write CURRENT and rebind, never while a version is opened
        self._opening: dict[tuple[str, Stamp], asyncio.Task[Loaded]] = {}
        self._following: dict[tuple[str, Stamp], asyncio.Task[None]] = {}  # switches that the store asked for
        loaded = settings.memory == "resident" or settings.device != "cpu" or settings.max_memory_bytes is not None
        shared = loaded and not settings.cluster
        self._openings = asyncio.Semaphore(1 if shared else MAX_OPENINGS)
        self._metrics = VersionMetrics(metrics)

    def load(self) -> None:
        """Open every domain's current version; blocks. A domain that was asked for by name must be there and sound."""
        for domain in self._settings.domains or self._catalog.domains():
            try:
                version = self._catalog.current(domain)
                if version is None:
                    raise UnknownVersion(f"domain {domain} has no current version: activate one", param="version")
                with self._metrics.opening(domain):
                    loaded = self._load(self._catalog.path(domain, version))
                self._rebind(domain, loaded)
            except KnnlmError as err:
                if self._settings.domains:
                    raise
                self._note_failure(domain, None, err)

    def get(self, domain: str, version: str | None) -> Loaded:
        """The loaded version that answers. Raises UnknownDomain, UnknownVersion; Unavailable when it is broken."""
        current = self._current.get(domain)
        if current is None:
            if domain in self._failed:
                raise Unavailable(f"domain {domain} cannot be served: {self._reason(domain)}", param="domain")
            known = ", ".join(sorted(self._current)) or "none"
            raise UnknownDomain(f"unknown domain {domain[:80]!r}; served here: {known}", param="domain")
        if version in (None, current.version):
            return current
        for name, retired in self._retired:
            if (name, retired.version) == (domain, version):
                return retired
        raise UnknownVersion(
            f"version {str(version)[:80]!r} of domain {domain} is not loaded; current is {current.version}",
            param="version",
        )

    def missing(self) -> Sequence[str]:
        """Domains that were asked for by name and do not answer, because they are gone from the store."""
        return [domain for domain in self._settings.domains if domain not in self._current]

    def problems(self) -> Sequence[str]:
        """Why no request can be answered, or none about a domain that was asked for by name."""
        gone = [f"domain {domain} is not served" for domain in self.missing()]
        incomplete = {domain: loaded.problems for domain, loaded in self._current.items() if loaded.problems}
        if not self._settings.domains and len(incomplete) < len(self._current):
            return gone
        return [*gone, *(problem for problems in incomplete.values() for problem in problems)]

    async def list(self) -> Sequence[DomainInfo]:
        """Every domain that is served, in alphabetical order."""
        # asked again: a domain may have gone while another was described
        return [await self.describe(domain) for domain in sorted(self._current) if domain in self._current]

    async def describe(self, domain: str, version: str | None = None) -> DomainInfo:
        """Raises as `get` does. state: ready, loading VERSION, or stale (and why) when CURRENT cannot be opened."""
        loaded = self.get(domain, version)
        with loaded.lease():  # it may be replaced meanwhile, and must not be let go
            try:
                versions = await asyncio.to_thread(self._catalog.versions, domain)
            except KnnlmError:  # removed a moment ago, and still served
                versions = [loaded.version]
            state = "ready"
            loading = [stamp[0] for name, stamp in self._opening if name == domain]
            if loading:
                state = f"loading {loading[-1]}"
            elif domain in self._failed:
                state = f"stale: {self._reason(domain)}"
            return loaded.searcher.info(versions, state)

    async def activate(self, domain: str, version: str, instead_of: str | None = None) -> DomainInfo:
        """Open the version, make it current on disk, answer from it. Raises NotFound or DatastoreError; Conflict when
        another version than `instead_of` has become current, or a switch that was asked for later is done. Then
        nothing has changed."""
        if self._settings.domains and domain not in self._settings.domains:
            raise UnknownDomain(f"domain {domain[:80]!r} is not served here", param="domain")
        turn = next(self._turns)
        path = await asyncio.to_thread(self._catalog.path, domain, version)
        with self._asking(domain, version):
            loaded = await self._opened(domain, path)
            async with self._switching:
                last = max(turn, self._switched.get(domain, 0))
                if last > turn and self._current[domain].version != version:
                    raise Conflict(
                        f"version {version} of domain {domain} is open, but not activated: meanwhile the domain was "
                        f"switched to {self._current[domain].version}, which was asked for later",
                        param="version",
                    )
                await asyncio.to_thread(self._catalog.activate, domain, version, instead_of)
                self._switched[domain] = last
                self._rebind(domain, loaded)
        return await self.describe(domain)

    async def follow(self) -> None:
        """Look at the store once, and wait for the switches that it asks for."""
        await self.look()
        for error in await asyncio.gather(*self._following.values(), return_exceptions=True):
            if isinstance(error, Exception):  # no cancellation: the store asks for another version by now
                raise error
        await self._let_go(grace=self._settings.grace_s)

    async def look(self) -> None:
        """Look at the store once: begin to open what is new, drop what is gone, let go of what nobody needs any
        more."""
        wanted = await asyncio.to_thread(self._wanted)
        for (domain, opening), task in list(self._following.items()):
            now = wanted.get(domain)
            if now is not None and now[0] != opening[0]:
                task.cancel()  # what waits to be opened is then not opened at all
        for domain, stamp in wanted.items():
            loaded = self._current.get(domain)
            if loaded is not None and loaded.stamp == stamp:
                self._failed.pop(domain, None)  # what could not be opened is no longer wanted
            elif stamp is not None and (domain, stamp) not in self._following and self._worth_trying(domain, stamp):
                task = asyncio.create_task(self._switch(domain, stamp))
                self._following[domain, stamp] = task
                task.add_done_callback(lambda _, key=(domain, stamp): self._following.pop(key))  # type: ignore[misc]
        for domain in [name for name in self._current if name not in wanted]:
            await self._drop(domain)
        self._failed = {domain: failure for domain, failure in self._failed.items() if domain in wanted}
        await self._let_go(grace=self._settings.grace_s)
        self._metrics.replicas(self._current)

    async def close(self) -> None:
        """Let go of everything, also of what is being opened once it is. No search may run any more."""
        await asyncio.gather(*self._following.values(), *self._opening.values(), return_exceptions=True)
        for domain in list(self._current):
            self._retire(domain, self._current.pop(domain))
        await self._let_go(grace=0.0)

    def _load(self, path: Path) -> Loaded:
        searches = self._settings.cluster_searches if self._settings.cluster else 1
        return Loaded(path, self._open, self._room(), searches)

    def _wanted(self) -> dict[str, Stamp | None]:
        """Stamps of the domains that are to be served; blocks."""
        wanted = {}
        for domain in self._catalog.domains():
            if not self._settings.domains or domain in self._settings.domains:
                with contextlib.suppress(UnknownDomain):  # removed between two looks
                    wanted[domain] = self._current_stamp(domain)
        return wanted

    def _current_stamp(self, domain: str) -> Stamp | None:
        """Stamp of the current version on disk, None when the store cannot say. Raises UnknownDomain without one."""
        try:
            version = self._catalog.current(domain)
            if version is None:
                raise UnknownDomain(f"domain {domain} has no current version", param="domain")
            return stamp_of(self._catalog.path(domain, version))
        except (DatastoreError, UnknownVersion, OSError):
            return None  # CURRENT is broken or names a version that is not there: keep what is served

    def _worth_trying(self, domain: str, stamp: Stamp) -> bool:
        failure = self._failed.get(domain)
        return failure is None or failure[0] != stamp or time.monotonic() - failure[1] > RETRY_AFTER_S

    async def _switch(self, domain: str, stamp: Stamp) -> None:
        """Open what CURRENT names, and answer from it if CURRENT names it still."""
        turn = next(self._turns)
        try:
            path = await asyncio.to_thread(self._catalog.path, domain, stamp[0])
        except NotFound:
            return  # removed meanwhile
        with self._asking(domain, stamp[0]):
            try:
                loaded = await self._opened(domain, path)
            except (KnnlmError, OSError) as err:
                self._note_failure(domain, stamp, err if isinstance(err, KnnlmError) else DatastoreError(str(err)))
                return
            async with self._switching:
                with contextlib.suppress(UnknownDomain):  # removed meanwhile
                    self._answer_from(loaded, domain, await asyncio.to_thread(self._current_stamp, domain), turn)

    def _answer_from(self, loaded: Loaded, domain: str, wanted: Stamp | None, turn: int) -> None:
        """wanted: what CURRENT names now. A version whose manifest was rewritten while it was opened answers until it
        is opened again, but not in place of the rewritten one."""
        current = self._current.get(domain)
        if wanted is None or wanted[0] != loaded.version or (current is not None and current.stamp == wanted):
            return
        if current is None or current.version != loaded.version:
            self._switched[domain] = max(turn, self._switched.get(domain, 0))
        self._rebind(domain, loaded)

    async def _drop(self, domain: str) -> None:
        """Stop serving a domain that was not in the store, unless it is there now: it may just have been activated."""
        async with self._switching:
            with contextlib.suppress(UnknownDomain):
                await asyncio.to_thread(self._current_stamp, domain)
                return
            event(LOG, "domain_removed", domain=domain)
            gone = self._current.pop(domain)
            self._switched.pop(domain, None)
            self._retire(domain, gone)
            self._metrics.replaced(domain, gone.version)
            self._metrics.removed(domain)

    @contextlib.contextmanager
    def _asking(self, domain: str, version: str) -> Iterator[None]:
        """Inside, the version is not let go once it is open, although it does not answer yet."""
        self._asked[domain, version] += 1
        try:
            yield
        finally:
            self._asked[domain, version] -= 1
            self._asked += Counter()  # without those that are zero

    async def _opened(self, domain: str, path: Path) -> Loaded:
        """A version that is already in memory, or a new one. Raises UnknownVersion for one that was removed."""
        try:
            stamp = await asyncio.to_thread(stamp_of, path)
        except FileNotFoundError as err:
            raise UnknownVersion(f"domain {domain} has no version {path.name}: it is gone", param="version") from err
        for name, loaded in [*self._current.items(), *self._retired]:
            if name == domain and loaded.stamp == stamp:
                return loaded
        if (domain, stamp) not in self._opening:
            self._opening[domain, stamp] = asyncio.create_task(self._open_anew(domain, stamp, path))
        return await asyncio.shield(self._opening[domain, stamp])

    async def _open_anew(self, domain: str, stamp: Stamp, path: Path) -> Loaded:
        try:
            async with self._openings:
                if not self._asked[domain, stamp[0]]:
                    raise Unavailable(f"version {stamp[0]} of domain {domain} is not asked for any more")
                with self._metrics.opening(domain):
                    loaded = await asyncio.to_thread(self._load, path)
                self._retire(domain, loaded)  # its memory counts, and is given back if no switch ends with it
                return loaded
        finally:
            del self._opening[domain, stamp]  # before another can ask for what has failed

    def _rebind(self, domain: str, loaded: Loaded) -> None:
        old = self._current.get(domain)
        self._current[domain] = loaded
        self._failed.pop(domain, None)
        if old is loaded:
            return
        self._retired = [(name, other) for name, other in self._retired if other is not loaded]
        if old is not None:
            self._retire(domain, old)
            self._metrics.replaced(domain, old.version)
        self._metrics.serves(domain, loaded)
        event(LOG, "serving", domain=domain, version=loaded.version, replaced=None if old is None else old.version)

    def _room(self) -> int | None:
        """Bytes that another version may hold: the former ones count until they are let go. None = no limit of ours."""
        most = self._settings.max_memory_bytes
        versions = [*self._current.values(), *(loaded for _, loaded in self._retired)]
        return None if most is None else most - sum(loaded.held_bytes for loaded in versions)

    def _retire(self, domain: str, loaded: Loaded) -> None:
        loaded.retired_at = time.monotonic()
        self._retired.append((domain, loaded))

    async def _let_go(self, grace: float) -> None:
        now = time.monotonic()
        over = [
            (domain, loaded)
            for domain, loaded in self._retired
            if not loaded.leases and not self._asked[domain, loaded.version] and now - loaded.retired_at >= grace
        ]
        self._retired = [pair for pair in self._retired if pair not in over]
        for domain, loaded in over:
            await asyncio.to_thread(loaded.close)
            event(LOG, "let_go", domain=domain, version=loaded.version)

    def _reason(self, domain: str) -> str:
        """Why the version that is wanted cannot be opened, without saying where on this machine the store lies."""
        return self._failed[domain][2].message.replace(f"{self._catalog.store}/", "")

    def _note_failure(self, domain: str, stamp: Stamp | None, err: KnnlmError) -> None:
        self._failed[domain] = (stamp, time.monotonic(), err)
        self._metrics.failed(domain)
        event(LOG, "cannot_serve", logging.WARNING, domain=domain, version=stamp and stamp[0], reason=err.message)
