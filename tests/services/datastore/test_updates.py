"""Documents added to and removed from a domain while it is served: over every face, by keys, under failures."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import SecretStr

from knnlm.clients.call import Connection
from knnlm.clients.http import HttpDatastore
from knnlm.clients.rpc import GrpcDatastore
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.verify import verify
from knnlm.errors import (
    Conflict,
    DatastoreMismatch,
    DeadlineExceeded,
    InvalidRequest,
    KnnlmError,
    NotFound,
    PermissionDenied,
    TooLarge,
    Unavailable,
    UnknownDomain,
)
from knnlm.messages import Document, ForwardRequest, ForwardResult, SearchRequest
from knnlm.options import SearchOptions
from knnlm.protocols import LanguageModel
from knnlm.testing import ToyLanguageModel, toy_datastore
from knnlm.transport.context import outgoing
from services.datastore.app import service
from services.datastore.settings import DatastoreSettings
from services.lm.app import service as lm_service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import Host, running

TEXT = "a wholly new text about herons"


@contextmanager
def toy() -> Iterator[LanguageModel]:
    yield ToyLanguageModel()


@contextmanager
def other_model() -> Iterator[LanguageModel]:
    yield ToyLanguageModel(seed=7)


class Held(ToyLanguageModel):
    """Encodes when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go = threading.Event(), threading.Event()

    def forward(self, request: ForwardRequest) -> ForwardResult:
        self.asked.set()
        assert self.go.wait(60)
        return super().forward(request)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    toy_datastore(tmp_path)
    return tmp_path


def served(
    store: Path, check: Callable[[Host, GrpcDatastore], Awaitable[None]], encoder: Any = toy, **settings: Any
) -> None:
    async def run() -> None:
        settings_ = DatastoreSettings(store=store, port=0, grpc_port=0, **settings)
        async with (
            running(service(settings_, open_encoder=encoder)) as host,
            GrpcDatastore(f"127.0.0.1:{host.grpc_port}") as client,
        ):
            await check(host, client)

    asyncio.run(run())


async def nearest(client: GrpcDatastore, text: str) -> str:
    """The document of the nearest entry to the context that is a text without its last token."""
    lm = ToyLanguageModel()
    tokens = lm.tokenizer.encode(text)
    last = np.array([len(tokens) - 2], np.int32)
    keys = lm.forward(ForwardRequest(tokens=[tokens], positions=[last], keys=True)).keys
    assert keys is not None
    found = await client.search(SearchRequest("toy", keys.astype(np.float32), SearchOptions(k=1), passages=1))
    return found.passages[0][0].document


@pytest.mark.parametrize("face", ["grpc", "http"])
def test_an_id_with_a_control_character_is_refused_and_named(store: Path, face: str) -> None:
    async def check(host: Host, client: GrpcDatastore) -> None:
        http = HttpDatastore("http://test", transport=httpx.ASGITransport(host.app))
        changing = client if face == "grpc" else http
        documents = [Document("fine", TEXT), Document("a\x00b", TEXT)]
        with pytest.raises(InvalidRequest, match="the id of document 1 has the control character") as caught:
            await changing.add_documents("toy", documents)
        assert caught.value.param == "documents.1.id"
        assert (await client.get_domain("toy")).version == "v1"
        await http.aclose()

    served(store, check)


@pytest.mark.parametrize("face", ["grpc", "http"])
def test_what_is_added_is_found_and_what_is_removed_is_not(store: Path, face: str) -> None:
    async def check(host: Host, client: GrpcDatastore) -> None:
        http = HttpDatastore("http://test", transport=httpx.ASGITransport(host.app))
        changing = client if face == "grpc" else http
        before = await nearest(client, TEXT)
        change = await changing.add_documents("toy", [Document("heron", TEXT)])
        assert (change.version, change.parent, change.added_documents) == ("v2", "v1", 1)
        assert await nearest(client, TEXT) == "heron"
        assert (await client.get_domain("toy")).version == "v2"
        removed = await changing.remove_documents("toy", ["heron"])
        assert (removed.version, removed.removed_entries) == ("v3", change.added_entries)
        assert await nearest(client, TEXT) == before
        info = await client.get_domain("toy")
        assert info.entries == Manifest.load(store / "toy" / "v1").entries
        await http.aclose()

    served(store, check)
    for version in ("v1", "v2", "v3"):
        assert [c for c in verify(store / "toy" / version) if c.problem] == []


