"""Start, readiness, SIGTERM, and every way not to start, as an operator sees them."""

import asyncio
import signal
import socket
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from knnlm.clients.rpc import GrpcDatastore, GrpcLanguageModel
from knnlm.messages import ForwardRequest, SearchRequest
from knnlm.options import SearchOptions
from knnlm.testing import toy_datastore
from tests.services.processes import Running, finished, process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.lm.tiny_models import CONFIGS, random_model, save  # torch, for these tests alone

    return save(random_model(CONFIGS["llama"]()), tmp_path_factory.mktemp("llama"))


def wait_until_ready(running: Running) -> None:
    with httpx.Client(base_url=running.http) as client:
        assert client.get("/livez").status_code == 200
        for _ in range(600):
            if client.get("/readyz").status_code == 200:
                return
            time.sleep(0.1)
    raise AssertionError("not ready after a minute")


def end(running: Running, number: signal.Signals) -> str:
    """What it logged to its end, after a signal; it must end with 0."""
    running.process.send_signal(number)
    _, log = running.process.communicate(timeout=60)
    assert running.process.returncode == 0, log
    return log


def test_the_datastore_service_starts_serves_and_ends_on_sigterm(tmp_path: Path) -> None:
    toy_datastore(tmp_path)
    with process("datastore", "--store", str(tmp_path)) as running:
        wait_until_ready(running)

        async def search() -> None:
            async with GrpcDatastore(running.grpc) as datastore:
                await datastore.search(SearchRequest("toy", np.zeros((1, 16), np.float32), SearchOptions(k=1)))

        asyncio.run(search())
        log = end(running, signal.SIGTERM)
        assert [event for event in ("draining", "stopped") if f"event={event}" not in log] == []


@pytest.mark.slow
def test_the_lm_service_starts_serves_and_ends_on_sigint(model: Path) -> None:
    with process("lm", "--model", str(model), "--device", "cpu") as running:
        wait_until_ready(running)

        async def forward() -> None:
            async with GrpcLanguageModel(running.grpc) as lm:
                request = ForwardRequest([np.array([1, 2], np.int32)], [np.array([1], np.int32)], keys=True)
                keys = (await lm.forward(request)).keys
                assert keys is not None
                assert keys.shape == (1, (await lm.get_model()).key_dim)

        asyncio.run(forward())
        end(running, signal.SIGINT)


def test_a_signal_while_loading_ends_it_with_0(model: Path) -> None:
    with process("lm", "--model", str(model), "--device", "cpu") as running:
        end(running, signal.SIGTERM)


@pytest.mark.parametrize(
    ("service", "flags", "status", "said"),
    [
        ("datastore", ["--store", "/no/such", "--domains", "law", "--port", "0", "--grpc-port", "0"], 1, "'law'"),
        ("datastore", ["--store", "x", "--max-k", "0"], 2, "--max-k (environment: KNNLM_DATASTORE_MAX_K)"),
        ("datastore", [], 2, "KNNLM_DATASTORE_STORE"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(service: str, flags: list[str], status: int, said: str) -> None:
    ended = finished(service, flags)
    assert ended.returncode == status
    assert said in "".join(ended.stderr.splitlines()[-3:])
    assert "Traceback" not in ended.stderr


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = finished("datastore", ["--store", str(tmp_path), "--port", port, "--grpc-port", "0"])
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port} (--port)" in ended.stderr
    assert "Traceback" not in ended.stderr
