"""The services over gRPC: packed arrays, every replica known by itself, calls made again only where that is harmless.

caller.py says to whom a call goes, fleet.py who there is. A client belongs to the event loop in which it is first used;
it connects then, never when it is made. What must not be done twice goes to one replica, once: ActivateVersion,
AddDocuments and RemoveDocuments.
"""

import time
from collections.abc import Callable, Sequence
from typing import Self, TypeAlias, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from knnlm.clients.caller import Caller
from knnlm.clients.context import time_limit
from knnlm.clients.failure import Failed, Kind
from knnlm.clients.observer import Observer
from knnlm.clients.replica import HTTP2, MAX_MESSAGE_BYTES, Metadata, Method, Replica
from knnlm.clients.request import Options, Service
from knnlm.clients.rollout import DomainReplica, Progress, replica_says, until_all_serve
from knnlm.clients.secrets import ApiKey
from knnlm.clients.tls import Tls
from knnlm.errors import DeadlineExceeded, KnnlmError, Unavailable, UnknownDomain
from knnlm.messages import (
    Document,
    DomainChange,
    DomainInfo,
    ForwardRequest,
    ForwardResult,
    ModelInfo,
    SearchRequest,
    SearchResult,
)
from knnlm.v1 import datastore_pb2, datastore_pb2_grpc, lm_pb2, lm_pb2_grpc
from knnlm.wire import growth, protos

__all__ = ["HTTP2", "MAX_MESSAGE_BYTES", "GrpcDatastore", "GrpcLanguageModel"]

ASK_SECONDS = 5.0  # what one of several replicas gets to say how it is
MARGIN_SECONDS = 0.1  # between knowing who is late and the deadline, to say it in

Message = TypeVar("Message")
Reply = TypeVar("Reply")
_Lm: TypeAlias = "Replica[lm_pb2_grpc.LanguageModelAsyncStub]"  # the stub over an aio channel, which types alone know
_Stub: TypeAlias = "datastore_pb2_grpc.DatastoreAsyncStub"
_Replica: TypeAlias = "Replica[datastore_pb2_grpc.DatastoreAsyncStub]"

LM = Service("knnlm.v1.LanguageModel", "lm", lm_pb2_grpc.LanguageModelStub)
DATASTORE = Service("knnlm.v1.Datastore", "datastore", datastore_pb2_grpc.DatastoreStub)


