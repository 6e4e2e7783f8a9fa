"""TLS on both faces, with and without certificates of clients, and certificates that are renewed."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from knnlm.clients.http import HttpLanguageModel
from knnlm.errors import InvalidRequest, Unauthenticated, Unavailable
from knnlm.testing import ToyLanguageModel
from knnlm.transport.security import Tls
from knnlm.v1 import lm_pb2, lm_pb2_grpc
from services.lm.app import service as lm_service
from services.lm.settings import LmSettings
from services.runtime.http_server import StartupFailed
from services.runtime.lifecycle import Host, running, until_signal
from services.runtime.settings import load_settings
from services.runtime.tls import ServerTls
from tests.services.certificates import Authority, serial
from tests.services.echo import EchoCore, EchoSettings, echo_service
from tests.services.waiting import until


@asynccontextmanager
async def echo(cert_file: Path, key_file: Path, client_ca_file: Path | None = None) -> AsyncIterator[Host]:
    settings = EchoSettings(
        port=0, grpc_port=0, tls_cert_file=cert_file, tls_key_file=key_file, tls_client_ca_file=client_ca_file
    )
    async with running(echo_service(EchoCore(), settings)) as host:
        yield host


async def over_http(host: Host, tls: Tls) -> str:
    async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{host.port}", verify=tls.ssl_context()) as client:
        return str((await client.get("/version")).json()["service"])


async def over_grpc(host: Host, tls: Tls) -> str:
    async with grpc.aio.secure_channel(f"127.0.0.1:{host.grpc_port}", tls.channel_credentials()) as channel:
        stub = lm_pb2_grpc.LanguageModelStub(channel)
        return str((await stub.GetModel(lm_pb2.GetModelRequest())).model_id)


async def refused(host: Host, tls: Tls) -> None:
    """By both faces, before any request."""
    with pytest.raises(httpx.TransportError):
        await over_http(host, tls)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await over_grpc(host, tls)
    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_both_faces_speak_tls_to_who_trusts_their_authority(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")

    async with echo(*authority.issue("service")) as host:
        trusting = Tls(ca_file=authority.file)
        assert await over_http(host, trusting) == "echo"
        assert await over_grpc(host, trusting)
        await refused(host, Tls(ca_file=other.file))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{host.port}") as plain:
            with pytest.raises(httpx.TransportError):
                await plain.get("/livez")


async def test_a_certificate_for_another_address_is_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)

    async with echo(*authority.issue("service", host="127.0.0.2")) as host:
        await refused(host, Tls(ca_file=authority.file))


async def test_with_an_authority_for_clients_those_without_its_certificate_are_refused(tmp_path: Path) -> None:
    ours, clients, strangers = (Authority(tmp_path, name) for name in ("ours", "clients", "strangers"))

    async with echo(*ours.issue("service"), clients.file) as host:
        known = Tls(ours.file, *clients.issue("client"))
        assert await over_http(host, known) == "echo"
        assert await over_grpc(host, known)
        await refused(host, Tls(ca_file=ours.file))
        await refused(host, Tls(ours.file, *strangers.issue("stranger")))


async def shown(port: int) -> int:
    """The serial number of the certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        return serial(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
    finally:
        writer.transport.abort()


async def test_renewed_certificates_are_shown_to_new_connections_and_open_ones_go_on(tmp_path: Path) -> None:
    authority = Authority(tmp_path)

    cert_file, key_file = authority.issue("service")
    async with (
        echo(cert_file, key_file) as host,
        httpx.AsyncClient(verify=Tls(authority.file).ssl_context()) as client,
    ):
        url = f"https://127.0.0.1:{host.port}/livez"
        stream = (await client.get(url)).extensions["network_stream"]
        ports = (host.port, int(host.grpc_port or 0))
        before = [await shown(port) for port in ports]
        authority.issue("service")

        async def renewed() -> bool:
            now = [await shown(port) for port in ports]
            return all(new != old for new, old in zip(now, before, strict=True))

        await until(renewed)
        assert (await client.get(url)).extensions["network_stream"] is stream  # the connection it had
        assert await over_http(host, Tls(authority.file)) == "echo"
        assert await over_grpc(host, Tls(authority.file))


def test_files_that_do_not_fit_together_yet_are_left_alone(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert_file, key_file = authority.issue("service")
    tls = ServerTls(cert_file, key_file, None)
    old_key = key_file.read_bytes()
    authority.issue("service")
    new_key = key_file.read_bytes()
    key_file.write_bytes(old_key)

    async def handshakes() -> None:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=tls.context)
        async with server:
            await shown(server.sockets[0].getsockname()[1])

    for broken in (lambda: None, lambda: key_file.write_bytes(b""), key_file.unlink):
        broken()
        with pytest.raises(InvalidRequest, match=str(key_file)):
            tls.refresh()
        asyncio.run(handshakes())
    key_file.write_bytes(new_key)
    finish = tls.refresh()
    assert finish is not None
    finish()
    assert tls.refresh() is None
    asyncio.run(handshakes())


async def test_a_new_authority_for_clients_is_taken_over(tmp_path: Path) -> None:
    ours, first, second = (Authority(tmp_path, name) for name in ("ours", "first", "second"))
    trusted = tmp_path / "clients.pem"
    trusted.write_bytes(first.file.read_bytes())

    async with echo(*ours.issue("service"), trusted) as host:
        newcomer = Tls(ours.file, *second.issue("client"))
        await refused(host, newcomer)
        trusted.write_bytes(first.file.read_bytes() + second.file.read_bytes())

        async def admitted() -> bool:
            try:
                return bool(await over_http(host, newcomer) and await over_grpc(host, newcomer))
            except (httpx.TransportError, grpc.aio.AioRpcError):
                return False

        await until(admitted)
        old = Tls(ours.file, *first.issue("old"))
        assert await over_http(host, old)
        assert await over_grpc(host, old)


@pytest.mark.parametrize("name", ["tls_cert_file", "tls_key_file", "tls_client_ca_file"])
@pytest.mark.parametrize("content", [None, b"", b"no PEM"])
def test_a_file_that_cannot_be_used_stops_the_start_and_is_named(
    name: str, content: bytes | None, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    cert_file, key_file = authority.issue("service")
    files: Any = {"tls_cert_file": cert_file, "tls_key_file": key_file, "tls_client_ca_file": authority.file}
    if content is None:
        files[name].unlink()
    else:
        files[name].write_bytes(content)
    with pytest.raises(StartupFailed) as failed:
        asyncio.run(until_signal(echo_service(EchoCore(), EchoSettings(port=0, grpc_port=0, **files))))
    assert str(files[name]) in str(failed.value)
    assert f"--{name.replace('_', '-')} (environment: KNNLM_ECHO_{name.upper()})" in str(failed.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tls-cert-file", "c"], "KNNLM_ECHO_TLS_CERT_FILE) needs --tls-key-file"),
        (["--tls-key-file", "k"], "KNNLM_ECHO_TLS_KEY_FILE) needs --tls-cert-file"),
        (["--tls-client-ca-file", "a"], "KNNLM_ECHO_TLS_CLIENT_CA_FILE) needs --tls-cert-file"),
    ],
)
def test_half_of_tls_is_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_settings(EchoSettings, flags, prog="echo")
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_nothing_older_than_tls_1_2_is_spoken(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    assert ServerTls(*authority.issue("service"), None).context.minimum_version == ssl.TLSVersion.TLSv1_2
    for tls in (Tls(), Tls(authority.file)):
        context = tls.ssl_context()
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.check_hostname
        assert context.verify_mode == ssl.CERT_REQUIRED


def test_a_clients_tls_names_the_file_that_cannot_be_used(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert_file, key_file = authority.issue("client")
    other_cert, _ = authority.issue("other")
    empty, missing = tmp_path / "empty", tmp_path / "missing"
    empty.write_bytes(b"")
    for tls, named in (
        (Tls(ca_file=missing), missing),
        (Tls(ca_file=empty), empty),
        (Tls(ca_file=key_file), key_file),
        (Tls(None, other_cert, key_file), other_cert),
        (Tls(None, cert_file, missing), missing),
    ):
        for use in (tls.ssl_context, tls.channel_credentials):
            with pytest.raises(InvalidRequest, match=str(named)):
                use()
    for half in ({"cert_file": cert_file}, {"key_file": key_file}):
        with pytest.raises(InvalidRequest, match=r"(cert|key)_file"):
            Tls(**half)


async def test_the_http_client_speaks_tls_and_takes_a_key_that_changes(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert_file, key_file = authority.issue("service")
    keys = tmp_path / "keys"
    keys.write_text("right")
    given = ["wrong", "right"]
    files: Any = {"tls_cert_file": cert_file, "tls_key_file": key_file, "tls_client_ca_file": authority.file}
    settings = LmSettings(model="toy", port=0, grpc_port=0, api_keys_file=keys, **files)

    async with running(lm_service(settings, lambda _: ToyLanguageModel())) as host:
        url = f"https://127.0.0.1:{host.port}"
        known = Tls(authority.file, *authority.issue("client"))
        async with HttpLanguageModel(url, api_key=lambda: given.pop(0), tls=known) as lm:
            with pytest.raises(Unauthenticated, match="a wrong one was given"):
                await lm.get_model()
            assert (await lm.get_model()).model_id
        async with HttpLanguageModel(url, api_key="right", tls=Tls(authority.file)) as lm:
            with pytest.raises(Unavailable):
                await lm.get_model()
