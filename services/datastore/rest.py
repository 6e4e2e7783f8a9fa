"""The datastore service over HTTP: decode, one call, encode."""

import asyncio
from collections.abc import Mapping
from typing import TypeVar

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse

from knnlm.errors import InvalidRequest
from knnlm.messages import Document, DomainChange, PassagesRequest, PassagesResult, SearchRequest, SearchResult
from knnlm.v1 import datastore_pb2
from knnlm.wire.jsonable import from_json, to_json
from knnlm.wire.protos import from_proto, to_proto
from services.datastore.engine import Engine
from services.datastore.schemas import ActivateBody, DomainAnswer, DomainsAnswer, PassagesBody, SearchBody
from services.runtime.bodies import packing
from services.runtime.context import current
from services.runtime.protobuf_routes import PROTOBUF_TOO, ProtobufRoute, parse
from services.runtime.schemas import AddDocumentsBody, RemoveDocumentsBody, answer
from services.runtime.security import admin_only

Sent = TypeVar("Sent", datastore_pb2.SearchRequest, datastore_pb2.GetPassagesRequest)

SEARCH = "/v1/domains/{domain}/search"
PASSAGES = "/v1/domains/{domain}/passages"


def routes(engine: Engine) -> APIRouter:
    router = APIRouter(tags=["datastore"], route_class=packing())

    @router.post(
        SEARCH, summary="k neighbors of each query", response_model=answer(SearchResult), openapi_extra=PROTOBUF_TOO
    )
    async def search(domain: str, body: SearchBody) -> JSONResponse:
        """The answer names the version it came from; pin it in the next request to stay on it."""
        request = await asyncio.to_thread(from_json, SearchRequest, {**vars(body), "domain": domain})
        result = await engine.search(request, current())
        return await asyncio.to_thread(lambda: JSONResponse(to_json(result, body.encoding)))

    @router.post(
        PASSAGES,
        summary="The text around entries that a search has found",
        response_model=answer(PassagesResult),
        openapi_extra=PROTOBUF_TOO,
    )
    async def passages(domain: str, body: PassagesBody) -> JSONResponse:
        """Entries are numbered in one version: pin the one that the search answered from."""
        request = await asyncio.to_thread(from_json, PassagesRequest, {**vars(body), "domain": domain})
        result = await engine.passages(request, current())
        return await asyncio.to_thread(lambda: JSONResponse(to_json(result, body.encoding)))

    @router.get("/v1/domains", summary="Every domain that is served", response_model=DomainsAnswer)
    async def list_domains() -> JSONResponse:
        return JSONResponse({"domains": [to_json(info) for info in await engine.list_domains()]})

    @router.get("/v1/domains/{domain}", summary="One of them", response_model=DomainAnswer)
    async def get_domain(domain: str, version: str | None = None) -> JSONResponse:
        """The domain as it is, or as a version that is still loaded says."""
        return JSONResponse(to_json(await engine.get_domain(domain, version)))

    @router.post(
        "/v1/domains/{domain}:activate",
        summary="Switch a domain to another version (admin key)",
        response_model=DomainAnswer,
        dependencies=[Depends(admin_only)],
    )
    async def activate(domain: str, body: ActivateBody) -> JSONResponse:
        """Loads and warms the version, makes it current on disk, and returns when this replica answers from it."""
        return JSONResponse(to_json(await engine.activate(domain, body.version, current())))

    @router.post(
        "/v1/domains/{domain}/documents",
        summary="Add documents to a domain that is served (admin key)",
        response_model=answer(DomainChange),
        dependencies=[Depends(admin_only)],
    )
    async def add_documents(domain: str, body: AddDocumentsBody) -> JSONResponse:
        """Encodes them, writes a version that shares the other's files, and returns when this replica answers from it;
        other replicas follow within a second or two."""
        documents = [Document(given.id, given.text) for given in body.documents]
        return JSONResponse(to_json(await engine.updates.add(domain, documents, replace=body.replace, call=current())))

    @router.post(
        "/v1/domains/{domain}/documents:remove",
        summary="Remove documents from a domain that is served (admin key)",
        response_model=answer(DomainChange),
        dependencies=[Depends(admin_only)],
    )
    async def remove_documents(domain: str, body: RemoveDocumentsBody) -> JSONResponse:
        """None of their entries is found here from the moment this returns."""
        return JSONResponse(to_json(await engine.updates.remove(domain, body.ids, current())))

    return router


def protobuf_routes(engine: Engine) -> list[ProtobufRoute]:
    """Search and GetPassages with the message of their rpc as the body. The domain is in the path, in the message it
    may be empty."""

    async def search(parts: Mapping[str, str], body: bytes) -> bytes:
        message = _in_domain(parse(body, datastore_pb2.SearchRequest.FromString), parts["domain"])
        result = await engine.search(from_proto(SearchRequest, message), current())
        return to_proto(result, datastore_pb2.SearchResponse).SerializeToString()

    async def passages(parts: Mapping[str, str], body: bytes) -> bytes:
        message = _in_domain(parse(body, datastore_pb2.GetPassagesRequest.FromString), parts["domain"])
        result = await engine.passages(from_proto(PassagesRequest, message), current())
        return to_proto(result, datastore_pb2.GetPassagesResponse).SerializeToString()

    return [ProtobufRoute(SEARCH, search), ProtobufRoute(PASSAGES, passages)]


def _in_domain(message: Sent, domain: str) -> Sent:
    """The message, with the domain of the path."""
    if message.domain not in ("", domain):
        raise InvalidRequest(
            f"domain must be empty or that of the path, {domain!r}, got {message.domain!r}", param="domain"
        )
    message.domain = domain
    return message
