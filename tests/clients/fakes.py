"""Replicas of a datastore service that do as they are told, and names that stand for whatever a test wants."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
import numpy as np

from knnlm.clients.call import Connection, Observer
from knnlm.clients.resolve import Address, Name
from knnlm.clients.rpc import GrpcDatastore
from knnlm.errors import KnnlmError, Unavailable, UnknownDomain, UnknownVersion
from knnlm.messages import DomainInfo, PassagesResult, SearchRequest, SearchResult
from knnlm.neighbors import Neighbors
from knnlm.options import SearchOptions
from knnlm.v1 import datastore_pb2, datastore_pb2_grpc
from knnlm.wire.protos import to_proto
from services.runtime import errors

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

LOOK_SECONDS = 0.05


class Replica(datastore_pb2_grpc.DatastoreServicer):
    """Serves `domains` (each with its versions, the current one first), says who it is in the values it finds.

    hang: answer nothing at all. refuse: answer every call with this. slow: hold searches until they are let go. broken:
    end every search with this status, which is gRPC's own.
    """

    def __init__(self, number: int, **domains: tuple[str, ...]) -> None:
        self.number = number
        self.domains = dict(domains) or {"law": ("v1",)}
        self.hang = False
        self.refuse: KnnlmError | None = None
        self.broken: tuple[grpc.StatusCode, str] | None = None
        self.slow = False
        self.let_go = asyncio.Event()
        self.asked: Counter[str] = Counter()
        self.cancelled = 0
        self.metadata: list[dict[str, str]] = []
        self.time_left: list[float] = []
        self.port = 0
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self, credentials: grpc.ServerCredentials | None = None) -> None:
        """Listen, where it did before if it did."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        datastore_pb2_grpc.add_DatastoreServicer_to_server(self, self._server)
        where = f"127.0.0.1:{self.port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(where)
        else:
            self.port = self._server.add_secure_port(where, credentials)
        await self._server.start()

    async def stop(self) -> None:
        """As killed: what is under way is broken off."""
        if self._server is not None:
            await self._server.stop(None)

    # methods are named as in datastore.proto
    async def Search(self, request: datastore_pb2.SearchRequest, context: Context) -> datastore_pb2.SearchResponse:  # noqa: N802
        await self._enter("Search", context)
        if self.broken is not None:
            await context.abort(*self.broken)
        version = await self._version(request.domain, request.version, context)
        if self.slow:
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        found = Neighbors(np.zeros((1, 1), np.float32), np.full((1, 1), self.number, np.int32))
        return to_proto(SearchResult(request.domain, version, found), datastore_pb2.SearchResponse)

    async def GetPassages(  # noqa: N802
        self, request: datastore_pb2.GetPassagesRequest, context: Context
    ) -> datastore_pb2.GetPassagesResponse:
        await self._enter("GetPassages", context)
        version = await self._version(request.domain, request.version, context)
        return to_proto(PassagesResult(request.domain, version, []), datastore_pb2.GetPassagesResponse)

    async def ListDomains(  # noqa: N802
        self,
        request: datastore_pb2.ListDomainsRequest,  # noqa: ARG002
        context: Context,
    ) -> datastore_pb2.ListDomainsResponse:
        await self._enter("ListDomains", context)
        infos = [self._info(domain, versions[0]) for domain, versions in self.domains.items()]
        return datastore_pb2.ListDomainsResponse(domains=[to_proto(info, datastore_pb2.Domain) for info in infos])

    async def GetDomain(  # noqa: N802
        self,
        request: datastore_pb2.GetDomainRequest,
        context: Context,
    ) -> datastore_pb2.GetDomainResponse:
        await self._enter("GetDomain", context)
        version = await self._version(request.domain, request.version, context)
        return datastore_pb2.GetDomainResponse(
            domain=to_proto(self._info(request.domain, version), datastore_pb2.Domain)
        )

    async def ActivateVersion(  # noqa: N802
        self,
        request: datastore_pb2.ActivateVersionRequest,
        context: Context,
    ) -> datastore_pb2.ActivateVersionResponse:
        await self._enter("ActivateVersion", context)
        await self._version(request.domain, "", context)
        self.switch(request.domain, request.version)
        info = self._info(request.domain, request.version)
        return datastore_pb2.ActivateVersionResponse(domain=to_proto(info, datastore_pb2.Domain))

    async def RemoveDocuments(  # noqa: N802
        self,
        request: datastore_pb2.RemoveDocumentsRequest,
        context: Context,
    ) -> datastore_pb2.RemoveDocumentsResponse:
        await self._enter("RemoveDocuments", context)
        change = datastore_pb2.DomainChange(domain=request.domain, removed_documents=len(request.ids))
        return datastore_pb2.RemoveDocumentsResponse(change=change)

    async def AddDocuments(  # noqa: N802
        self,
        request: datastore_pb2.AddDocumentsRequest,
        context: Context,
    ) -> datastore_pb2.AddDocumentsResponse:
        await self._enter("AddDocuments", context)
        change = datastore_pb2.DomainChange(domain=request.domain, added_documents=len(request.documents))
        return datastore_pb2.AddDocumentsResponse(change=change)

    def switch(self, domain: str, version: str) -> None:
        self.domains[domain] = (version, *(v for v in self.domains.get(domain, ()) if v != version))

    async def _enter(self, method: str, context: Context) -> None:
        self.asked[method] += 1
        self.metadata.append({str(k): str(v) for k, v in context.invocation_metadata() or ()})
        self.time_left.append(float(context.time_remaining()))  # every call has a deadline
        if self.hang:
            await asyncio.Event().wait()
        if self.refuse is not None:
            await abort(context, self.refuse)

    async def _version(self, domain: str, version: str, context: Context) -> str:
        if domain not in self.domains:
            await abort(context, UnknownDomain(f"unknown domain {domain}", param="domain"))
        versions = self.domains[domain]
        if version and version not in versions:
            await abort(context, UnknownVersion(f"no {version} of {domain}", param="version"))
        return version or versions[0]

    def _info(self, domain: str, version: str) -> DomainInfo:
        return DomainInfo(
            domain=domain, version=version, versions=sorted(self.domains[domain]), state="ready", entries=1,
            documents=1, key_dim=1, key_dtype="float32", key_function="toy", index="flat", model_id="toy",
            weights_sha256="", tokenizer_sha256="", tuning=None,
        )  # fmt: skip


