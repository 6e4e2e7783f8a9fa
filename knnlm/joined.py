"""Searches that are asked for at the same moment and differ in their queries alone, made as one."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from knnlm.errors import InvalidRequest
from knnlm.messages import DomainInfo, Passage, PassagesRequest, SearchRequest, SearchResult
from knnlm.protocols import DatastoreClient
from knnlm.transport.context import outgoing_deadline

MAX_ROWS = 256  # queries of one joined search; a larger one gains nothing by others beside it
TICKS = 2  # turns of the event loop, within which all sources of one step have asked


class JoinedSearches:
    """A DatastoreClient over another one. Only searches with the same deadline are joined: those of one round."""

    def __init__(self, datastore: DatastoreClient) -> None:
        self._datastore = datastore
        self._waiting: dict[object, list[tuple[SearchRequest, asyncio.Future[SearchResult]]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def search(self, request: SearchRequest) -> SearchResult:
        """Raises as the other's `search`."""
        if len(request.queries) >= MAX_ROWS or request.exclude_entries is not None or request.follow is not None:
            return await self._datastore.search(request)
        key = (request.batch_key, outgoing_deadline())
        answer: asyncio.Future[SearchResult] = asyncio.get_running_loop().create_future()
        if key not in self._waiting:
            self._waiting[key] = []
            # runs in the context of this call, whose deadline is that of all
            task = asyncio.create_task(self._make(key))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._waiting[key].append((request, answer))
        return await answer

    async def passages(self, request: PassagesRequest) -> Sequence[Passage]:
        return await self._datastore.passages(request)

    async def list_domains(self) -> Sequence[DomainInfo]:
        return await self._datastore.list_domains()

    async def get_domain(self, domain: str, version: str | None = None) -> DomainInfo:
        return await self._datastore.get_domain(domain, version)

    async def activate(self, domain: str, version: str) -> DomainInfo:
        return await self._datastore.activate(domain, version)

    async def _make(self, key: object) -> None:
        for _ in range(TICKS):
            await asyncio.sleep(0)
        waiting = [(request, answer) for request, answer in self._waiting.pop(key) if not answer.done()]
        await asyncio.gather(*(self._settle(part) for part in _parted(waiting)))

    async def _settle(self, waiting: Sequence[tuple[SearchRequest, "asyncio.Future[SearchResult]"]]) -> None:
        requests = [request for request, _ in waiting]
        outcomes: Sequence[SearchResult | Exception]
        try:
            outcomes = _split(await self._datastore.search(_joined(requests)), requests)
        except InvalidRequest as err:
            if len(waiting) > 1:  # nobody fails by what a stranger asked
                await asyncio.gather(*(self._settle([one]) for one in waiting))
                return
            outcomes = [err]
        except Exception as err:  # noqa: BLE001  the edge of a task: it is raised again where the caller waits
            outcomes = [err] * len(waiting)
        for (_, answer), outcome in zip(waiting, outcomes, strict=True):
            if answer.done():
                continue
            if isinstance(outcome, Exception):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)


def _parted(waiting: Sequence[tuple[SearchRequest, Any]]) -> list[list[tuple[SearchRequest, Any]]]:  # Any: futures
    """The requests in parts of at most MAX_ROWS queries."""
    parts: list[list[tuple[SearchRequest, Any]]] = []
    rows = MAX_ROWS
    for one in waiting:
        rows += len(one[0].queries)
        if rows > MAX_ROWS:
            parts.append([])
            rows = len(one[0].queries)
        parts[-1].append(one)
    return parts


def _joined(requests: Sequence[SearchRequest]) -> SearchRequest:
    if len(requests) == 1:
        return requests[0]
    return replace(requests[0], queries=np.concatenate([request.queries for request in requests]))


def _split(result: SearchResult, requests: Sequence[SearchRequest]) -> list[SearchResult]:
    if len(requests) == 1:
        return [result]
    ends = np.cumsum([0, *(len(request.queries) for request in requests)]).tolist()
    return [result.rows(start, end) for start, end in pairwise(ends)]
