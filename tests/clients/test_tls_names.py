"""Over TLS, a replica behind a name shows the certificate of the name, wherever the name leads."""

from pathlib import Path

import grpc
import pytest

from knnlm.clients import fleet
from knnlm.clients.resolve import Address, Name
from knnlm.clients.rpc import Connection, GrpcDatastore
from knnlm.errors import InvalidRequest, Unavailable
from knnlm.transport.security import Tls
from tests.clients.fakes import Replica, number, search
from tests.services.certificates import Authority

NAMED = "10.9.9.9"  # what the certificate is made out to; nobody is there


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
