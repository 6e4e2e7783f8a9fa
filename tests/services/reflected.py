"""The services that a gRPC server says it has."""

import asyncio

import grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.runtime.lifecycle import Host


async def reflected_services(host: Host, key: str | None = None) -> set[str]:
    """Names of the services on the gRPC port of `host`; grpc.RpcError if it refuses.

    By the blocking client: where a server refuses a stream before its first message, that of grpc.aio
    raises INTERNAL now and then in place of the status.
    """
    return await asyncio.to_thread(_ask, f"127.0.0.1:{host.grpc_port}", key)


def _ask(target: str, key: str | None) -> set[str]:
    metadata = () if key is None else (("authorization", f"Bearer {key}"),)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    with grpc.insecure_channel(target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        replies = list(stub.ServerReflectionInfo(requests, metadata=metadata, timeout=30))
    return {service.name for reply in replies for service in reply.list_services_response.service}
