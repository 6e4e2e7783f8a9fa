"""Every route and every rpc of every service is denied without a key once keys are set: new ones too."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.descriptor import FileDescriptor
from pydantic import SecretStr

from knnlm.testing import ToyLanguageModel
from knnlm.v1 import datastore_pb2, lm_pb2
from services.aggregator.app import service as aggregator_service
from services.aggregator.page import page_files
from services.aggregator.settings import AggregatorSettings
from services.datastore.app import service as datastore_service
from services.datastore.settings import DatastoreSettings
from services.lm.app import service as lm_service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import Host, running
from services.runtime.service import Service
from tests.services.reflected import reflected_services

KEYS: Any = {"api_keys": (SecretStr("ordinary"),), "admin_api_keys": (SecretStr("admin"),), "port": 0}
PUBLIC = {"/livez", "/readyz", "/metrics"}
ADMIN = (":activate", "/documents", "/documents:remove")  # how the paths of POST end that need an admin key
ADMIN_RPCS = ("/ActivateVersion", "/AddDocuments", "/RemoveDocuments")
METHODS = ("get", "head", "post", "put", "patch", "delete", "options")


@asynccontextmanager
async def lm(tmp_path: Path) -> AsyncIterator[Service]:
    yield lm_service(LmSettings(model="toy", grpc_port=0, **KEYS), lambda _: ToyLanguageModel())


@asynccontextmanager
async def datastore(tmp_path: Path) -> AsyncIterator[Service]:
    yield datastore_service(DatastoreSettings(store=tmp_path, grpc_port=0, **KEYS))


@asynccontextmanager
async def aggregator(tmp_path: Path) -> AsyncIterator[Service]:
    """Over an lm service with other keys: those of its own callers are not good there."""
    inner = LmSettings(model="toy", port=0, grpc_port=0, api_keys=(SecretStr("inner"),))
    async with running(lm_service(inner, lambda _: ToyLanguageModel())) as host:
        yield aggregator_service(
            AggregatorSettings(
                lm_target=f"127.0.0.1:{host.grpc_port}", lm_api_key=SecretStr("inner"), datastore_target="", **KEYS
            )
        )


Make = Callable[[Path], Any]  # the service in a context manager


@pytest.mark.parametrize("make", [lm, datastore, aggregator])
async def test_every_route_but_the_probes_and_the_page_needs_a_key_by_every_method(make: Make, tmp_path: Path) -> None:
    async with (
        make(tmp_path) as service,
        running(service) as host,
        httpx.AsyncClient(base_url="http://test", transport=httpx.ASGITransport(host.app)) as client,
    ):
        key = {"authorization": "Bearer ordinary"}
        openapi = (await client.get("/openapi.json", headers=key)).json()
        files = page_files() if make is aggregator else {}
        paths = [*openapi["paths"], "/docs", "/openapi.json", "/no/such/route", "/", "/livez/", "http://test//livez"]
        paths += [*files, "/web", "/web/", "/web/no.js"]
        assert len(openapi["paths"]) > 6
        packed = {"content-type": "application/protobuf"}  # a way of its own behind the same door
        for method, path in ((method, path) for path in paths for method in METHODS):
            for headers in ({}, packed, {"authorization": "Bearer wrong"}, {"authorization": "ordinary"}):
                answer = await client.request(method, path, headers=headers)
                assert (answer.status_code == 401) == (path not in PUBLIC | set(files)), (method, path)
            answer = await client.request(method, path, headers=key)
            assert answer.status_code != 401, (method, path)
            admin = method == "post" and path.endswith(ADMIN)
            assert (answer.status_code == 403) == admin, (method, path)
        assert any(path.endswith(":activate") for path in openapi["paths"]) == (make is not lm)


@pytest.mark.parametrize(("make", "file"), [(lm, lm_pb2.DESCRIPTOR), (datastore, datastore_pb2.DESCRIPTOR)])
async def test_every_rpc_needs_a_key(make: Make, file: FileDescriptor, tmp_path: Path) -> None:
    async def code(channel: grpc.aio.Channel, method: str, key: str | None) -> grpc.StatusCode:
        metadata = () if key is None else (("authorization", f"Bearer {key}"),)
        call: Any = channel.unary_unary(method)  # without a serializer it takes bytes, which the stubs forget
        try:
            await call(b"", metadata=metadata)
        except grpc.aio.AioRpcError as err:
            return err.code()
        return grpc.StatusCode.OK

    async def reflected(host: Host, key: str | None) -> grpc.StatusCode:
        try:
            assert await reflected_services(host, key)
        except grpc.RpcError as err:
            return err.code()
        return grpc.StatusCode.OK

    methods = [
        f"/{service.full_name}/{method.name}"
        for service in file.services_by_name.values()
        for method in service.methods
    ]
    assert methods
    async with (
        make(tmp_path) as service,
        running(service) as host,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
    ):
        for key in (None, "wrong"):
            for method in methods:
                assert await code(channel, method, key) == grpc.StatusCode.UNAUTHENTICATED, method
            assert await reflected(host, key) == grpc.StatusCode.UNAUTHENTICATED
        for method in methods:
            with_key = await code(channel, method, "ordinary")
            assert with_key != grpc.StatusCode.UNAUTHENTICATED, method
            assert (with_key == grpc.StatusCode.PERMISSION_DENIED) == method.endswith(ADMIN_RPCS), method
        assert await reflected(host, "ordinary") == grpc.StatusCode.OK
