"""The three services in one process, over a store of toys, and a client of the aggregator."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from knnlm.datastore.updates.revise import with_tuning
from knnlm.testing import TEXTS, ToyLanguageModel, toy_datastore
from knnlm.tuning_records import Tuning
from services.aggregator.app import service as aggregator_service
from services.aggregator.settings import AggregatorSettings
from services.datastore.app import service as datastore_service
from services.datastore.settings import DatastoreSettings
from services.lm.app import service as lm_service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import Host, running

TUNING = Tuning(temperature=2.0, lmbda=0.3, k=6, lm_perplexity=9.0, knn_perplexity=8.0, tokens=10, documents=1)
TEXT = "the cat sat on the mat and the dog looked at the cat; the dog sat on the log."


@dataclass
class System:
    client: httpx.AsyncClient
    store: Path
    hosts: dict[str, Host]

    async def post(self, path: str, body: object, status: int = 200) -> Any:  # JSON
        response = await self.client.post(path, json=body)
        assert response.status_code == status, response.text
        return response.json()


@pytest.fixture
def store(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains cat (two versions, tuned), dog (tuned) and raw (not tuned). Built once, and each test has a copy."""
    built = tmp_path_factory.getbasetemp() / "toys"
    if not built.exists():
        with_tuning(toy_datastore(built, domain="cat"), TUNING)
        with_tuning(toy_datastore(built, domain="cat", version="v2", texts=TEXTS[1:2], activate=False), TUNING)
        with_tuning(toy_datastore(built, domain="dog", texts=TEXTS[3:]), replace(TUNING, lmbda=0.2))
        toy_datastore(built, domain="raw", texts=TEXTS[:1])
    return Path(shutil.copytree(built, tmp_path, dirs_exist_ok=True))


@asynccontextmanager
async def system(
    store: Path,
    *,
    replicas: int = 1,
    lm: ToyLanguageModel | None = None,
    memories: Mapping[str, ToyLanguageModel] | None = None,
    **settings: Any,
) -> AsyncIterator[System]:
    """replicas: of the datastore service, over the one store; hosts "datastore", "datastore 2", ... memories: each with
    an lm service of its own, host "memory NAME"."""
    async with AsyncExitStack() as stack:
        model = lm or ToyLanguageModel()
        service = lm_service(LmSettings(model="toy", port=0, grpc_port=0), lambda _: model)
        hosts = {"lm": await stack.enter_async_context(running(service))}
        for i in range(replicas):
            service = datastore_service(
                DatastoreSettings(
                    store=store,
                    port=0,
                    grpc_port=0,
                    watch_interval_s=0.1,
                    lm_target=f"127.0.0.1:{hosts['lm'].grpc_port}",
                )
            )
            name = f"datastore {i + 1}" if i else "datastore"
            hosts[name] = await stack.enter_async_context(running(service))
        targets = []
        for name, memory in (memories or {}).items():
            service = lm_service(LmSettings(model=name, port=0, grpc_port=0), partial(_given, memory))
            host = hosts[f"memory {name}"] = await stack.enter_async_context(running(service))
            targets.append(f"{name}=127.0.0.1:{host.grpc_port}")
        service = aggregator_service(
            AggregatorSettings(
                port=0,
                lm_target=f"127.0.0.1:{hosts['lm'].grpc_port}",
                datastore_target=",".join(
                    f"127.0.0.1:{host.grpc_port}" for name, host in hosts.items() if name.startswith("datastore")
                ),
                **{"memory": tuple(targets), **settings},
            )
        )
        hosts["aggregator"] = await stack.enter_async_context(running(service))
        transport = httpx.ASGITransport(hosts["aggregator"].app)
        client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://test"))
        yield System(client, store, hosts)


def _given(model: ToyLanguageModel, settings: LmSettings) -> ToyLanguageModel:
    del settings
    return model


def with_system(store: Path, check: Callable[[System], Awaitable[None]], *, replicas: int = 1, **settings: Any) -> None:
    async def run() -> None:
        async with system(store, replicas=replicas, **settings) as running_system:
            await check(running_system)

    asyncio.run(run())
