"""Every route and every rpc of every service is denied without a key once keys are set: new ones too."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.descriptor import FileDescriptor
from pydantic import SecretStr

from knnlm.testing import ToyLanguageModel
from knnlm.v1 import datastore_pb2, lm_pb2
from services.datastore.app import service as datastore_service
from services.datastore.settings import DatastoreSettings
from services.lm.app import service as lm_service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import running
from services.runtime.service import Service

KEYS: Any = {"api_keys": (SecretStr("ordinary"),), "admin_api_keys": (SecretStr("admin"),), "port": 0, "grpc_port": 0}
PUBLIC = {"/livez", "/readyz", "/metrics"}


def lm(tmp_path: Path) -> Service:
    return lm_service(LmSettings(model="toy", **KEYS), lambda _: ToyLanguageModel())


def datastore(tmp_path: Path) -> Service:
    return datastore_service(DatastoreSettings(store=tmp_path, **KEYS))


@pytest.mark.parametrize("make", [lm, datastore])
def test_every_route_but_the_probes_needs_a_key(make: Callable[[Path], Service], tmp_path: Path) -> None:
    async def check() -> None:
        async with (
            running(make(tmp_path)) as host,
            httpx.AsyncClient(base_url="http://test", transport=httpx.ASGITransport(host.app)) as client,
        ):
            key = {"authorization": "Bearer ordinary"}
            openapi = (await client.get("/openapi.json", headers=key)).json()
            routes = [(method, path) for path, methods in openapi["paths"].items() for method in methods]
            routes += [("get", "/docs"), ("get", "/openapi.json"), ("get", "/no/such/route")]
            assert len(routes) > 6
            for method, path in routes:
                packed = {"content-type": "application/protobuf"}  # a way of its own behind the same door
                for headers in ({}, packed, {"authorization": "Bearer wrong"}, {"authorization": "ordinary"}):
                    answer = await client.request(method, path, headers=headers)
                    assert (answer.status_code == 401) == (path not in PUBLIC), (method, path)
                answer = await client.request(method, path, headers=key)
                assert answer.status_code != 401, (method, path)
                assert (answer.status_code == 403) == path.endswith(":activate"), (method, path)

    asyncio.run(check())


@pytest.mark.parametrize(("make", "file"), [(lm, lm_pb2.DESCRIPTOR), (datastore, datastore_pb2.DESCRIPTOR)])
def test_every_rpc_needs_a_key(make: Callable[[Path], Service], file: FileDescriptor, tmp_path: Path) -> None:
    async def code(channel: grpc.aio.Channel, method: str, key: str | None) -> grpc.StatusCode:
        metadata = () if key is None else (("authorization", f"Bearer {key}"),)
        call: Any = channel.unary_unary(method)  # without a serializer it takes bytes, which the stubs forget
        try:
            await call(b"", metadata=metadata)
        except grpc.aio.AioRpcError as err:
            return err.code()
        return grpc.StatusCode.OK

    async def check() -> None:
        methods = [
            f"/{service.full_name}/{method.name}"
            for service in file.services_by_name.values()
            for method in service.methods
        ]
        assert methods
        async with (
            running(make(tmp_path)) as host,
            grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
        ):
            for method in methods:
                assert await code(channel, method, None) == grpc.StatusCode.UNAUTHENTICATED, method
                assert await code(channel, method, "wrong") == grpc.StatusCode.UNAUTHENTICATED, method
                with_key = await code(channel, method, "ordinary")
                assert with_key != grpc.StatusCode.UNAUTHENTICATED, method
                assert (with_key == grpc.StatusCode.PERMISSION_DENIED) == method.endswith("/ActivateVersion"), method

    asyncio.run(check())