class GrpcLanguageModel:
    """An lm service of any number of replicas. target: host:port, [IPv6]:port, dns:///host:port, or several of them
    with commas between; a name stands for all its addresses, and is resolved again every few seconds.

    api_key: itself, or what tells it for each call (a knnlm.clients.secrets.SecretFile). timeout: seconds per call; a
    request's deadline is kept too. wait: seconds for which a call is made again while nobody answers. hedge: ask a
    second replica when the first takes unusually long. observer: hears how calls go.

    Every method raises the KnnlmError the service raised, Unavailable when there is no service, DeadlineExceeded.
    Making it raises InvalidRequest for a target that is none, and for files of TLS that cannot be used.
    """

    def __init__(
        self,
        target: str,
        *,
        api_key: ApiKey = None,
        timeout: float = 60.0,
        tls: Tls | None = None,
        wait: float = 1.0,
        hedge: bool = True,
        observer: Observer | None = None,
    ) -> None:
        self._caller = Caller(target, LM, Options(api_key, timeout, tls, wait, hedge, observer), _health)

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        message = protos.forward_request_to_proto(request)
        tokens, rows = sum(map(len, request.tokens)), sum(map(len, request.positions))
        kind = ("Forward", tokens.bit_length(), rows.bit_length(), request.full)
        return protos.forward_result_from_proto(await self._caller.call(lambda stub: stub.Forward, message, kind))

    async def get_model(self) -> ModelInfo:
        return protos.model_from_proto(await self._get_model(tokenizer=False))

    async def get_tokenizer(self) -> str:
        return (await self._get_model(tokenizer=True)).tokenizer_json

    async def _get_model(self, *, tokenizer: bool) -> lm_pb2.GetModelResponse:
        return await self._caller.call(
            lambda stub: stub.GetModel, lm_pb2.GetModelRequest(include_tokenizer=tokenizer), ("GetModel", tokenizer)
        )

    async def aclose(self) -> None:
        await self._caller.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class GrpcDatastore:
    """A datastore service; see GrpcLanguageModel. Its replicas need not serve the same domains, or the same versions of
    them for a while. `activate`, `add_documents` and `remove_documents` are made once, and need an admin key."""

    def __init__(
        self,
        target: str,
        *,
        api_key: ApiKey = None,
        timeout: float = 60.0,
        tls: Tls | None = None,
        wait: float = 1.0,
        hedge: bool = True,
        observer: Observer | None = None,
    ) -> None:
        self._caller = Caller(target, DATASTORE, Options(api_key, timeout, tls, wait, hedge, observer), _domains)

    @property
    def problem(self) -> str | None:
        """Why nobody answers, as far as is known without asking; None when somebody may."""
        return self._caller.fleet.problem

    async def search(self, request: SearchRequest) -> SearchResult:
        message = protos.search_request_to_proto(request)
        kind = ("Search", len(request.queries).bit_length(), request.k.bit_length(), request.passages > 0)
        reply = await self._caller.call(
            lambda stub: stub.Search, message, kind, domain=request.domain, version=request.version
        )
        return protos.search_result_from_proto(reply)

    async def list_domains(self) -> Sequence[DomainInfo]:
        """The domains of all replicas. Of one that several serve, what a replica says where it is ready, if any is."""
        await self._caller.fleet.ready(time_limit(self._caller.timeout))
        up = [replica for replica in self._caller.fleet.replicas if replica.up]
        message = datastore_pb2.ListDomainsRequest()
        if len(up) < 2:
            reply = await self._caller.call(lambda stub: stub.ListDomains, message, ("ListDomains",))
            return [protos.domain_from_proto(domain) for domain in reply.domains]
        limit = min(time_limit(self._caller.timeout), ASK_SECONDS)
        answers = await self._caller.every(up, lambda stub: stub.ListDomains, message, limit)
        given = [answer for answer in answers if not isinstance(answer, KnnlmError)]
        if not given:
            reply = await self._caller.call(lambda stub: stub.ListDomains, message, ("ListDomains",))
            given = [reply]
        found: dict[str, DomainInfo] = {}
        for domain in (protos.domain_from_proto(d) for reply in given for d in reply.domains):
            if domain.domain not in found or (domain.state == "ready" != found[domain.domain].state):
                found[domain.domain] = domain
        return [found[name] for name in sorted(found)]

    async def get_domain(self, domain: str, version: str | None = None) -> DomainInfo:
        reply = await self._caller.call(
            lambda stub: stub.GetDomain,
            protos.packed(datastore_pb2.GetDomainRequest, domain=domain, version=version),
            ("GetDomain",),
            domain=domain,
            version=version,
        )
        return protos.domain_from_proto(reply.domain)

    async def replicas(self, domain: str) -> Sequence[DomainReplica]:
        """What each replica says of the domain now, those that are down included; every one is asked."""
        return await self._rollout(domain, time_limit(self._caller.timeout))

    async def activate(
        self, domain: str, version: str, *, wait: bool = False, progress: Progress | None = None
    ) -> DomainInfo:
        """Switch a domain. One replica is told, and returns when it serves the version; the others see it in the store.

        wait: return when every replica that serves the domain does. progress: told what they say, now and then. Raises
        DeadlineExceeded that names the replicas that were not there in time, and what they say: the switch goes on.
        """
        deadline = time.monotonic() + time_limit(self._caller.timeout) - MARGIN_SECONDS
        message = protos.packed(datastore_pb2.ActivateVersionRequest, domain=domain, version=version)
        try:
            reply = await self._change(domain, lambda stub: stub.ActivateVersion, message)
        except DeadlineExceeded:
            if not wait:
                raise  # else the replica goes on loading, and those that are late are named below
        else:
            if not wait:
                return protos.domain_from_proto(reply.domain)

        await until_all_serve(domain, version, lambda limit: self._rollout(domain, limit), deadline, progress)
        return await self.get_domain(domain, version)

    async def add_documents(self, domain: str, documents: Sequence[Document], *, replace: bool = False) -> DomainChange:
        message = growth.add_to_proto(domain, documents, replace=replace)
        reply = await self._change(domain, lambda stub: stub.AddDocuments, message)
        return growth.change_from_proto(reply.change)

    async def remove_documents(self, domain: str, ids: Sequence[str]) -> DomainChange:
        message = protos.packed(datastore_pb2.RemoveDocumentsRequest, domain=domain, ids=ids)
        reply = await self._change(domain, lambda stub: stub.RemoveDocuments, message)
        return growth.change_from_proto(reply.change)

    async def aclose(self) -> None:
        await self._caller.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def _say(self, domain: str, limit: float) -> list[tuple[_Replica, DomainInfo | KnnlmError]]:
        await self._caller.fleet.ready(limit)
        replicas = list(self._caller.fleet.replicas)
        message = protos.packed(datastore_pb2.GetDomainRequest, domain=domain)
        answers = await self._caller.every(replicas, lambda stub: stub.GetDomain, message, limit)
        given = [a if isinstance(a, KnnlmError) else protos.domain_from_proto(a.domain) for a in answers]
        return list(zip(replicas, given, strict=True))

    async def _rollout(self, domain: str, limit: float) -> Sequence[DomainReplica]:
        said = await self._say(domain, min(limit, ASK_SECONDS))
        return [replica_says(replica.address.text, answer) for replica, answer in said]

    async def _tellable(self, domain: str) -> Sequence[_Replica]:
        """Who can be told to change a domain: who serves it, then who else answers.

        Raises what they say when all refuse to speak of it, Unavailable when nobody answers.
        """
        await self._caller.fleet.ready(time_limit(self._caller.timeout))
        if len(self._caller.fleet.replicas) == 1:
            return self._caller.fleet.replicas
        said = await self._say(domain, min(time_limit(self._caller.timeout), ASK_SECONDS))
        serving = [replica for replica, answer in said if isinstance(answer, DomainInfo)]
        without = [replica for replica, answer in said if isinstance(answer, UnknownDomain)]
        if serving or without:
            return [*serving, *without]
        errors = [answer for _, answer in said if isinstance(answer, KnnlmError)]
        for error in errors:
            if not isinstance(error, Unavailable | DeadlineExceeded):
                raise error
        problem = "; ".join(error.message for error in errors) or "it has no address now"
        raise Unavailable(f"no replica of {DATASTORE.name} at {self._caller.target} answers: {problem}")

    async def _change(
        self, domain: str, method: "Callable[[_Stub], Method[Message, Reply]]", message: Message
    ) -> Reply:
        """Ask one replica to change the domain; another one only where it has refused because it never has that one."""
        refused: UnknownDomain | None = None
        for replica in await self._tellable(domain):
            try:
                return await self._caller.once(replica, method, message, time_limit(self._caller.timeout))
            except UnknownDomain as err:
                refused = err
        raise refused or UnknownDomain(f"unknown domain {domain!r:.80}", param="domain")


async def _health(replica: _Lm, metadata: Metadata, seconds: float) -> None:
    """The standard health check, which needs no key and leaves no line in the service's log."""
    stub = health_pb2_grpc.HealthStub(replica.channel)
    reply = await replica.once(stub.Check, health_pb2.HealthCheckRequest(service=LM.name), seconds, metadata)
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise Failed(Kind.AWAY, Unavailable(f"{replica.where} is starting or draining"), grpc.StatusCode.UNAVAILABLE)


async def _domains(replica: _Replica, metadata: Metadata, seconds: float) -> None:
    """What it serves, which is what it is chosen by."""
    reply = await replica.once(replica.stub.ListDomains, datastore_pb2.ListDomainsRequest(), seconds, metadata)
    replica.serves({domain.domain: domain.version for domain in reply.domains})
