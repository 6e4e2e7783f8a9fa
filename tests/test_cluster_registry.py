"""What gateways write for one another: who holds an application, which ones nobody needs. No Ray, a clock of ours."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from knnlm.cluster.registry import LEASE_SECONDS, Registry, ShardOptions, Spec
from knnlm.datastore.manifest import Manifest
from knnlm.errors import DatastoreError
from knnlm.testing import toy_datastore


class Values:
    """Keys and values that several registries share."""

    def __init__(self) -> None:
        self.known: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        return self.known.get(key)

    def put(self, key: str, value: bytes) -> None:
        self.known[key] = value

    def delete(self, key: str) -> None:
        self.known.pop(key, None)

    def keys(self, prefix: str) -> list[str]:
        return [key for key in self.known if key.startswith(prefix)]


class Clock:
    def __init__(self) -> None:
        self.seconds = 1e9

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def new(clock: Clock) -> Callable[[], Registry]:
    """Another gateway's registry."""
    values = Values()
    return lambda: Registry(values, clock)


def hold(registry: Registry, name: str) -> None:
    registry.take(name)
    registry.renew()


def test_what_is_opened_twice_is_held_until_both_are_closed(new: Callable[[], Registry]) -> None:
    one, other = new(), new()
    hold(one, "law@v1")
    hold(one, "law@v1")  # its manifest was written anew: opened beside the former opening
    assert not one.give_up("law@v1")
    assert other.holders("law@v1") == 1
    assert one.give_up("law@v1")
    one.withdraw("law@v1")
    assert other.holders("law@v1") == 0


def test_a_gateway_that_died_holds_nothing_after_a_while(new: Callable[[], Registry], clock: Clock) -> None:
    dead, alive = new(), new()
    for registry in (dead, alive):
        hold(registry, "law@v1")
    clock.seconds += LEASE_SECONDS / 2
    alive.renew()
    assert alive.holders("law@v1") == 2
    clock.seconds += LEASE_SECONDS / 2 + 1
    assert alive.holders("law@v1") == 1
    clock.seconds -= LEASE_SECONDS  # and its lease is gone
    assert alive.holders("law@v1") == 1
    assert new().holders("law@v10") == 0


def test_what_nobody_holds_and_the_store_does_not_call_current_is_not_needed(
    new: Callable[[], Registry], clock: Clock, tmp_path: Path
) -> None:
    store, options = tmp_path / "store", ShardOptions()
    for version in ("v1", "v2", "v3"):
        toy_datastore(store, version=version, domain="law", activate=version == "v2")
    dead, alive = new(), new()
    for version in ("v1", "v2", "v3"):
        path = store / "law" / version
        alive.write(f"law@{version}", Spec.of(path, Manifest.load(path), options))
    elsewhere = replace(Spec.of(path, Manifest.load(path), options), path="/elsewhere/law/v1")
    alive.write("other@v1", elsewhere)
    alive.write("gone@v1", replace(elsewhere, path=str(store / "gone" / "v1")))
    hold(dead, "law@v1")
    hold(alive, "law@v3")
    assert alive.unneeded(store) == ["gone@v1"]
    clock.seconds += LEASE_SECONDS + 1  # the gateway that had v1 was killed before it could say so
    alive.renew()
    assert alive.unneeded(store) == ["gone@v1", "law@v1"]
    alive.erase("law@v1")
    assert alive.names() == ["gone@v1", "law@v2", "law@v3", "other@v1"]


def test_what_another_program_wrote_is_named_and_hides_nothing(clock: Clock, tmp_path: Path) -> None:
    values = Values()
    registry = Registry(values, clock)
    values.put("application/a@v1", b'{"path": "/x", "something": 1, "options": {}}')
    with pytest.raises(DatastoreError, match="another version of knnlm"):
        registry.spec("a@v1")
    assert registry.unneeded(tmp_path) == []
    assert registry.spec("b@v1") is None
