"""The datastore service's core: limits, a queue, and searches of one version with one set of options run together.

Knows neither HTTP nor gRPC.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import numpy as np
from prometheus_client import Counter, Histogram

from knnlm.errors import DeadlineExceeded, InvalidRequest, TooLarge, Unavailable
from knnlm.index.exclusion import check_exclusion, check_follow
from knnlm.messages import DomainInfo, Passage, PassagesRequest, PassagesResult, SearchRequest, SearchResult
from knnlm.options import SEARCH_OPTIONS
from knnlm.transport.context import outgoing
from services.datastore.cluster import ClusterOpener
from services.datastore.encoding import encoder
from services.datastore.loaded import Loaded, Opener, opener
from services.datastore.pool import Pool
from services.datastore.settings import DatastoreSettings
from services.datastore.updates import DocumentUpdates, EncoderOpener
from services.runtime.batching import Batcher
from services.runtime.context import RequestContext
from services.runtime.observability import LATENCY_BUCKETS, Metrics, event

LOG = logging.getLogger(__name__)
ENVELOPE_BYTES = 4096  # an answer without its arrays
QUANTUM_QUERIES = 64  # searched for one domain before it is another's turn: larger batches are hardly faster per query
LIMITED_OPTIONS = [name for name in SEARCH_OPTIONS if f"max_{name}" in DatastoreSettings.model_fields]
PASSAGE_BYTES = 256  # a passage without its tokens; document names are short
ENTRIES_PER_QUERY = 16  # entries that are looked up in the time of one query

_Answer = SearchResult | Sequence[Passage]


@dataclass(frozen=True)
class _QueuedRequest:
    loaded: Loaded
    request: SearchRequest | PassagesRequest
    deadline: float  # on the clock of time.monotonic

    @property
    def size(self) -> int:
        """The size in queries."""
        if isinstance(self.request, SearchRequest):
            return len(self.request.queries)
        return -(-len(self.request.entries) // ENTRIES_PER_QUERY)


class Engine:
    """The core of the datastore service (runtime.service.Core): what knnlm.protocols.DatastoreClient has, each call
    with the request that it belongs to."""

    def __init__(
        self,
        settings: DatastoreSettings,
        metrics: Metrics,
        open_searcher: Opener | None = None,
        open_encoder: EncoderOpener | None = None,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._cluster = ClusterOpener(settings) if settings.cluster else None
        self._pool = Pool(settings, metrics, open_searcher or self._cluster or opener(settings))
        self.updates = DocumentUpdates(settings, metrics, self._pool, open_encoder)
        self._batcher: Batcher[_QueuedRequest, _Answer] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._switches: set[asyncio.Task[DomainInfo]] = set()
        self._seconds = Histogram(
            "knnlm_search_seconds", "Time in the index per batch.", ["domain"], buckets=LATENCY_BUCKETS,
            registry=metrics.registry,
        )  # fmt: skip
        self._queries = Counter(
            "knnlm_search_queries_total", "Queries searched.", ["domain"], registry=metrics.registry
        )

    def load(self) -> None:
        if self.updates.open_encoder is None:
            self.updates.open_encoder = encoder(self._settings)
        if self._cluster is not None:
            self._cluster.connect()
        self._pool.load()

    async def start(self) -> None:
        self._batcher = Batcher(
            self._process,
            size=lambda asked: asked.size,
            group=_group,
            flow=lambda asked: asked.request.domain,
            quantum=QUANTUM_QUERIES,
            max_queue=self._settings.max_queue_queries,
            max_batch=self._settings.max_batch_queries,
            metrics=self._metrics,
            threads=self._settings.cluster_searches if self._settings.cluster else 1,
        )
        self._watching = asyncio.create_task(self._watch())

    def problems(self) -> Sequence[str]:
        return self._pool.problems()

    async def close(self) -> None:
        if self._cluster is not None:
            self._cluster.leave()
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        await self.updates.close()
        await asyncio.gather(*self._switches, return_exceptions=True)
        if self._batcher is not None:
            await self._batcher.close()
        await self._pool.close()
        if self._cluster is not None:
            await asyncio.to_thread(self._cluster.close)

    async def search(self, request: SearchRequest, call: RequestContext) -> SearchResult:
        """The neighbors; timings are those of the batch it was in, and the time in the queue.

        Raises TooLarge over a limit of this service, what Pool.get, Batcher.submit and Searcher.search raise.
        """
        self._check(request)
        result = cast(SearchResult, await self._answer(request, call))
        call.timings.update(result.timings)
        return replace(result, timings=dict(call.timings))

    async def passages(self, request: PassagesRequest, call: RequestContext) -> PassagesResult:
        """The text around each entry. Raises as `search`, with what Searcher.passages raises."""
        self._check_lookup(request)
        passages = cast(Sequence[Passage], await self._answer(request, call))
        self._check_answer(
            sum(4 * len(p.document) + 4 * len(p.before) + 4 * len(p.after) + 64 for p in passages), "entries"
        )
        return PassagesResult(request.domain, request.version, passages, dict(call.timings))

    async def _answer(self, request: SearchRequest | PassagesRequest, call: RequestContext) -> _Answer:
        if self._batcher is None:
            raise Unavailable("the domains are being loaded")
        loaded = self._pool.get(request.domain, request.version)
        with loaded.lease():
            return await self._batcher.submit(_QueuedRequest(loaded, request, call.deadline), call)

    async def list_domains(self) -> Sequence[DomainInfo]:
        return await self._pool.list()

    async def get_domain(self, domain: str, version: str | None = None) -> DomainInfo:
        return await self._pool.describe(domain, version)

    async def activate(self, domain: str, version: str, call: RequestContext) -> DomainInfo:
        """Switch a domain; see Pool.activate. Raises DeadlineExceeded when loading takes longer: it goes on then."""
        switch = asyncio.create_task(self._pool.activate(domain, version))
        self._switches.add(switch)
        switch.add_done_callback(self._switched)
        try:
            async with asyncio.timeout(call.remaining()):
                return await asyncio.shield(switch)
        except TimeoutError as err:
            raise DeadlineExceeded(
                f"version {version} is still being loaded: ask for the domain to see when it is current"
            ) from err

    def _switched(self, switch: "asyncio.Task[DomainInfo]") -> None:
        self._switches.discard(switch)
        if not switch.cancelled() and switch.exception() is not None:
            event(LOG, "activation_failed", logging.WARNING, reason=str(switch.exception()))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.watch_interval_s)
            try:
                await self._pool.look()
            except Exception:  # noqa: BLE001  the edge of a task that must outlive a bad moment of the file system
                event(LOG, "watching_failed", logging.ERROR)

    def _check(self, request: SearchRequest) -> None:
        """Limits of this service, before any work; what a search means is checked by the Searcher."""
        limits = self._settings
        if request.queries.ndim != 2:
            raise InvalidRequest(f"queries must have 2 dimensions, got {request.queries.ndim}", param="queries")
        check_exclusion(request)
        check_follow(request)
        for name, given, most in (
            ("queries", len(request.queries), limits.max_queries),
            *((name, getattr(request.options, name) or 0, getattr(limits, f"max_{name}")) for name in LIMITED_OPTIONS),
            ("follow", 0 if request.follow is None else request.follow.shape[1], limits.max_k),
            ("passages", request.passages, limits.max_passages),
            ("passage_tokens", request.passage_tokens, limits.max_passage_tokens),
        ):
            if given > most:
                raise TooLarge(f"{name} must be at most {most}, got {given}", param=name)
        text = request.passages * (PASSAGE_BYTES + 8 * request.passage_tokens)
        self._check_answer(len(request.queries) * (request.k * (16 if request.ids else 8) + text), "queries")

    def _check_lookup(self, request: PassagesRequest) -> None:
        limits = self._settings
        if not request.version:
            raise InvalidRequest("version is required: entries are numbered in one version", param="version")
        for name, given, most in (
            ("entries", request.entries.size, limits.max_entries),
            ("passage_tokens", request.passage_tokens, limits.max_passage_tokens),
        ):
            if given > most:
                raise TooLarge(f"{name} must be at most {most}, got {given}", param=name)
        self._check_answer(request.entries.size * (PASSAGE_BYTES + 8 * request.passage_tokens), "entries")

    def _check_answer(self, size: int, param: str) -> None:
        if size > self._settings.grpc_max_message_bytes - ENVELOPE_BYTES:
            raise TooLarge(
                f"the answer would have {size} bytes, at most {self._settings.grpc_max_message_bytes} can be sent: "
                f"ask for fewer {param} or less of each",
                param=param,
            )

    def _process(self, asked: Sequence[_QueuedRequest]) -> Sequence[_Answer]:
        """Answer requests of one version that want the same by one search or lookup. Called in a worker thread."""
        loaded, requests = asked[0].loaded, [item.request for item in asked]
        searches = [request for request in requests if isinstance(request, SearchRequest)]
        with outgoing(deadline=max(item.deadline for item in asked)):
            if searches:
                return self._search(loaded, searches)
            return _look_up(loaded, cast(list[PassagesRequest], requests))

    def _search(self, loaded: Loaded, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        request, sizes = requests[0], [len(request.queries) for request in requests]
        if len(requests) > 1:
            queries = np.concatenate([request.queries for request in requests])
            # each given by all of them, or by none
            excluded = [request.exclude_entries for request in requests if request.exclude_entries is not None]
            followed = [request.follow for request in requests if request.follow is not None]
            request = replace(
                request,
                queries=queries,
                exclude_entries=np.concatenate(excluded) if excluded else None,
                follow=np.concatenate(followed) if followed else None,
            )
        self._queries.labels(request.domain).inc(sum(sizes))
        with self._seconds.labels(request.domain).time():
            result = loaded.search(request)
        ends = np.cumsum([0, *sizes]).tolist()
        return [result] if len(requests) == 1 else [result.rows(start, end) for start, end in pairwise(ends)]


def _look_up(loaded: Loaded, requests: Sequence[PassagesRequest]) -> list[Sequence[Passage]]:
    entries = [request.entries for request in requests]
    passages = loaded.passages(replace(requests[0], entries=np.concatenate(entries)))
    return [passages[start:end] for start, end in pairwise(np.cumsum([0, *map(len, entries)]))]


def _group(asked: _QueuedRequest) -> tuple[object, ...]:
    """What can be answered together: of one loaded version, of one kind, and equal in all but the rows."""
    return (id(asked.loaded), type(asked.request), *asked.request.batch_key)
