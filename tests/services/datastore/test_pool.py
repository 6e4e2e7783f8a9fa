"""The pool alone: what happens between two of its steps, at moments that a running service meets now and then."""

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from knnlm.datastore.catalog import Catalog
from knnlm.errors import Conflict, UnknownVersion
from knnlm.index.searcher import Searcher
from knnlm.messages import DomainInfo
from knnlm.testing import TEXTS, toy_datastore
from services.datastore.loaded import Opener
from services.datastore.pool import Pool
from services.datastore.settings import DatastoreSettings
from services.runtime.observability import Metrics


@pytest.fixture
def store(tmp_path: Path) -> Path:
    toy_datastore(tmp_path)
    toy_datastore(tmp_path, version="v2", texts=TEXTS[:2], activate=False)
    return tmp_path


def pool_of(store: Path, opener: Opener | None = None, **settings: Any) -> Pool:
    pool = Pool(DatastoreSettings(store=store, **settings), Metrics("datastore"), opener or opened)
    pool.load()
    return pool


def opened(path: Path, memory_limit: int | None) -> Searcher:
    return Searcher.open(path, memory_limit=memory_limit)


class Counting:
    """Opens searchers, those of v2 when it is let; remembers what was opened and closed."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.opened: list[str] = []
        self.closed: list[str] = []

    def __call__(self, path: Path, memory_limit: int | None) -> Searcher:
        name = f"{path.parent.name}/{path.name}"
        if path.name == "v2":
            self.entered.set()
            self.go.wait(20)
        self.opened.append(name)
        searcher = opened(path, memory_limit)
        close = searcher.close

        def closing() -> None:
            self.closed.append(name)
            close()

        searcher.close = closing  # type: ignore[method-assign]
        return searcher


async def test_a_domain_activated_while_the_store_is_looked_at_is_not_dropped(store: Path) -> None:
    toy_datastore(store, domain="other")
    toy_datastore(store, domain="other", version="v2", texts=TEXTS[:2], activate=False)
    toy_datastore(store, domain="new", activate=False)
    opener = Counting()
    pool = pool_of(store, opener)
    for domain in ("toy", "other"):
        Catalog(store).activate(domain, "v2")
    looking = asyncio.create_task(pool.follow())  # "new" has no current version yet
    await asyncio.to_thread(opener.entered.wait, 20)
    activating = asyncio.create_task(pool.activate("new", "v1"))  # its turn is between the two others
    await asyncio.sleep(0.05)
    opener.go.set()
    assert (await activating).version == "v1"
    await looking
    assert pool.get("new", None).version == "v1"
    assert opener.opened.count("new/v1") == 1
    assert {info.domain: info.version for info in await pool.list()} == {"new": "v1", "other": "v2", "toy": "v2"}
    await pool.close()


async def test_a_version_that_is_described_is_not_let_go(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(store, grace_s=0.0)
    entered, go = threading.Event(), threading.Event()
    versions = Catalog.versions

    def slowly(self: Catalog, domain: str) -> list[str]:
        entered.set()
        go.wait(20)
        return versions(self, domain)

    monkeypatch.setattr(Catalog, "versions", slowly)
    described = asyncio.create_task(pool.describe("toy"))
    await asyncio.to_thread(entered.wait, 20)
    Catalog(store).activate("toy", "v2")
    await pool.follow()
    assert pool.get("toy", None).version == "v2"
    go.set()
    info = await described
    assert (info.version, list(info.versions)) == ("v1", ["v1", "v2"])
    assert (await pool.describe("toy")).version == "v2"
    await pool.close()


async def test_a_change_that_came_too_late_is_not_served_and_holds_no_memory(store: Path) -> None:
    opener = Counting()
    opener.go.set()
    pool = pool_of(store, opener, grace_s=0.0)
    toy_datastore(store, version="v3", texts=TEXTS[:1])  # an operator's switch
    with pytest.raises(Conflict, match="made of v1, and meanwhile the domain was switched to v3"):
        await pool.activate("toy", "v2", "v1")
    assert Catalog(store).current("toy") == "v3"
    assert pool.get("toy", None).version == "v1"
    await pool.follow()
    assert pool.get("toy", None).version == "v3"
    assert sorted(opener.closed) == ["toy/v1", "toy/v2"]
    await pool.close()


class Held:
    """Opens searchers; those of versions in `gates` when their gate is opened, so that a test decides what is open
    first. opened: in the order in which it ended."""

    def __init__(self, *held: str) -> None:
        self.gates = {name: threading.Event() for name in held}
        self.begun: list[str] = []
        self.opened: list[str] = []

    def __call__(self, path: Path, memory_limit: int | None) -> Searcher:
        name = f"{path.parent.name}/{path.name}"
        self.begun.append(name)
        if name in self.gates:
            assert self.gates[name].wait(20)
        self.opened.append(name)
        return opened(path, memory_limit)

    async def until_begun(self, name: str) -> None:
        async with asyncio.timeout(20):
            while name not in self.begun:  # noqa: ASYNC110  in a thread
                await asyncio.sleep(0.01)


async def test_other_domains_and_a_rollback_switch_while_a_version_is_opened(store: Path) -> None:
    toy_datastore(store, domain="other")
    toy_datastore(store, domain="other", version="v2", texts=TEXTS[:2], activate=False)
    opener = Held("toy/v2")
    pool = pool_of(store, opener)
    Catalog(store).activate("toy", "v2")
    await pool.look()
    await opener.until_begun("toy/v2")
    assert (await pool.describe("toy")).state == "loading v2"
    assert (await pool.activate("other", "v2")).version == "v2"  # by who asks a gateway
    Catalog(store).activate("other", "v1")  # and by who changes the store
    await pool.look()
    async with asyncio.timeout(20):
        while pool.get("other", None).version != "v1":  # noqa: ASYNC110  opened by a task
            await asyncio.sleep(0.01)
    Catalog(store).activate("toy", "v1")  # nobody wants v2 any more
    opener.gates["toy/v2"].set()
    await pool.follow()
    await pool.close()
    assert opener.opened == ["other/v1", "toy/v1", "other/v2", "toy/v2"]


async def test_what_current_names_no_more_when_it_is_open_never_answers(store: Path) -> None:
    opener = Held("toy/v2")
    pool = pool_of(store, opener, grace_s=0.0)
    Catalog(store).activate("toy", "v2")
    await pool.look()
    await opener.until_begun("toy/v2")
    Catalog(store).activate("toy", "v1")
    opener.gates["toy/v2"].set()
    await pool.follow()
    assert pool.get("toy", None).version == "v1"
    await pool.follow()
    with pytest.raises(UnknownVersion):
        pool.get("toy", "v2")  # and its memory is given back
    await pool.close()


async def two_activations(store: Path) -> tuple[Pool, Held, asyncio.Task[DomainInfo], asyncio.Task[DomainInfo]]:
    """A pool that opens v2, which was asked for first, and v3; each waits to be let."""
    toy_datastore(store, version="v3", texts=TEXTS[:1], activate=False)
    opener = Held("toy/v2", "toy/v3")
    pool = pool_of(store, opener)
    first = asyncio.create_task(pool.activate("toy", "v2"))
    await opener.until_begun("toy/v2")
    second = asyncio.create_task(pool.activate("toy", "v3"))
    await opener.until_begun("toy/v3")
    return pool, opener, first, second


async def test_an_activation_that_a_later_one_overtook_is_refused(store: Path) -> None:
    pool, opener, slow, quick = await two_activations(store)
    opener.gates["toy/v3"].set()
    assert (await quick).version == "v3"
    opener.gates["toy/v2"].set()
    with pytest.raises(Conflict, match=r"v2 of domain toy is open, but not activated: .* switched to v3"):
        await slow
    assert Catalog(store).current("toy") == pool.get("toy", None).version == "v3"
    await pool.close()


async def test_activations_take_effect_in_the_order_in_which_they_were_asked_for(store: Path) -> None:
    pool, opener, first, second = await two_activations(store)
    opener.gates["toy/v2"].set()
    assert (await first).version == "v2"
    opener.gates["toy/v3"].set()
    assert (await second).version == "v3"
    await pool.close()


async def test_a_version_that_two_ask_for_is_opened_once(store: Path) -> None:
    opener = Held("toy/v2")
    pool = pool_of(store, opener)
    asked = [asyncio.create_task(pool.activate("toy", "v2")) for _ in range(2)]
    Catalog(store).activate("toy", "v2")
    await pool.look()
    await opener.until_begun("toy/v2")
    await asyncio.sleep(0.05)
    opener.gates["toy/v2"].set()
    assert [info.version for info in await asyncio.gather(*asked)] == ["v2", "v2"]
    await pool.follow()
    assert opener.opened == ["toy/v1", "toy/v2"]
    await pool.close()


async def test_an_activation_of_what_answers_already_overtakes_one_that_is_being_opened(store: Path) -> None:
    opener = Held("toy/v2")
    pool = pool_of(store, opener)
    slow = asyncio.create_task(pool.activate("toy", "v2"))
    await opener.until_begun("toy/v2")
    assert (await pool.activate("toy", "v1")).version == "v1"  # whoever asked for v2 thinks better of it
    opener.gates["toy/v2"].set()
    with pytest.raises(Conflict, match="switched to v1, which was asked for later"):
        await slow
    assert Catalog(store).current("toy") == pool.get("toy", None).version == "v1"
    await pool.close()


async def test_a_domain_that_was_removed_meanwhile_comes_back_with_what_is_activated(store: Path) -> None:
    toy_datastore(store, version="v3", texts=TEXTS[:1], activate=False)
    toy_datastore(store, domain="other")
    opener = Held("toy/v2")
    pool = pool_of(store, opener)
    slow = asyncio.create_task(pool.activate("toy", "v2"))
    await opener.until_begun("toy/v2")
    await pool.activate("toy", "v3")
    (store / "toy").rename(store / ".toy")
    await pool.look()
    assert [info.domain for info in await pool.list()] == ["other"]
    (store / "toy").mkdir()
    (store / ".toy" / "v2").rename(store / "toy" / "v2")
    opener.gates["toy/v2"].set()
    assert (await slow).version == "v2"
    await pool.close()


async def test_the_version_of_an_activation_that_was_cancelled_is_let_go(store: Path) -> None:
    opener = Counting()
    pool = pool_of(store, opener, grace_s=0.0)
    asked = asyncio.create_task(pool.activate("toy", "v2"))
    await asyncio.to_thread(opener.entered.wait, 20)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    opener.go.set()
    async with asyncio.timeout(20):
        while opener.closed != ["toy/v2"]:
            await pool.look()
            await asyncio.sleep(0.01)
    assert pool.get("toy", None).version == "v1"
    await pool.close()


async def test_a_version_that_is_about_to_answer_is_not_let_go(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opener = Counting()
    opener.go.set()
    pool = pool_of(store, opener, grace_s=0.0)
    entered, go = threading.Event(), threading.Event()
    activate = Catalog.activate

    def slowly(self: Catalog, domain: str, version: str, instead_of: str | None = None) -> None:
        entered.set()
        go.wait(20)
        activate(self, domain, version, instead_of)

    monkeypatch.setattr(Catalog, "activate", slowly)
    asked = asyncio.create_task(pool.activate("toy", "v2"))
    await asyncio.to_thread(entered.wait, 20)
    await pool.look()
    assert opener.closed == []
    go.set()
    assert (await asked).version == "v2"
    await pool.close()


async def test_a_manifest_that_was_rewritten_meanwhile_is_not_undone_by_the_former(store: Path) -> None:
    begun, gate = threading.Event(), threading.Event()
    opened_v2: list[Searcher] = []

    def opener(path: Path, memory_limit: int | None) -> Searcher:
        searcher = opened(path, memory_limit)
        if path.name == "v2":
            opened_v2.append(searcher)
            if len(opened_v2) == 1:
                begun.set()
                assert gate.wait(20)
        return searcher

    pool = pool_of(store, opener)
    Catalog(store).activate("toy", "v2")
    await pool.look()
    await asyncio.to_thread(begun.wait, 20)
    manifest = store / "toy" / "v2" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes())  # as tuning does
    await pool.look()
    async with asyncio.timeout(20):
        while pool.get("toy", None).version != "v2":  # noqa: ASYNC110  opened by a task
            await asyncio.sleep(0.01)
    gate.set()
    await pool.follow()
    assert pool.get("toy", None).searcher is opened_v2[1]
    await pool.close()


@pytest.mark.parametrize("settings", [{"max_memory_bytes": 1 << 30}, {"memory": "resident"}])
async def test_versions_that_take_the_same_memory_are_opened_one_after_another(
    store: Path, settings: dict[str, Any]
) -> None:
    toy_datastore(store, version="v3", texts=TEXTS[:1], activate=False)
    opener = Held("toy/v2")
    pool = pool_of(store, opener, **settings)
    asked = [asyncio.create_task(pool.activate("toy", "v2"))]
    await opener.until_begun("toy/v2")
    asked.append(asyncio.create_task(pool.activate("toy", "v3")))
    await asyncio.sleep(0.1)
    assert opener.begun == ["toy/v1", "toy/v2"]
    opener.gates["toy/v2"].set()
    assert [info.version for info in await asyncio.gather(*asked)] == ["v2", "v3"]
    await pool.close()


async def test_what_waits_to_be_opened_and_is_not_wanted_any_more_is_not_opened(store: Path) -> None:
    for version in ("v3", "v4"):
        toy_datastore(store, version=version, texts=TEXTS[:1], activate=False)
    opener = Held("toy/v2")
    pool = pool_of(store, opener, memory="resident")
    for version in ("v2", "v3", "v4"):
        Catalog(store).activate("toy", version)
        await pool.look()
        await opener.until_begun("toy/v2")
    opener.gates["toy/v2"].set()
    await pool.follow()
    assert pool.get("toy", None).version == "v4"
    assert opener.opened == ["toy/v1", "toy/v2", "toy/v4"]
    await pool.close()


async def test_an_activation_is_not_refused_for_a_later_one_of_the_same_version(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of(store)
    entered, go = threading.Event(), threading.Event()
    path = Catalog.path

    def slowly(self: Catalog, domain: str, version: str) -> Path:
        if not entered.is_set():
            entered.set()
            assert go.wait(20)
        return path(self, domain, version)

    monkeypatch.setattr(Catalog, "path", slowly)
    first = asyncio.create_task(pool.activate("toy", "v2"))
    await asyncio.to_thread(entered.wait, 20)
    assert (await pool.activate("toy", "v2")).version == "v2"
    go.set()
    assert (await first).version == "v2"
    await pool.close()


async def test_a_version_that_is_removed_while_it_is_asked_for_is_unknown(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of(store)
    path = Catalog.path

    def removed_at_once(self: Catalog, domain: str, version: str) -> Path:
        found = path(self, domain, version)
        shutil.rmtree(found)
        return found

    monkeypatch.setattr(Catalog, "path", removed_at_once)
    with pytest.raises(UnknownVersion, match="toy has no version v2: it is gone"):
        await pool.activate("toy", "v2")
    assert pool.get("toy", None).version == "v1"
    await pool.close()
