"""Versions change while requests run: no failure, every answer true to the version it names."""

import asyncio
import gc
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm.clients.call import Connection
from knnlm.clients.rpc import GrpcDatastore
from knnlm.datastore.catalog import Catalog
from knnlm.errors import (
    DatastoreError,
    DeadlineExceeded,
    KnnlmError,
    Overloaded,
    Unavailable,
    UnknownDomain,
    UnknownVersion,
)
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from knnlm.testing import TEXTS, toy_datastore
from services.datastore.app import service
from services.datastore.loaded import Opener
from services.datastore.settings import DatastoreSettings
from services.runtime.lifecycle import Host, running
from services.runtime.service import Service
from tests.services.waiting import QUICK, Slow, held, until

DIM = 16
REQUEST = SearchRequest(
    "toy", np.random.default_rng(0).standard_normal((3, DIM)).astype(np.float32), SearchOptions(k=4), ids=True
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    toy_datastore(tmp_path)
    toy_datastore(tmp_path, version="v2", texts=TEXTS[:2], activate=False)
    return tmp_path


def datastore(store: Path, opener: Opener | None = None, **settings: Any) -> Service:
    settings = {"watch_interval_s": QUICK, "port": 0, "grpc_port": 0, **settings}
    return service(DatastoreSettings(store=store, **settings), opener)


def client(host: Host) -> GrpcDatastore:
    return GrpcDatastore(f"127.0.0.1:{host.grpc_port}")


async def test_every_answer_is_true_to_the_version_it_names_while_versions_change(store: Path) -> None:
    expected = {
        version: Searcher.open(Catalog(store).path("toy", version)).search(REQUEST).neighbors.ids
        for version in ("v1", "v2")
    }
    seen: set[str] = set()
    stop = asyncio.Event()

    async def ask(datastore: GrpcDatastore) -> int:
        answers = 0
        while not stop.is_set():
            result = await datastore.search(REQUEST)
            seen.add(result.version)
            assert repr(result.neighbors.ids) == repr(expected[result.version])
            answers += 1
        return answers

    async with running(datastore(store, grace_s=0.0)) as host, client(host) as one, client(host) as other:
        callers = [asyncio.create_task(ask(one)) for _ in range(3)]
        for i in range(12):
            version = ("v2", "v1")[i % 2]
            if i % 3:
                await other.activate("toy", version)
            else:  # as another process would
                Catalog(store).activate("toy", version)
                await until(lambda v=version: serves(other, v))  # type: ignore[misc]
        stop.set()
        assert all(await asyncio.gather(*callers))
    assert seen == {"v1", "v2"}


async def serves(datastore: GrpcDatastore, version: str) -> bool:
    return (await datastore.search(REQUEST)).version == version


async def test_a_pinned_version_answers_through_its_grace_and_not_after(store: Path) -> None:
    async with running(datastore(store, grace_s=1e6)) as host, client(host) as datastore_:
        await datastore_.activate("toy", "v2")
        assert (await datastore_.search(replace(REQUEST, version="v1"))).version == "v1"
        assert (await datastore_.search(replace(REQUEST, version="v2"))).version == "v2"
    async with running(datastore(store, grace_s=0.0)) as host, client(host) as datastore_:
        await datastore_.activate("toy", "v1")
        await until(lambda: refuses(datastore_, replace(REQUEST, version="v2"), UnknownVersion))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")
async def test_a_version_is_let_go_without_garbage_collection(store: Path) -> None:
    def maps(version: str) -> bool:
        return str(store / "toy" / version) in Path("/proc/self/maps").read_text()

    gc.disable()  # stands for `keep_loaded`: a version that a service loads first is left out of collections
    try:
        async with running(datastore(store, grace_s=0.0)) as host, client(host) as datastore_:
            await datastore_.search(REQUEST)
            assert maps("v1")
            await datastore_.activate("toy", "v2")
            await datastore_.search(REQUEST)
            await until(lambda: not maps("v1"))
            assert maps("v2")
    finally:
        gc.enable()


async def refuses(datastore: GrpcDatastore, request: SearchRequest, expected: type[KnnlmError]) -> bool:
    try:
        await datastore.search(request)
    except expected:
        return True
    return False


async def test_a_search_in_flight_finishes_on_the_version_it_began_with(store: Path) -> None:
    slow = Slow()
    async with running(datastore(store, slow, grace_s=0.0)) as host, client(host) as datastore_:
        flying = asyncio.create_task(datastore_.search(REQUEST))
        await asyncio.to_thread(slow.entered.wait, 10)
        assert (await datastore_.activate("toy", "v2")).version == "v2"
        await asyncio.sleep(5 * QUICK)
        assert slow.closed == []
        slow.gate.set()
        assert (await flying).version == "v1"
        assert (await datastore_.search(REQUEST)).version == "v2"
        await until(lambda: slow.closed == ["v1"])
    assert sorted(slow.closed) == ["v1", "v2"]


async def test_rolling_back_within_the_grace_opens_nothing(store: Path) -> None:
    slow = Slow()
    slow.gate.set()
    async with running(datastore(store, slow)) as host, client(host) as datastore_:
        for version in ("v2", "v1", "v2"):
            assert (await datastore_.activate("toy", version)).version == version
    assert slow.opened == ["v1", "v2"]


async def test_a_version_that_cannot_be_opened_leaves_the_old_one_serving_and_shows(store: Path) -> None:
    (store / "toy" / "v2" / "keys.npy").write_bytes(b"rubbish")
    async with running(datastore(store)) as host, client(host) as datastore_:
        with pytest.raises(DatastoreError):
            await datastore_.activate("toy", "v2")
        assert Catalog(store).current("toy") == "v1"
        assert (await datastore_.get_domain("toy")).state == "ready"

        Catalog(store).activate("toy", "v2")  # somebody else insists

        async def stale() -> bool:
            return (await datastore_.get_domain("toy")).state.startswith("stale")

        await until(stale)
        info = await datastore_.get_domain("toy")
        assert info.version == "v1"
        assert "toy/v2/keys.npy" in info.state
        assert str(store) not in info.state
        assert (await datastore_.search(REQUEST)).version == "v1"

        Catalog(store).activate("toy", "v1")
        await until(lambda: is_ready(datastore_))


async def is_ready(datastore: GrpcDatastore) -> bool:
    return (await datastore.get_domain("toy")).state == "ready"


async def test_domains_come_and_go_with_the_store(tmp_path: Path) -> None:
    async with running(datastore(tmp_path / "store")) as host, client(host) as datastore_:
        assert host.admission.readiness.reasons() == []
        assert await datastore_.list_domains() == []
        with pytest.raises(UnknownDomain):
            await datastore_.search(REQUEST)
        await asyncio.to_thread(toy_datastore, tmp_path / "store")
        await until(lambda: is_listed(datastore_))
        assert (await datastore_.search(REQUEST)).version == "v1"
        shutil.rmtree(tmp_path / "store" / "toy")
        await until(lambda: refuses(datastore_, REQUEST, UnknownDomain))
        assert await datastore_.list_domains() == []


async def is_listed(datastore: GrpcDatastore) -> bool:
    return [info.domain for info in await datastore.list_domains()] == ["toy"]


def test_domains_that_were_asked_for_by_name_are_served_alone_and_must_be_sound(store: Path) -> None:
    toy_datastore(store, domain="other")

    async def serve(*domains: str) -> list[str]:
        async with running(datastore(store, domains=domains)) as host, client(host) as datastore_:
            with pytest.raises(UnknownDomain):
                await datastore_.activate("other", "v1")
            return [info.domain for info in await datastore_.list_domains()]

    assert asyncio.run(serve("toy")) == ["toy"]
    with pytest.raises(UnknownDomain):
        asyncio.run(serve("toy", "absent"))


async def test_one_broken_domain_does_not_keep_the_others_from_starting(store: Path) -> None:
    toy_datastore(store, domain="broken")
    (store / "broken" / "v1" / "values.npy").unlink()
    async with running(datastore(store)) as host, client(host) as datastore_:
        assert (await datastore_.search(REQUEST)).version == "v1"
        with pytest.raises(Unavailable, match=r"broken cannot be served: broken/v1/values\.npy is missing"):
            await datastore_.search(replace(REQUEST, domain="broken"))


async def test_a_full_queue_and_a_late_answer_are_told_apart(store: Path) -> None:
    slow = Slow()
    async with (
        running(datastore(store, slow, max_queries=3, max_queue_queries=12)) as host,  # half is a lone domain's
        client(host) as datastore_,
    ):
        first = asyncio.create_task(datastore_.search(REQUEST))
        await asyncio.to_thread(slow.entered.wait, 10)
        late = GrpcDatastore(Connection(f"127.0.0.1:{host.grpc_port}", timeout=0.1))
        with pytest.raises(DeadlineExceeded):
            await late.search(REQUEST)
        await late.aclose()
        await until(lambda: held(host) == 3)
        second = asyncio.create_task(datastore_.search(REQUEST))
        await until(lambda: held(host) == 6)
        with pytest.raises(Overloaded):
            await datastore_.search(REQUEST)
        slow.gate.set()
        await asyncio.gather(first, second)


async def test_metrics_name_the_version_that_answers_and_no_former_one(store: Path) -> None:
    made = datastore(store)
    async with running(made) as host, client(host) as rpc:
        for version in ("v2", "v1", "v2"):
            await rpc.activate("toy", version)
            shown = [line for line in made.metrics.expose().decode().splitlines() if "knnlm_domain_entries{" in line]
            assert len(shown) == 1
            assert f'version="{version}"' in shown[0]