def test_what_cannot_be_done_is_said_over_http(store: Path) -> None:
    async def check(host: Host, client: GrpcDatastore) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{host.port}") as http:
            path = "/v1/domains/toy/documents"
            body = {"documents": [{"id": "heron", "text": TEXT}]}
            added = await http.post(path, json=body)
            assert added.status_code == 200
            assert added.json()["version"] == "v2"
            again = await http.post(path, json=body)
            assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
            replaced = await http.post(path, json={**body, "replace": True})
            assert (replaced.json()["added_documents"], replaced.json()["removed_documents"]) == (1, 1)
            removed = await http.post(f"{path}:remove", json={"ids": ["heron"]})
            assert removed.json()["removed_documents"] == 1
            missing = await http.post(f"{path}:remove", json={"ids": ["heron"]})
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")

    served(store, check)


@pytest.mark.parametrize(
    ("documents", "error"),
    [
        ([], InvalidRequest),
        ([Document("", "text")], InvalidRequest),
        ([Document("x" * 4097, "text")], InvalidRequest),
        ([Document("a", " \n")], InvalidRequest),
        ([Document("a", "one"), Document("a", "two")], Conflict),
        ([Document("0", "an id that exists")], Conflict),
        ([Document(str(i), "text") for i in range(100, 109)], TooLarge),
    ],
)
def test_documents_that_cannot_be_taken_are_refused(
    store: Path, documents: list[Document], error: type[KnnlmError]
) -> None:
    async def check(host: Host, client: GrpcDatastore) -> None:
        with pytest.raises(error):
            await client.add_documents("toy", documents)
        assert (await client.get_domain("toy")).version == "v1"

    served(store, check, max_documents=8)
    assert Catalog(store).versions("toy") == ["v1"]


def test_another_model_is_refused(store: Path) -> None:
    async def check(host: Host, client: GrpcDatastore) -> None:
        with pytest.raises(DatastoreMismatch):
            await client.add_documents("toy", [Document("heron", TEXT)])

    served(store, check, encoder=other_model)


def test_without_an_lm_service_documents_can_only_be_removed(store: Path) -> None:
    async def check(host: Host, client: GrpcDatastore) -> None:
        with pytest.raises(Unavailable, match="lm-target"):
            await client.add_documents("toy", [Document("heron", TEXT)])
        with pytest.raises(UnknownDomain):
            await client.remove_documents("nowhere", ["0"])
        with pytest.raises(NotFound):
            await client.remove_documents("toy", ["0", "no such document"])
        assert (await client.remove_documents("toy", ["0"])).removed_documents == 1

    served(store, check, encoder=None)


def test_the_lm_service_of_the_settings_encodes(store: Path) -> None:
    async def run() -> None:
        lm = lm_service(LmSettings(model="toy", port=0, grpc_port=0), lambda _: ToyLanguageModel())
        async with running(lm) as behind:

            async def check(host: Host, client: GrpcDatastore) -> None:
                await client.add_documents("toy", [Document("heron", TEXT)])
                assert await nearest(client, TEXT) == "heron"

            settings = DatastoreSettings(store=store, port=0, grpc_port=0, lm_target=f"127.0.0.1:{behind.grpc_port}")
            async with running(service(settings)) as host, GrpcDatastore(f"127.0.0.1:{host.grpc_port}") as client:
                await check(host, client)

    asyncio.run(run())


