"""`knnlm domains activate` through a running service: every replica, in time or named."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr

from knnlm.cli.main import run
from knnlm.datastore.catalog import Catalog
from knnlm.testing import TEXTS, toy_datastore
from services.datastore.app import service
from services.datastore.settings import DatastoreSettings
from services.runtime.lifecycle import Host, running
from tests.cli.conftest import Knnlm

KEY = "admin-key"


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    """A store of toys: cat with two versions, of which the first is current."""
    toy_datastore(tmp_path / "toys", domain="cat")
    toy_datastore(tmp_path / "toys", domain="cat", version="v2", texts=TEXTS[1:2], activate=False)
    return tmp_path / "toys"


@contextmanager
def serving(toys: Path, replicas: int) -> Iterator[tuple[list[str], Callable[[int], None]]]:
    """Replicas in a loop of their own, since the command has one; their addresses, and how to shut one."""
    addresses: list[str] = []
    shut: dict[int, Callable[[], None]] = {}
    up, end = threading.Event(), threading.Event()

    async def serve() -> None:
        settings = [
            DatastoreSettings(
                store=toys, port=0, grpc_port=0, watch_interval_s=0.05, api_keys=(SecretStr("user-key"),),
                admin_api_keys=(SecretStr(KEY),),
            )
            for _ in range(replicas)
        ]  # fmt: skip
        loop = asyncio.get_running_loop()

        async def inside(hosts: list[Host]) -> None:
            if len(hosts) < replicas:
                async with running(service(settings[len(hosts)])) as host:
                    await inside([*hosts, host])
                return
            for i, host in enumerate(hosts):
                addresses.append(f"127.0.0.1:{host.grpc_port}")
                shut[i] = lambda host=host: asyncio.run_coroutine_threadsafe(host.shut(), loop).result(20)  # type: ignore[misc]
            up.set()
            await asyncio.to_thread(end.wait)

        await inside([])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert up.wait(30)
        yield addresses, lambda i: shut[i]()
    finally:
        end.set()
        thread.join(30)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "admin.key"
    path.write_text(f"{KEY}\n")
    return path


def test_every_replica_is_waited_for(knnlm: Knnlm, toys: Path, key_file: Path) -> None:
    with serving(toys, 2) as (addresses, _):
        target = ",".join(addresses)
        command = ("domains", "activate", "cat", "v2", "--wait", "--target", target, "--api-key-file", key_file)
        answer = knnlm(*command, "--json").json
        assert [(r["address"], r["version"], r["problem"]) for r in answer["replicas"]] == [
            (address, "v2", None) for address in addresses
        ]
        assert Catalog(toys).current("cat") == "v2"
        back = knnlm("domains", "activate", "cat", "v1", "--wait", "--target", target, "--api-key-file", key_file)
        assert (back.code, back.out) == (0, "cat is now v1 on 2 of 2 replicas\n")
        assert Catalog(toys).current("cat") == "v1"


def test_replicas_that_are_late_are_named(knnlm: Knnlm, toys: Path, key_file: Path) -> None:
    with serving(toys, 2) as (addresses, shut):
        shut(1)
        options = ("--target", ",".join(addresses), "--api-key-file", key_file, "--timeout", "1.5")
        answer = knnlm("domains", "activate", "cat", "v2", "--wait", *options)
        assert answer.code == 1
        assert f"cat v2 is not served yet by 1 of 2 replicas: {addresses[1]} (" in answer.err
        assert addresses[0] not in answer.err
        told = knnlm("domains", "activate", "cat", "v1", *options)
        assert (told.code, told.out) == (0, "cat is now v1 on 1 of 2 replicas\n")


def test_the_key_may_come_from_the_environment_and_is_needed(
    knnlm: Knnlm, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(toys, 1) as (addresses, _):
        command = ("domains", "activate", "cat", "v2", "--target", addresses[0])
        assert "API key" in knnlm(*command).err
        monkeypatch.setenv("KNNLM_API_KEY", "user-key")
        denied = knnlm(*command)
        assert (denied.code, "user-key" in denied.err) == (1, False)
        assert Catalog(toys).current("cat") == "v1"
        monkeypatch.setenv("KNNLM_API_KEY", KEY)
        assert knnlm(*command).code == 0
        assert Catalog(toys).current("cat") == "v2"
        missing = knnlm(*command[:3], "v9", "--wait", "--target", addresses[0])
        assert (missing.code, "v9" in missing.err) == (1, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--wait", "--store", "store"], "expected either --store or --target"),
        (["--timeout", "3"], "--timeout means nothing without --target"),
        (["--api-key-file", "x"], "--api-key-file means nothing without --target"),
        (["--tls-ca-file", "x"], "--tls-ca-file means nothing without --target"),
        (["--target", "127.0.0.1:1", "--store", "x"], "expected either --store or --target, got both"),
        (["--target", "nowhere"], "target has 'nowhere': expected host:port"),
        (["--target", "127.0.0.1:1", "--timeout", "0"], "--timeout must be a number of seconds > 0, got 0"),
        (["--target", "127.0.0.1:1", "--timeout", "nan"], "--timeout must be a number of seconds > 0, got nan"),
        (["--target", "127.0.0.1:1", "--tls-cert-file", "x"], "cert_file needs key_file beside it"),
        (["--target", "127.0.0.1:1", "--api-key-file", "/no/such/file"], "cannot read /no/such/file"),
    ],
)
def test_what_makes_no_sense_is_refused(knnlm: Knnlm, options: list[str], message: str) -> None:
    answer = knnlm("domains", "activate", "cat", "v2", *options)
    assert answer.code == 2
    assert message in answer.err


def test_without_a_target_the_environments_is_waited_for(
    knnlm: Knnlm, toys: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(toys, 2) as (addresses, _):
        monkeypatch.setenv("KNNLM_TARGET", ",".join(addresses))
        answer = knnlm("domains", "activate", "cat", "v2", "--wait", "--api-key-file", key_file, "--json")
        assert [replica["version"] for replica in answer.json["replicas"]] == ["v2", "v2"]


def test_nobody_there_is_said(knnlm: Knnlm) -> None:
    assert run(["domains", "activate", "cat", "v2", "--target", "127.0.0.1:1", "--wait"]) == 1


def test_prune_keeps_the_current_version_and_the_latest_others(tmp_path: Path, knnlm: Knnlm) -> None:
    for number in range(1, 7):
        toy_datastore(tmp_path, domain="cat", version=f"v{number}", texts=TEXTS[:1], activate=number == 2)
    answer = knnlm("domains", "prune", "cat", "--keep", "2", "--store", str(tmp_path), "--json").json
    assert (answer["removed"], answer["kept"]) == (["v1", "v3", "v4"], ["v2", "v5", "v6"])
    assert knnlm("domains", "prune", "cat", "--store", str(tmp_path), "--json").json["removed"] == []
    assert Catalog(tmp_path).current("cat") == "v2"


def test_what_was_forgotten_is_not_counted(tmp_path: Path, knnlm: Knnlm) -> None:
    toy_datastore(tmp_path)
    store = ("--store", str(tmp_path))
    assert knnlm("forget", "toy", "0", *store).code == 0
    rows = {row["version"]: row for row in knnlm("domains", "list", *store, "--json").json}
    shown = knnlm("show", "toy", *store, "--json").json
    assert rows["v1"]["documents"] - rows["v2"]["documents"] == 1
    assert rows["v1"]["entries"] - rows["v2"]["entries"] == shown["removed"]["entries"] > 0
