"""The services over gRPC: packed arrays, every replica behind a name in turn, retries only where they are harmless.

A channel belongs to the event loop it is first used in; the clients open it then, never at import.
"""

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, Protocol, Self, TypeVar

import grpc

from knnlm.clients.context import outgoing_id, time_limit
from knnlm.clients.errors import rebuild
from knnlm.errors import DeadlineExceeded, KnnlmError, TooLarge, Unavailable
from knnlm.messages import DomainInfo, ForwardRequest, ForwardResult, ModelInfo, SearchRequest, SearchResult
from knnlm.v1 import datastore_pb2, datastore_pb2_grpc, lm_pb2, lm_pb2_grpc
from knnlm.wire import protos

__all__ = ["HTTP2", "GrpcDatastore", "GrpcLanguageModel"]

MAX_MESSAGE_BYTES = 64 << 20
IDEMPOTENT = {
    "knnlm.v1.LanguageModel": ("Forward", "GetModel"),
    "knnlm.v1.Datastore": ("Search", "ListDomains", "GetDomain"),
}

# an answer of 64 queries has 512 KiB: fewer, larger frames, and a window that need not grow to it first
HTTP2 = (("grpc.http2.max_frame_size", 1 << 20), ("grpc.http2.lookahead_bytes", 4 << 20))

Stub = TypeVar("Stub")
Reply = TypeVar("Reply", covariant=True)
Message = TypeVar("Message", contravariant=True)


class _Method(Protocol[Message, Reply]):
    def __call__(
        self, message: Message, /, *, timeout: float, metadata: Sequence[tuple[str, str]]
    ) -> Awaitable[Reply]: ...


class GrpcLanguageModel:
    """An lm service. target: host:port, or any gRPC name. timeout: seconds per call; a request's deadline is kept too.

    Every method raises the KnnlmError the service raised, Unavailable when there is no service, DeadlineExceeded.
    """

    def __init__(self, target: str, *, api_key: str | None = None, timeout: float = 60.0) -> None:
        self._link = _Link(target, "knnlm.v1.LanguageModel", lm_pb2_grpc.LanguageModelStub, api_key, timeout)

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        message = protos.forward_request_to_proto(request)
        return protos.forward_result_from_proto(await self._link.call(lambda stub: stub.Forward, message))

    async def get_model(self) -> ModelInfo:
        return protos.model_from_proto(await self._get_model(tokenizer=False))

    async def get_tokenizer(self) -> str:
        return (await self._get_model(tokenizer=True)).tokenizer_json

    async def _get_model(self, *, tokenizer: bool) -> lm_pb2.GetModelResponse:
        return await self._link.call(
            lambda stub: stub.GetModel,
            lm_pb2.GetModelRequest(include_tokenizer=tokenizer),
        )

    async def aclose(self) -> None:
        await self._link.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class GrpcDatastore:
    """A datastore service; see GrpcLanguageModel. `activate` is not retried, and needs an admin key."""

    def __init__(self, target: str, *, api_key: str | None = None, timeout: float = 60.0) -> None:
        self._link = _Link(target, "knnlm.v1.Datastore", datastore_pb2_grpc.DatastoreStub, api_key, timeout)

    async def search(self, request: SearchRequest) -> SearchResult:
        message = protos.search_request_to_proto(request)
        return protos.search_result_from_proto(await self._link.call(lambda stub: stub.Search, message))

    async def list_domains(self) -> Sequence[DomainInfo]:
        reply = await self._link.call(lambda stub: stub.ListDomains, datastore_pb2.ListDomainsRequest())
        return [protos.domain_from_proto(domain) for domain in reply.domains]

    async def get_domain(self, domain: str, version: str | None = None) -> DomainInfo:
        reply = await self._link.call(
            lambda stub: stub.GetDomain,
            datastore_pb2.GetDomainRequest(domain=domain, version=version),
        )
        return protos.domain_from_proto(reply.domain)

    async def activate(self, domain: str, version: str) -> DomainInfo:
        reply = await self._link.call(
            lambda stub: stub.ActivateVersion,
            datastore_pb2.ActivateVersionRequest(domain=domain, version=version),
        )
        return protos.domain_from_proto(reply.domain)

    async def aclose(self) -> None:
        await self._link.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class _Link(Generic[Stub]):
    """One channel to one service, and what every call over it has in common."""

    def __init__(
        self,
        target: str,
        service: str,
        stub: Callable[[grpc.aio.Channel], Stub],
        api_key: str | None,
        timeout: float,
    ) -> None:
        self._target = target
        self._service = service
        self._make_stub = stub
        self._authorization = [] if api_key is None else [("authorization", f"Bearer {api_key}")]
        self._timeout = timeout
        self._channel: grpc.aio.Channel | None = None
        self._stub: Stub | None = None

    async def call(self, method: Callable[[Stub], _Method[Message, Reply]], message: Message) -> Reply:
        if self._stub is None:
            self._channel = _open(self._target, self._service)
            self._stub = self._make_stub(self._channel)
        metadata = list(self._authorization)
        request_id = outgoing_id()
        if request_id is not None:
            metadata.append(("x-request-id", request_id))
        try:
            return await method(self._stub)(message, timeout=time_limit(self._timeout), metadata=metadata)
        except grpc.aio.AioRpcError as err:
            raise self._translated(err) from err

    async def aclose(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    def _translated(self, err: grpc.aio.AioRpcError) -> KnnlmError:
        given = {key: value for key, value in err.trailing_metadata() or () if isinstance(value, str)}
        details = err.details() or ""
        if "knnlm-error-code" in given:
            return rebuild(
                given["knnlm-error-code"],
                details,
                param=given.get("knnlm-error-param"),
                retry_after=given.get("retry-after"),
            )
        where = f"{self._service} at {self._target}"
        match err.code():  # gRPC itself failed, not the service
            case grpc.StatusCode.UNAVAILABLE:
                return Unavailable(f"{where} does not answer: {details}")
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return DeadlineExceeded(f"{where} did not answer in time")
            case grpc.StatusCode.RESOURCE_EXHAUSTED:  # what it says about messages over a size limit
                return TooLarge(f"{where}: {details}")
            case code:
                return KnnlmError(f"{where}: {code.name} {details}")


def _open(target: str, service: str) -> grpc.aio.Channel:
    config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": service},
        "methodConfig": [
            {
                "name": [{"service": service, "method": method} for method in IDEMPOTENT[service]],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
    return grpc.aio.insecure_channel(
        target if "://" in target or target.startswith(("unix:", "dns:", "ipv4:", "ipv6:")) else f"dns:///{target}",
        options=[
            ("grpc.service_config", json.dumps(config)),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            *HTTP2,
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # a service that comes back is found within seconds; the default waits up to two minutes
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ],
    )
