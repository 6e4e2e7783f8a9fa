"""The datastore service over gRPC: decode, one call, encode."""

from typing import Any, TypeAlias

import grpc

from knnlm.messages import Document, PassagesRequest, SearchRequest
from knnlm.v1 import datastore_pb2, datastore_pb2_grpc
from knnlm.wire.protos import from_proto, to_proto
from services.datastore.engine import Engine
from services.runtime.context import current
from services.runtime.security import admin_only
from services.runtime.service import RpcService

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"  # generic over messages in the stubs only


def rpc_service(engine: Engine) -> RpcService:
    return RpcService(
        "knnlm.v1.Datastore",
        lambda server: datastore_pb2_grpc.add_DatastoreServicer_to_server(_Servicer(engine), server),
    )


class _Servicer(datastore_pb2_grpc.DatastoreServicer):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # methods are named as in datastore.proto
    async def Search(  # noqa: N802
        self,
        request: datastore_pb2.SearchRequest,
        context: Context,  # noqa: ARG002
    ) -> datastore_pb2.SearchResponse:
        result = await self._engine.search(from_proto(SearchRequest, request), current())
        return to_proto(result, datastore_pb2.SearchResponse)

    async def GetPassages(  # noqa: N802
        self,
        request: datastore_pb2.GetPassagesRequest,
        context: Context,  # noqa: ARG002
    ) -> datastore_pb2.GetPassagesResponse:
        result = await self._engine.passages(from_proto(PassagesRequest, request), current())
        return to_proto(result, datastore_pb2.GetPassagesResponse)

    async def ListDomains(  # noqa: N802
        self,
        request: datastore_pb2.ListDomainsRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> datastore_pb2.ListDomainsResponse:
        infos = await self._engine.list_domains()
        return datastore_pb2.ListDomainsResponse(domains=[to_proto(info, datastore_pb2.Domain) for info in infos])

    async def GetDomain(  # noqa: N802
        self,
        request: datastore_pb2.GetDomainRequest,
        context: Context,  # noqa: ARG002
    ) -> datastore_pb2.GetDomainResponse:
        version = request.version if request.HasField("version") else None
        info = await self._engine.get_domain(request.domain, version)
        return datastore_pb2.GetDomainResponse(domain=to_proto(info, datastore_pb2.Domain))

    async def ActivateVersion(  # noqa: N802
        self,
        request: datastore_pb2.ActivateVersionRequest,
        context: Context,  # noqa: ARG002
    ) -> datastore_pb2.ActivateVersionResponse:
        await admin_only()
        info = await self._engine.activate(request.domain, request.version, current())
        return datastore_pb2.ActivateVersionResponse(domain=to_proto(info, datastore_pb2.Domain))

    async def AddDocuments(  # noqa: N802
        self,
        request: datastore_pb2.AddDocumentsRequest,
        context: Context,  # noqa: ARG002
    ) -> datastore_pb2.AddDocumentsResponse:
        await admin_only()
        documents = [from_proto(Document, document) for document in request.documents]
        change = await self._engine.updates.add(request.domain, documents, replace=request.replace, call=current())
        return datastore_pb2.AddDocumentsResponse(change=to_proto(change, datastore_pb2.DomainChange))

    async def RemoveDocuments(  # noqa: N802
        self,
        request: datastore_pb2.RemoveDocumentsRequest,
        context: Context,  # noqa: ARG002
    ) -> datastore_pb2.RemoveDocumentsResponse:
        await admin_only()
        change = await self._engine.updates.remove(request.domain, list(request.ids), current())
        return datastore_pb2.RemoveDocumentsResponse(change=to_proto(change, datastore_pb2.DomainChange))