def test_changes_need_an_admin_key(store: Path) -> None:
    async def check(host: Host, client: GrpcDatastore) -> None:
        target = f"127.0.0.1:{host.grpc_port}"
        async with (
            GrpcDatastore(Connection(target, api_key="ordinary")) as ordinary,
            GrpcDatastore(Connection(target, api_key="admin")) as admin,
        ):
            with pytest.raises(PermissionDenied):
                await ordinary.add_documents("toy", [Document("heron", TEXT)])
            with pytest.raises(PermissionDenied):
                await ordinary.remove_documents("toy", ["0"])
            assert (await admin.remove_documents("toy", ["0"])).version == "v2"

    keys: Any = {"api_keys": (SecretStr("ordinary"),), "admin_api_keys": (SecretStr("admin"),)}
    served(store, check, **keys)


def test_a_change_goes_on_when_its_caller_no_longer_waits(store: Path) -> None:
    held = Held()

    @contextmanager
    def slow() -> Iterator[LanguageModel]:
        yield held

    async def check(host: Host, client: GrpcDatastore) -> None:
        loop = asyncio.get_running_loop()
        try:
            with outgoing(deadline=loop.time() + 1.0), pytest.raises(DeadlineExceeded):
                await client.add_documents("toy", [Document("heron", TEXT)])
            assert held.asked.is_set()
            assert (await client.get_domain("toy")).version == "v1"  # and searches are answered meanwhile
        finally:
            held.go.set()
        async with asyncio.timeout(60):
            while (await client.get_domain("toy")).version != "v2":  # noqa: ASYNC110  what tells is another process' answer
                await asyncio.sleep(0.02)
        assert await nearest(client, TEXT) == "heron"

    served(store, check, encoder=slow)


def test_a_change_whose_turn_does_not_come_in_time_is_not_made(store: Path) -> None:
    held = Held()

    @contextmanager
    def slow() -> Iterator[LanguageModel]:
        yield held

    async def check(host: Host, client: GrpcDatastore) -> None:
        first = asyncio.create_task(client.add_documents("toy", [Document("heron", TEXT)]))
        try:
            assert await asyncio.to_thread(held.asked.wait, 60)
            deadline = asyncio.get_running_loop().time() + 0.5
            with outgoing(deadline=deadline), pytest.raises(DeadlineExceeded):
                await client.remove_documents("toy", ["0"])
        finally:
            held.go.set()
        assert (await first).version == "v2"
        assert (await client.add_documents("toy", [Document("egret", TEXT)])).parent == "v2"  # the turn was given on
        assert (await client.remove_documents("toy", ["0"])).removed_documents == 1

    served(store, check, encoder=slow)


def test_changes_of_one_moment_are_made_one_after_another(store: Path) -> None:
    async def check(host: Host, client: GrpcDatastore) -> None:
        ids = [f"new {i}" for i in range(6)]
        made = await asyncio.gather(*(client.add_documents("toy", [Document(i, f"{i} {TEXT}")]) for i in ids))
        assert sorted(change.version for change in made) == [f"v{n}" for n in range(2, 8)]
        removed = await client.remove_documents("toy", ids)
        assert removed.removed_documents == len(ids)

    served(store, check)


def test_a_service_that_ends_stops_a_change_and_keeps_the_store_sound(store: Path) -> None:
    held = Held()

    @contextmanager
    def slow() -> Iterator[LanguageModel]:
        yield held

    async def run() -> None:
        settings = DatastoreSettings(store=store, port=0, grpc_port=0, drain_timeout_s=0.2)
        async with running(service(settings, open_encoder=slow)) as host:
            async with GrpcDatastore(f"127.0.0.1:{host.grpc_port}") as client:
                with outgoing(deadline=asyncio.get_running_loop().time() + 1.0), pytest.raises(DeadlineExceeded):
                    await client.add_documents("toy", [Document("heron", TEXT)])
            asyncio.get_running_loop().call_later(0.5, held.go.set)

    asyncio.run(run())
    assert Catalog(store).current("toy") == "v1"
    assert [c for c in verify(store / "toy" / "v1") if c.problem] == []
