"""The services over gRPC: packed arrays, every replica known by itself, calls repeated only where that is harmless.

call.py decides to which replica a call goes, fleet.py knows which there are. A client belongs to the event loop in
which it is first used; it connects then, never when it is made.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Self, TypeAlias, TypeVar

import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from knnlm.clients import affinity
from knnlm.clients.call import Caller, Connection, Service
from knnlm.clients.failures import unreachable
from knnlm.clients.replica import Metadata, Method, Replica
from knnlm.errors import DeadlineExceeded, KnnlmError, Unavailable, UnknownDomain
from knnlm.messages import (
    Document,
    DomainChange,
    DomainInfo,
    ForwardRequest,
    ForwardResult,
    ModelInfo,
    Passage,
    PassagesRequest,
    PassagesResult,
    SearchRequest,
    SearchResult,
)
from knnlm.neighbors import Neighbors
from knnlm.v1 import datastore_pb2, datastore_pb2_grpc, lm_pb2, lm_pb2_grpc
from knnlm.wire import protos

ASK_SECONDS = 5.0  # for one of several replicas to say how it is
MARGIN_SECONDS = 0.1  # before the deadline, to name the replicas that are late
POLL_SECONDS = 0.25  # between two questions which version each replica serves
MAX_PART_BYTES = 4 << 20  # bytes of neighbors in one part of an answer, packed and read in some 10 ms
MAX_SAID_CHARS = 200  # one replica's words, in an error about several
ABSENT, DOWN = "absent", "down"

Stub = TypeVar("Stub")
Message = TypeVar("Message")
Reply = TypeVar("Reply")
_LmStub: TypeAlias = "lm_pb2_grpc.LanguageModelAsyncStub"  # the stub over an aio channel, which types alone know
_Stub: TypeAlias = "datastore_pb2_grpc.DatastoreAsyncStub"

LM = Service("knnlm.v1.LanguageModel", "lm", lm_pb2_grpc.LanguageModelStub)
DATASTORE = Service("knnlm.v1.Datastore", "datastore", datastore_pb2_grpc.DatastoreStub)


@dataclass(frozen=True)
class DomainReplica:
    """One replica of a datastore service, asked about a domain.

    version: the one it answers from, None when it does not serve the domain or does not answer. state: as in
    DomainInfo; "absent" when it does not serve the domain, "down" when it does not answer, else the code of its error.
    problem: what it said then, None when all is well.
    """

    address: str
    version: str | None
    state: str
    problem: str | None

    @classmethod
    def of(cls, address: str, answer: DomainInfo | KnnlmError) -> "DomainReplica":
        if isinstance(answer, DomainInfo):
            return cls(
                address, answer.version, answer.state, answer.state if answer.state.startswith("stale") else None
            )
        if isinstance(answer, UnknownDomain):
            return cls(address, None, ABSENT, answer.message)
        state = DOWN if isinstance(answer, Unavailable | DeadlineExceeded) else answer.code
        return cls(address, None, state, answer.message)

    def __str__(self) -> str:
        said = (self.problem or self.state) if self.version is None else f"serves {self.version}, {self.state}"
        return f"{self.address} ({said[:MAX_SAID_CHARS]})"


Progress = Callable[[Sequence[DomainReplica]], None]


class _Client(Generic[Stub]):
    """A client of one service. Every method raises the KnnlmError that the service raised, Unavailable when no replica
    answers, DeadlineExceeded. Making it raises InvalidRequest for an invalid target or unusable TLS files."""

    def __init__(
        self,
        connection: Connection | str,
        service: Service[Stub],
        probe: Callable[[Replica[Stub], Metadata, float], Awaitable[None]],
    ) -> None:
        connection = Connection(connection) if isinstance(connection, str) else connection
        self._caller = Caller(connection, service, probe)

    @property
    def problem(self) -> str | None:
        """Why no replica answers, as far as is known without asking; None when one may."""
        return self._caller.fleet.problem

    async def aclose(self) -> None:
        await self._caller.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class GrpcLanguageModel(_Client["_LmStub"]):
    """An lm service of any number of replicas. connection: or its target alone. label: what an observer knows it by.

    A request with `cache` goes, sequence by sequence, to the replicas that have kept their beginnings: see affinity.py.
    """

    def __init__(self, connection: Connection | str, *, label: str = LM.label) -> None:
        super().__init__(connection, replace(LM, label=label), _check_health)
        self._beginnings = affinity.Beginnings()

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        if not request.cache:
            return await self._forward(request, None)
        await self._caller.fleet.ready(self._caller.time_limit())
        up = {replica.address.text: replica for replica in self._caller.fleet.replicas if replica.up}
        if len(up) < 2:
            return await self._forward(request, None)
        chosen: dict[str, list[int]] = {}
        for i, tokens in enumerate(request.tokens):
            chosen.setdefault(affinity.highest(self._beginnings.of(tokens), up), []).append(i)
        if len(chosen) < 2:
            return await self._forward(request, next((up[place] for place in chosen), None))
        parts = list(chosen.values())
        try:
            async with asyncio.TaskGroup() as tasks:
                calls = [
                    tasks.create_task(self._forward(affinity.part(request, part), up[place]))
                    for place, part in chosen.items()
                ]
        except* KnnlmError as errors:
            raise errors.exceptions[0] from None  # the others are cancelled
        return affinity.joined(request, parts, [call.result() for call in calls])

    async def _forward(self, request: ForwardRequest, preferred: "Replica[_LmStub] | None") -> ForwardResult:
        message = protos.forward_request_to_proto(request)
        reply = await self._caller.call(lambda stub: stub.Forward, message, preferred=preferred)
        return protos.from_proto(ForwardResult, reply)

    async def get_model(self) -> ModelInfo:
        message = lm_pb2.GetModelRequest()
        return protos.from_proto(ModelInfo, await self._caller.call(lambda stub: stub.GetModel, message))

    async def get_tokenizer(self) -> str:
        message = lm_pb2.GetModelRequest(include_tokenizer=True)
        return (await self._caller.call(lambda stub: stub.GetModel, message)).tokenizer_json

    async def get_chat_template(self) -> str | None:
        message = lm_pb2.GetModelRequest(include_chat_template=True)
        answer = await self._caller.call(lambda stub: stub.GetModel, message)
        return answer.chat_template if answer.HasField("chat_template") else None


class GrpcDatastore(_Client["_Stub"]):
    """A datastore service; see GrpcLanguageModel. Its replicas need not serve the same domains, nor the same versions
    of them for a while. `activate`, `add_documents` and `remove_documents` are sent to one replica, once, and need an
    admin key."""

    def __init__(self, connection: Connection | str) -> None:
        super().__init__(connection, DATASTORE, _ask_domains)

    async def search(self, request: SearchRequest) -> SearchResult:
        """A large answer is asked for in parts, if the request pins a version: packing and reading a message holds up
        everything else in an event loop, also from another thread."""
        number_bytes = 16 if request.ids else 8
        rows = max(1, MAX_PART_BYTES // (number_bytes * max(1, request.k)))
        if len(request.queries) <= rows or request.version is None:
            return await self._search(request)
        starts = range(0, len(request.queries), rows)
        return _below([await self._search(request.rows(start, start + rows)) for start in starts])

    async def _search(self, request: SearchRequest) -> SearchResult:
        message = protos.to_proto(request, datastore_pb2.SearchRequest)
        reply = await self._caller.call(
            lambda stub: stub.Search, message, domain=request.domain, version=request.version
        )
        return protos.from_proto(SearchResult, reply)

    async def passages(self, request: PassagesRequest) -> Sequence[Passage]:
        message = protos.to_proto(request, datastore_pb2.GetPassagesRequest)
        reply = await self._caller.call(
            lambda stub: stub.GetPassages, message, domain=request.domain, version=request.version
        )
        return protos.from_proto(PassagesResult, reply).passages

    async def list_domains(self) -> Sequence[DomainInfo]:
        """The domains of all replicas. Of one that several serve, the answer of a ready replica, if there is one."""
        await self._caller.fleet.ready(self._caller.time_limit())
        up = [replica for replica in self._caller.fleet.replicas if replica.up]
        message = datastore_pb2.ListDomainsRequest()
        given: list[datastore_pb2.ListDomainsResponse] = []
        if len(up) > 1:
            limit = min(self._caller.time_limit(), ASK_SECONDS)
            answers = await self._caller.call_each(up, lambda stub: stub.ListDomains, message, limit)
            given = [answer for answer in answers if not isinstance(answer, KnnlmError)]
        if not given:
            given = [await self._caller.call(lambda stub: stub.ListDomains, message)]
        found: dict[str, DomainInfo] = {}
        for domain in (protos.from_proto(DomainInfo, d) for reply in given for d in reply.domains):
            if domain.domain not in found or (domain.state == "ready" != found[domain.domain].state):
                found[domain.domain] = domain
        return [found[name] for name in sorted(found)]

    async def get_domain(self, domain: str, version: str | None = None) -> DomainInfo:
        message = protos.new(datastore_pb2.GetDomainRequest, domain=domain, version=version)
        reply = await self._caller.call(lambda stub: stub.GetDomain, message, domain=domain, version=version)
        return protos.from_proto(DomainInfo, reply.domain)

    async def replicas(self, domain: str) -> Sequence[DomainReplica]:
        """What each replica says of the domain now, those that are down included; every one is asked."""
        return await self._rollout(domain, self._caller.time_limit())

    async def activate(
        self, domain: str, version: str, *, wait: bool = False, progress: Progress | None = None
    ) -> DomainInfo:
        """Switch a domain. One replica is told, and returns when it serves the version; the others see it in the store.

        wait: return when every replica that serves the domain does. progress: called with what the replicas say, now
        and then. Raises DeadlineExceeded that names the replicas that are late and what they say: the switch goes on.
        """
        deadline = time.monotonic() + self._caller.time_limit() - MARGIN_SECONDS
        message = protos.new(datastore_pb2.ActivateVersionRequest, domain=domain, version=version)
        try:
            reply = await self._change(domain, lambda stub: stub.ActivateVersion, message)
        except DeadlineExceeded:
            if not wait:
                raise  # else the replica goes on loading, and those that are late are named below
        else:
            if not wait:
                return protos.from_proto(DomainInfo, reply.domain)
        await self._until_all_serve(domain, version, deadline, progress)
        return await self.get_domain(domain, version)

    async def add_documents(self, domain: str, documents: Sequence[Document], *, replace: bool = False) -> DomainChange:
        messages = [protos.to_proto(document, datastore_pb2.Document) for document in documents]
        message = protos.new(datastore_pb2.AddDocumentsRequest, domain=domain, documents=messages, replace=replace)
        reply = await self._change(domain, lambda stub: stub.AddDocuments, message)
        return protos.from_proto(DomainChange, reply.change)

    async def remove_documents(self, domain: str, ids: Sequence[str]) -> DomainChange:
        message = protos.new(datastore_pb2.RemoveDocumentsRequest, domain=domain, ids=ids)
        reply = await self._change(domain, lambda stub: stub.RemoveDocuments, message)
        return protos.from_proto(DomainChange, reply.change)

    async def _ask_each(self, domain: str, limit: float) -> list[tuple[Replica[_Stub], DomainInfo | KnnlmError]]:
        await self._caller.fleet.ready(limit)
        replicas = list(self._caller.fleet.replicas)
        message = protos.new(datastore_pb2.GetDomainRequest, domain=domain)
        limit = min(limit, ASK_SECONDS)
        answers = await self._caller.call_each(replicas, lambda stub: stub.GetDomain, message, limit)
        given = [a if isinstance(a, KnnlmError) else protos.from_proto(DomainInfo, a.domain) for a in answers]
        return list(zip(replicas, given, strict=True))

    async def _rollout(self, domain: str, limit: float) -> list[DomainReplica]:
        answers = await self._ask_each(domain, limit)
        return [DomainReplica.of(replica.address.text, answer) for replica, answer in answers]

    async def _until_all_serve(self, domain: str, version: str, deadline: float, progress: Progress | None) -> None:
        """Ask until every replica that has the domain answers from the version. Raises DeadlineExceeded."""
        while True:
            replicas = await self._rollout(domain, max(POLL_SECONDS, deadline - time.monotonic()))
            if progress is not None:
                progress(replicas)
            having = [r for r in replicas if r.state != ABSENT]
            late = [r for r in having if r.version != version]
            if having and not late:
                return
            if time.monotonic() + POLL_SECONDS >= deadline:
                if not having:
                    raise DeadlineExceeded(f"no replica serves domain {domain}")
                raise DeadlineExceeded(
                    f"{domain} {version} is not served yet by {len(late)} of {len(having)} replicas: "
                    + "; ".join(map(str, late))
                )
            await asyncio.sleep(POLL_SECONDS)

    async def _able_to_change(self, domain: str) -> Sequence[Replica[_Stub]]:
        """The replicas that can be told to change a domain: those that serve it, then the others that answer.

        Raises what they answer when all refuse to speak of it, Unavailable when none answers.
        """
        await self._caller.fleet.ready(self._caller.time_limit())
        if len(self._caller.fleet.replicas) == 1:
            return self._caller.fleet.replicas
        answers = await self._ask_each(domain, self._caller.time_limit())
        serving = [replica for replica, answer in answers if isinstance(answer, DomainInfo)]
        without = [replica for replica, answer in answers if isinstance(answer, UnknownDomain)]
        if serving or without:
            return [*serving, *without]
        errors = [answer for _, answer in answers if isinstance(answer, KnnlmError)]
        for error in errors:
            if not isinstance(error, Unavailable | DeadlineExceeded):
                raise error
        problem = "; ".join(error.message for error in errors) or "it has no address now"
        raise Unavailable(f"no replica of {DATASTORE.name} at {self._caller.connection.target} answers: {problem}")

    async def _change(
        self, domain: str, method: "Callable[[_Stub], Method[Message, Reply]]", message: Message
    ) -> Reply:
        """Tell one replica to change the domain; another only where it refused because it does not have the domain."""
        refused: UnknownDomain | None = None
        for replica in await self._able_to_change(domain):
            try:
                return await self._caller.call_once(replica, method, message, self._caller.time_limit())
            except UnknownDomain as err:
                refused = err
        raise refused or UnknownDomain(f"unknown domain {domain!r:.80}", param="domain")


def _below(parts: Sequence[SearchResult]) -> SearchResult:
    """The rows of all parts, one below the other."""
    found = [part.neighbors for part in parts]
    ids = [neighbors.ids for neighbors in found if neighbors.ids is not None]
    together = Neighbors(
        np.concatenate([neighbors.distances for neighbors in found]),
        np.concatenate([neighbors.values for neighbors in found]),
        np.concatenate(ids) if ids else None,
    )
    timings = {stage: sum(part.timings.get(stage, 0.0) for part in parts) for part in parts for stage in part.timings}
    passages = [row for part in parts for row in part.passages]
    return replace(parts[0], neighbors=together, passages=passages, timings=timings)


async def _check_health(replica: "Replica[_LmStub]", metadata: Metadata, seconds: float) -> None:
    """The standard health check, which needs no key and which services do not log. Raises Failed."""
    stub = health_pb2_grpc.HealthStub(replica.channel)
    reply = await replica.bound(stub.Check, health_pb2.HealthCheckRequest(service=LM.name), seconds, metadata)
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise unreachable(f"{replica.where} is starting or draining", heard=True)


async def _ask_domains(replica: "Replica[_Stub]", metadata: Metadata, seconds: float) -> None:
    """Learn what the replica serves, by which it is chosen. Raises Failed."""
    reply = await replica.bound(replica.stub.ListDomains, datastore_pb2.ListDomainsRequest(), seconds, metadata)
    replica.domains = {domain.domain: domain.version for domain in reply.domains}
