"""A running service and a client per face: gRPC, HTTP with lists, with packed arrays, with protobuf."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from knnlm.clients.http import HttpDatastore, HttpLanguageModel
from knnlm.clients.rpc import GrpcDatastore, GrpcLanguageModel
from knnlm.protocols import DatastoreClient, LanguageModelClient
from services.runtime.lifecycle import Host, running
from services.runtime.service import Service


@asynccontextmanager
async def lm_faces(service: Service) -> AsyncIterator[tuple[Host, dict[str, LanguageModelClient]]]:
    async with running(service) as host:
        transport = httpx.ASGITransport(host.app)
        async with (
            GrpcLanguageModel(f"127.0.0.1:{host.grpc_port}") as grpc,
            HttpLanguageModel("http://test", encoding="list", transport=transport) as lists,
            HttpLanguageModel("http://test", encoding="base64", transport=transport) as packed,
            HttpLanguageModel("http://test", transport=transport) as protobuf,
        ):
            yield host, {"grpc": grpc, "http list": lists, "http base64": packed, "http protobuf": protobuf}


@asynccontextmanager
async def datastore_faces(service: Service) -> AsyncIterator[tuple[Host, dict[str, DatastoreClient]]]:
    async with running(service) as host:
        transport = httpx.ASGITransport(host.app)
        async with (
            GrpcDatastore(f"127.0.0.1:{host.grpc_port}") as grpc,
            HttpDatastore("http://test", encoding="list", transport=transport) as lists,
            HttpDatastore("http://test", encoding="base64", transport=transport) as packed,
            HttpDatastore("http://test", transport=transport) as protobuf,
        ):
            yield host, {"grpc": grpc, "http list": lists, "http base64": packed, "http protobuf": protobuf}
