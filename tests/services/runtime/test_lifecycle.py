import asyncio
import socket

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from knnlm.errors import KnnlmError, ModelError
from knnlm.v1 import lm_pb2, lm_pb2_grpc
from services.runtime.http_server import StartupFailed
from services.runtime.lifecycle import Host, running, until_signal
from tests.services.echo import EchoCore, EchoSettings, echo_service


async def test_a_core_is_loaded_started_and_closed_in_this_order() -> None:
    core = EchoCore()

    async with running(echo_service(core)):
        assert core.happened == ["load", "start"]
    assert core.happened == ["load", "start", "close"]


async def test_it_answers_that_it_lives_before_it_is_loaded() -> None:
    host = Host(echo_service(EchoCore()))
    await host.listen()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{host.port}") as client:
            assert (await client.get("/livez")).status_code == 200
            assert (await client.get("/readyz")).status_code == 503
        async with grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            status = (await health.Check(health_pb2.HealthCheckRequest())).status
            assert status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await lm_pb2_grpc.LanguageModelStub(channel).GetModel(lm_pb2.GetModelRequest())
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    finally:
        await host.shut()


async def test_shutting_finishes_what_was_accepted_on_both_faces() -> None:
    core = EchoCore()
    host = Host(echo_service(core))
    await host.listen()
    await host.load()
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{host.port}") as client,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
    ):
        over_http = asyncio.create_task(client.get("/slow"))
        await core.entered.wait()
        core.entered.clear()
        over_grpc = asyncio.ensure_future(lm_pb2_grpc.LanguageModelStub(channel).Forward(lm_pb2.ForwardRequest()))
        await core.entered.wait()
        shutting = asyncio.create_task(host.shut())
        while host.admission.readiness.phase != "draining":  # noqa: ASYNC110  nobody else needs an event for it
            await asyncio.sleep(0.01)
        assert "close" not in core.happened
        core.gate.set()
        assert (await over_http).status_code == 200
        await over_grpc
        await shutting
    assert core.happened[-1] == "close"


async def test_what_takes_longer_than_the_drain_is_cut_off() -> None:
    core = EchoCore()
    host = Host(echo_service(core, EchoSettings(port=0, grpc_port=0, drain_timeout_s=1.0)))
    await host.listen()
    await host.load()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel:
        endless = asyncio.ensure_future(lm_pb2_grpc.LanguageModelStub(channel).Forward(lm_pb2.ForwardRequest()))
        await core.entered.wait()
        await asyncio.wait_for(host.shut(), 20)
        with pytest.raises(grpc.aio.AioRpcError):
            await endless


class Unloadable(EchoCore):
    def load(self) -> None:
        raise self.error or KnnlmError("set an error first")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModelError("/m is no model"), "/m is no model"),
        (FileNotFoundError(2, "No such file", "/m"), "[Errno 2] No such file: '/m'"),
        (ZeroDivisionError("oh"), "ZeroDivisionError while loading"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_sentence(error: Exception, said: str) -> None:
    core = Unloadable()
    core.error = error
    with pytest.raises(StartupFailed) as failed:
        asyncio.run(until_signal(echo_service(core)))
    assert str(failed.value) == said
    assert core.happened == ["close"]


@pytest.mark.parametrize("name", ["port", "grpc_port"])
async def test_a_port_in_use_is_told_in_one_sentence(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"port": 0, "grpc_port": 0, name: taken.getsockname()[1]}
        host = Host(echo_service(EchoCore(), EchoSettings(**ports)))
        with pytest.raises(StartupFailed, match=f"--{name.replace('_', '-')}.*in use"):
            await host.listen()


async def test_connections_send_what_they_have_at_once() -> None:
    async with running(echo_service(EchoCore())) as host:
        (listener,) = host._http.servers[0].sockets
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)  # what it accepts inherits it
