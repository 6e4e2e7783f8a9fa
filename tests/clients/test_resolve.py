"""From what a service is called to addresses, and to the certificate that is expected there."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest

from knnlm.clients import fleet
from knnlm.clients import resolve as module
from knnlm.clients.call import Connection
from knnlm.clients.resolve import Address, Name, parse, resolve
from knnlm.clients.rpc import GrpcDatastore
from knnlm.errors import InvalidRequest, Unavailable
from knnlm.transport.security import Tls
from tests.clients.fakes import Replica, number, search
from tests.services.certificates import Authority

V4, V6 = socket.AF_INET, socket.AF_INET6
NAMED = "10.9.9.9"  # what the certificate is made out to; nobody is there


def literal(text: str) -> Address:
    return Address(text, ("ipv6:" if text.startswith("[") else "ipv4:") + text)


@pytest.mark.parametrize(
    ("target", "addresses", "names"),
    [
        ("127.0.0.1:9002", ["127.0.0.1:9002"], []),
        ("127.0.0.1:9002, 127.0.0.1:9012", ["127.0.0.1:9002", "127.0.0.1:9012"], []),
        ("127.0.0.1:9002,127.0.0.1:9002", ["127.0.0.1:9002"], []),
        ("[::1]:9002", ["[::1]:9002"], []),
        ("ipv6:[::1]:9002", ["[::1]:9002"], []),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", ["10.0.0.1:1", "10.0.0.2:2"], []),
        ("datastore:9002", [], [Name("datastore", 9002)]),
        ("dns:///datastore.ns.svc:9002", [], [Name("datastore.ns.svc", 9002)]),
        ("dns:///a:1,dns:///b:2,127.0.0.1:3", ["127.0.0.1:3"], [Name("a", 1), Name("b", 2)]),
        ("dns:///127.0.0.1:9002", ["127.0.0.1:9002"], []),
    ],
)
def test_targets(target: str, addresses: list[str], names: list[Name]) -> None:
    parsed = parse(target)
    assert list(parsed.addresses) == [literal(text) for text in addresses]
    assert list(parsed.names) == names


def test_a_socket_in_the_file_system_is_an_address() -> None:
    assert parse("unix:/run/knnlm.sock").addresses == (Address("unix:/run/knnlm.sock", "unix:/run/knnlm.sock"),)


@pytest.mark.parametrize(
    "target",
    ["", "host", "host:", ":9002", "host:0", "host:65536", "host:x", "::1:9002", "[host]:9002", "http://host:1",
     "host:1,", "[::1:9002", "dns://8.8.8.8/host:1", "unix:"],
)  # fmt: skip
def test_what_is_no_target_is_refused_by_name(target: str) -> None:
    with pytest.raises(InvalidRequest, match="expected host:port") as raised:
        parse(target)
    assert raised.value.param == "target"


def look_up(monkeypatch: pytest.MonkeyPatch, answer: Any) -> tuple[Address, ...] | None:
    """What the name means where the system's resolver answers this, or raises it."""

    def getaddrinfo(*_: object, **__: object) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asyncio.run(resolve(Name("datastore", 9002)))


def test_a_name_stands_for_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = look_up(monkeypatch, [(V4, 1, 6, "", ("10.0.0.2", 9002)), (V4, 1, 6, "", ("10.0.0.1", 9002))])
    name = Name("datastore", 9002)
    assert found == (
        Address("10.0.0.1:9002", "ipv4:10.0.0.1:9002", name), Address("10.0.0.2:9002", "ipv4:10.0.0.2:9002", name),
    )  # fmt: skip


def test_a_machine_with_two_kinds_of_addresses_is_one_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(V6, 1, 6, "", ("fd00::1", 9002, 0, 0)), (V4, 1, 6, "", ("10.0.0.1", 9002))]
    assert [a.text for a in look_up(monkeypatch, both) or ()] == ["10.0.0.1:9002"]
    assert [a.text for a in look_up(monkeypatch, both[:1]) or ()] == ["[fd00::1]:9002"]


@pytest.mark.parametrize("answer", [socket.gaierror(-3, "try again"), UnicodeError("label too long"), []])
def test_a_name_that_means_nothing_now(monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
    assert look_up(monkeypatch, answer) is None


async def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object, **__: object) -> object:
        return await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", never)
    monkeypatch.setattr(module, "RESOLVE_SECONDS", 0.01)
    async with asyncio.timeout(20):
        assert await resolve(Name("datastore", 9002)) is None


@pytest.mark.parametrize(("made_out_to", "fits"), [(NAMED, True), ("127.0.0.1", False)])
async def test_the_certificate_must_be_that_of_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_out_to: str, fits: bool
) -> None:
    authority = Authority(tmp_path)
    cert_file, key_file = authority.issue("datastore", made_out_to)
    replica = Replica(7)

    async def resolve(name: Name) -> tuple[Address, ...]:
        return (Address(replica.address, f"ipv4:{replica.address}", Name(NAMED, name.port)),)

    monkeypatch.setattr(fleet, "resolve", resolve)

    await replica.start(grpc.ssl_server_credentials([(key_file.read_bytes(), cert_file.read_bytes())]))
    async with GrpcDatastore(Connection("datastore:9002", tls=Tls(authority.file), wait=0.1)) as client:
        if fits:
            assert number(await client.search(search())) == 7
        else:
            with pytest.raises(Unavailable, match="does not answer"):
                await client.search(search())
    await replica.stop()


async def test_an_address_shows_the_certificate_of_the_address(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert_file, key_file = authority.issue("datastore")
    replica = Replica(7)

    await replica.start(grpc.ssl_server_credentials([(key_file.read_bytes(), cert_file.read_bytes())]))
    async with GrpcDatastore(Connection(replica.address, tls=Tls(authority.file))) as client:
        assert number(await client.search(search())) == 7
    async with GrpcDatastore(Connection(replica.address, wait=0.1)) as client:
        with pytest.raises(Unavailable):
            await client.search(search())
    await replica.stop()


def test_files_that_cannot_be_used_are_refused_when_the_client_is_made(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot read .*missing\.pem"):
        GrpcDatastore(Connection("127.0.0.1:9002", tls=Tls(tmp_path / "missing.pem")))