async def abort(context: Context, error: KnnlmError) -> None:
    await context.abort(errors.row(error).grpc, error.message, errors.metadata(error))


DRAINING = Unavailable("the service is draining")


@asynccontextmanager
async def listening(*replicas: Replica) -> AsyncIterator[str]:
    """The replicas as servers; the target that names them all."""
    async with contextlib.AsyncExitStack() as stack:
        for replica in replicas:
            await replica.start()
            stack.push_async_callback(replica.stop)
        yield ",".join(replica.address for replica in replicas)


def search(domain: str = "law", version: str | None = None) -> SearchRequest:
    return SearchRequest(domain, np.zeros((1, 1), np.float32), SearchOptions(k=1), version=version)


def number(result: SearchResult) -> int:
    """Which replica answered."""
    return int(result.neighbors.values[0, 0])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  what is waited for is on the other side of a connection
            await asyncio.sleep(0.01)


class Names:
    """Stands in for name servers: every name means `addresses`, or nothing can be said while `away`."""

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.away = False

    async def resolve(self, name: Name) -> tuple[Address, ...] | None:
        await asyncio.sleep(0)
        texts = [f"127.0.0.1:{port}" for port in self.ports]
        return None if self.away else tuple(Address(text, f"ipv4:{text}", name) for text in texts) or None


class Recorder(Observer):
    """An observer that writes everything down."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, float]] = []
        self.retries: list[str] = []
        self.problems: list[tuple[str, str | None]] = []
        self.counts: tuple[int, int] = (0, 0)

    def called(self, service: str, code: str, seconds: float) -> None:
        self.calls.append((service, code, seconds))

    def retried(self, service: str) -> None:
        self.retries.append(service)

    def replica(self, service: str, address: str, problem: str | None) -> None:  # noqa: ARG002
        self.problems.append((address, problem))

    def replicas(self, service: str, up: int, down: int) -> None:  # noqa: ARG002
        self.counts = (up, down)


def quick(target: str, **options: Any) -> GrpcDatastore:  # Any: what Connection takes
    """A client that looks at its replicas twenty times as often."""
    return GrpcDatastore(Connection(target, look_seconds=LOOK_SECONDS, **options))


def probed(*replicas: Replica) -> bool:
    """Whether the first probe of each was answered: the second follows it."""
    return all(replica.asked["ListDomains"] > 1 for replica in replicas)


async def together(*calls: Awaitable[SearchResult]) -> list[int]:
    return [number(result) for result in await asyncio.gather(*calls)]


def now() -> float:
    return time.monotonic()
