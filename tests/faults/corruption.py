"""What must hold for a damaged version, on disk and beside a sound one in a service. The tests say how many bytes."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from knnlm.datastore.layout import DOCUMENTS, MANIFEST, is_keys
from knnlm.testing import toy_datastore
from tests.faults.damage import copy, flipped, found, places, replaced
from tests.faults.reading import LONGEST
from tests.faults.serving import Served, served

__all__ = [
    "CURRENTS",
    "current_is_anything",
    "damaged_beside",
    "every_byte_is_noticed",
    "lies_beside",
    "replaced_beside",
]


def every_byte_is_noticed(file: Path, most: int) -> int:
    """Damage up to `most` bytes in turn: all bits of one, a single bit of the next. How many changes there were."""
    assert not found(file.parent), "the version is damaged before anything is done to it"
    count = 0
    for at in places(file.stat().st_size, most):
        # of a document's id, a low bit gives another id, which only the checksum tells; 0xFF gives what is no text
        for mask in (0xFF, 0x01) if file.name == DOCUMENTS else ((0xFF, 1 << at // 2 % 8)[at % 2],):
            restore = flipped(file, at, mask)
            assert found(file.parent), f"byte {at} of {file.name} changed by {mask:#x} goes unnoticed"
            restore()
            count += 1
    assert not found(file.parent)
    return count


async def damaged_beside(store: Path, most: int, **settings: str) -> tuple[Counter[str], Counter[str]]:
    """v2, a copy of v1 with one byte changed, is activated by the admin call; v1 answers before and after.

    By file: how many changes were refused, and how many were served: without harm, which Served.search checks.
    """
    refused: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    v2 = copy(store / "toy" / "v1", "v2")
    async with served(store, **settings) as service:
        sound = (await service.search())["distances"]
        for file in sorted(v2.iterdir()):
            for at in places(file.stat().st_size, most):
                restore = flipped(file, at)
                if await _is_refused(service, file, at):
                    refused[file.name] += 1
                else:
                    assert is_keys(file.name), f"served with byte {at} of {file.name} changed"
                    taken[file.name] += 1
                    await service.search(rescore=True)
                    await _back(service)
                restore()
                answer = await service.search()
                assert (answer["version"], answer["distances"]) == ("v1", sound)
    return refused, taken


async def _is_refused(service: Served, file: Path, at: int) -> bool:
    response = await service.activate("v2")
    if response.status_code == 200:
        return False
    where = f"byte {at} of {file.name}"
    assert response.status_code == 409, (where, response.text)
    error = response.json()["error"]
    assert error["code"] in ("datastore_corrupt", *(("datastore_mismatch",) if file.name == MANIFEST else ())), where
    assert file.name in error["message"], (where, error)
    assert response.headers["x-should-retry"] == "false"
    return True


async def _back(service: Served) -> None:
    """To v1, and rid of the damaged version."""
    response = await service.activate("v1")
    assert response.status_code == 200, response.text


CURRENTS: Mapping[str, bytes] = {
    "empty": b"",
    "an empty line": b"\n",
    "binary": bytes(range(256)),
    "not UTF-8": b"v\xff\n",
    "a path": b"../toy/v1\n",
    "a long name": b"v" * 100_000,
    "a megabyte of zeros": bytes(1 << 20),
    "several lines": b"v1\nv2\n",
    "a version that is not there": b"v77\n",
    "a build that is not finished": b".v2.building\n",
    "a return": b"v1\r\n",
}


async def replaced_beside(store: Path) -> list[str]:
    """v2 with one file cut short, missing, a folder, ...: each refused by the admin call, and the state tells why when
    CURRENT names it; v1 answers throughout. Which files were refused."""
    v1, refused = store / "toy" / "v1", []
    async with served(store) as service:
        sound = (await service.search())["distances"]
        names = sorted(file.name for file in v1.iterdir())
        for number, (name, damage) in enumerate((name, damage) for name in names for damage in replaced):
            version = f"w{number}"
            damage(copy(v1, version) / name)
            gone = name == MANIFEST and not (store / "toy" / version / name).is_file()
            response = await service.activate(version)
            where = f"{name}: {damage.__name__}"
            assert response.status_code == (404 if gone else 409), (where, response.text)
            error = response.json()["error"]
            assert error["code"] == ("unknown_version" if gone else "datastore_corrupt"), (where, error)
            assert gone or name in error["message"], (where, error)
            if not gone:
                state = await service.follows(store, f"{version}\n".encode(), to="stale: ")
                assert name in state, (where, state)
                await service.follows(store, b"v1\n", to="ready")
            answer = await service.search()
            assert (answer["version"], answer["distances"]) == ("v1", sound)
            refused.append(where)
    return refused


async def current_is_anything(store: Path, name: str) -> None:
    """What CURRENT holds besides a name: the version that answered goes on, and the next right name is followed."""
    copy(store / "toy" / "v1", "v2")
    async with served(store) as service:
        (store / "toy" / "CURRENT").write_bytes(CURRENTS[name])
        for _ in range(5):  # several looks of the watcher
            await asyncio.sleep(0.03)
            assert (await service.search())["version"] == "v1"
        assert (await service.client.get("/readyz")).status_code == 200
        await _zoo_appears(service, store)
        await service.follows(store, b"v2\n", to="ready")
        async with asyncio.timeout(20):
            while (await service.search())["version"] != "v2":  # noqa: ASYNC110  the service looks at a file
                await asyncio.sleep(0.01)


async def lies_beside(store: Path, damage: Callable[[Path], None]) -> None:
    """v2 is what `damage` makes of a copy of v1: activated or made current it is refused, or served without harm; and
    a domain beside it is followed all the while."""
    damage(copy(store / "toy" / "v1", "v2"))
    other = toy_datastore(store, domain="other")
    async with served(store) as service:
        response = await service.activate("v2")
        assert response.status_code in (200, 409), response.text
        if response.status_code == 200:
            await service.search(passages=2)
            await _back(service)
        else:
            assert (await service.search())["version"] == "v1"
            (store / "toy" / "CURRENT").write_bytes(b"v2\n")
            await _zoo_appears(service, store)
            assert (await service.search())["version"] == "v1"
            assert len(await service.state()) < LONGEST
        assert (await service.client.get(f"/v1/domains/{other.parent.name}")).status_code == 200


async def _zoo_appears(service: Served, store: Path) -> None:
    """A new domain is still found. In the alphabet it is behind toy, so that it is looked at after what is broken."""
    toy_datastore(store, domain="zoo")
    async with asyncio.timeout(20):
        while (await service.client.get("/v1/domains/zoo")).status_code != 200:  # noqa: ASYNC110  as above
            await asyncio.sleep(0.02)
