"""The command that containers ask whether their service is ready."""

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from knnlm.testing import toy_datastore
from services.aggregator.settings import AggregatorSettings
from services.datastore.app import service as datastore_service
from services.datastore.settings import DatastoreSettings
from services.lm.settings import LmSettings
from services.runtime.lifecycle import Host, running
from services.runtime.probe import PORTS
from services.runtime.settings import HttpSettings
from tests.services.certificates import Authority
from tests.services.processes import ROOT, environment

SETTINGS: dict[str, type[HttpSettings]] = {
    "lm": LmSettings,
    "datastore": DatastoreSettings,
    "aggregator": AggregatorSettings,
}


def probe(variables: Mapping[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "services.runtime.probe", *(arguments or ("datastore",))],
        env={**environment(), **variables}, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
    )  # fmt: skip


def test_it_knows_the_ports_of_every_service() -> None:
    assert {name: settings.model_fields["port"].default for name, settings in SETTINGS.items()} == PORTS


@pytest.mark.parametrize("tls", ["none", "server", "mutual"])
def test_a_ready_service_is_found_ready_as_its_variables_say(tls: str, tmp_path: Path) -> None:
    toy_datastore(tmp_path / "store")
    authority = Authority(tmp_path)
    given: dict[str, Any] = {}
    if tls != "none":  # for a name that is not that of loopback
        given["tls_cert_file"], given["tls_key_file"] = authority.issue("service", host="192.0.2.1")
    if tls == "mutual":
        given["tls_client_ca_file"] = authority.file

    async def check() -> "subprocess.CompletedProcess[str]":
        settings = DatastoreSettings(store=tmp_path / "store", host="0.0.0.0", port=0, grpc_port=0, **given)  # noqa: S104
        async with running(datastore_service(settings)) as host:
            variables = {f"KNNLM_DATASTORE_{name}".upper(): str(value) for name, value in given.items()}
            variables |= {"knnlm_datastore_host": "0.0.0.0", "KNNLM_DATASTORE_PORT": str(host.port)}  # noqa: S104
            return await asyncio.to_thread(probe, variables)

    ended = asyncio.run(check())
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_service_that_is_not_ready_says_why(tmp_path: Path) -> None:
    async def check() -> list["subprocess.CompletedProcess[str]"]:
        host = Host(datastore_service(DatastoreSettings(store=tmp_path, port=0, grpc_port=0)))
        await host.listen()
        try:
            variables = {"KNNLM_DATASTORE_PORT": str(host.port)}
            return [
                await asyncio.to_thread(probe, variables, "datastore", *route) for route in ([], ["readyz"], ["livez"])
            ]
        finally:
            await host.shut()

    ended, same, lives = asyncio.run(check())
    assert ended.returncode == same.returncode == 1
    assert lives.returncode == 0
    assert "503" in ended.stderr
    assert "loading" in ended.stderr


def test_nobody_there_silence_and_nonsense_are_told_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        for variables in (
            {"KNNLM_DATASTORE_PORT": "1"},
            {"KNNLM_DATASTORE_PORT": port},
            {"KNNLM_DATASTORE_PORT": "x"},
            {"KNNLM_DATASTORE_TLS_CERT_FILE": "c", "KNNLM_DATASTORE_TLS_CLIENT_CA_FILE": str(tmp_path / "none")},
        ):
            ended = probe(variables)
            assert ended.returncode == 1, variables
            assert ended.stderr.count("\n") == 1, ended.stderr


def test_an_answer_that_comes_drop_by_drop_is_not_waited_for() -> None:
    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):  # it has hung up, as it should
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            for _ in range(30):
                connection.sendall(b"x: y\r\n")
                time.sleep(0.5)
            connection.sendall(b"content-length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        dripping = threading.Thread(target=drip, args=(listener,))
        dripping.start()
        ended = probe({"KNNLM_DATASTORE_PORT": str(listener.getsockname()[1])})
        dripping.join()
    assert ended.returncode == 1
    assert "no answer within 2 s" in ended.stderr


@pytest.mark.parametrize("arguments", [("nothing",), ("lm", "datastore"), ("lm", "livez", "readyz")])
def test_it_says_how_it_is_used(arguments: tuple[str, ...]) -> None:
    ended = probe({}, *arguments)
    assert ended.returncode == 1
    assert ended.stderr.startswith("usage: ")


@pytest.mark.parametrize("service", PORTS)
def test_the_containers_ask_it(service: str) -> None:
    text = (ROOT / "services" / service / "Dockerfile").read_text()
    assert f'CMD ["python", "-m", "services.runtime.probe", "{service}"]' in text
