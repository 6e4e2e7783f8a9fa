import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr

from knnlm.errors import Overloaded, UnknownVersion
from knnlm.transport.context import PROBE
from knnlm.v1 import lm_pb2, lm_pb2_grpc
from services.runtime.lifecycle import Host, running
from tests.services.echo import EchoCore, EchoSettings, echo_service
from tests.services.reflected import reflected_services
from tests.services.waiting import until

NAME = "knnlm.v1.LanguageModel"


@asynccontextmanager
async def echo_grpc(core: EchoCore, **settings: Any) -> AsyncIterator[tuple[Host, grpc.aio.Channel]]:
    given = EchoSettings(port=0, grpc_port=0, **settings)
    async with (
        running(echo_service(core, given)) as host,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
    ):
        yield host, channel


async def failure(call: Awaitable[object]) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    trailing = {key: str(value) for key, value in raised.value.trailing_metadata()}
    return raised.value.code(), raised.value.details() or "", trailing


async def test_ids_errors_and_deadlines_cross_grpc() -> None:
    core = EchoCore()
    async with echo_grpc(core) as (host, channel):
        stub = lm_pb2_grpc.LanguageModelStub(channel)
        call = stub.GetModel(lm_pb2.GetModelRequest(), metadata=(("x-request-id", "abc"),))
        assert (await call).model_id == "abc"
        assert ("x-request-id", "abc") in list(await call.trailing_metadata())

        core.error = UnknownVersion("no such version", param="version")
        code, details, trailing = await failure(stub.GetModel(lm_pb2.GetModelRequest()))
        assert (code, details) == (grpc.StatusCode.NOT_FOUND, "no such version")
        assert (trailing["knnlm-error-code"], trailing["knnlm-error-param"]) == ("unknown_version", "version")
        assert len(trailing["x-request-id"]) == 32

        core.error = Overloaded("full", retry_after=3)
        code, _, trailing = await failure(stub.GetModel(lm_pb2.GetModelRequest()))
        assert (code, trailing["retry-after"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "3")

        core.error = ZeroDivisionError("the password is swordfish")
        code, details, _ = await failure(stub.GetModel(lm_pb2.GetModelRequest()))
        assert code == grpc.StatusCode.INTERNAL
        assert "swordfish" not in details

        code, _, _ = await failure(stub.Forward(lm_pb2.ForwardRequest(), timeout=0.1))
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(core.left.wait(), 10)  # the handler was cancelled

        counts = host.service.metrics.registry
        labels = {"face": "grpc", "route": f"/{NAME}/GetModel", "code": "OK"}
        assert counts.get_sample_value("knnlm_requests_total", labels) == 1


def test_how_services_look_at_one_another_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with echo_grpc(EchoCore()) as (_, channel):
            stub = lm_pb2_grpc.LanguageModelStub(channel)
            for metadata in ((), ((PROBE, "1"),)):
                await stub.GetModel(lm_pb2.GetModelRequest(), metadata=metadata)

    with caplog.at_level(logging.DEBUG, "services.runtime.rpc"):
        asyncio.run(check())
    assert [record.levelno for record in caplog.records if record.message == "request"] == [logging.INFO, logging.DEBUG]


def raw(channel: grpc.aio.Channel, method: str, message: bytes) -> Awaitable[object]:
    call: Any = channel.unary_unary(f"/{NAME}/{method}")  # without a serializer it takes bytes, which the stubs forget
    answer: Awaitable[object] = call(message)
    return answer


async def test_bytes_that_are_no_message_are_the_callers_fault() -> None:
    async with echo_grpc(EchoCore()) as (_, channel):
        code, _, trailing = await failure(raw(channel, "GetModel", b"\xff\xff"))
        assert (code, trailing["knnlm-error-code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")
        code, _, _ = await failure(raw(channel, "Nothing", b""))
        assert code == grpc.StatusCode.UNIMPLEMENTED


async def test_health_and_reflection_answer() -> None:
    async with echo_grpc(EchoCore()) as (host, channel):
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", NAME):
            status = (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        assert NAME in await reflected_services(host)


async def test_every_rpc_but_health_needs_a_key_once_keys_are_set() -> None:
    async with echo_grpc(EchoCore(), api_keys=(SecretStr("k"),)) as (host, channel):
        stub = lm_pb2_grpc.LanguageModelStub(channel)
        for call in (stub.GetModel(lm_pb2.GetModelRequest()), stub.Forward(lm_pb2.ForwardRequest())):
            assert (await failure(call))[0] == grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError, match="API key"):
            await reflected_services(host)
        assert NAME in await reflected_services(host, "k")
        key = (("authorization", "Bearer k"),)
        assert (await stub.GetModel(lm_pb2.GetModelRequest(), metadata=key)).model_id
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())


async def test_more_rpcs_than_there_is_room_for_are_refused() -> None:
    core = EchoCore()
    async with echo_grpc(core, max_concurrent_requests=1) as (_, channel):
        stub = lm_pb2_grpc.LanguageModelStub(channel)
        slow = asyncio.ensure_future(stub.Forward(lm_pb2.ForwardRequest()))
        await core.entered.wait()
        code, _, trailing = await failure(stub.GetModel(lm_pb2.GetModelRequest()))
        assert (code, trailing["knnlm-error-code"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded")
        core.gate.set()
        await slow


COUNT = "/knnlm.test.Counter/Count"


def count(channel: grpc.aio.Channel, **options: Any) -> Any:
    method: Any = channel.unary_stream(COUNT)
    return method(b"first", **options)


async def requests(host: Host, code: str) -> float:
    labels = {"face": "grpc", "route": COUNT, "code": code}
    found = []

    async def counted() -> bool:
        found.append(host.service.metrics.registry.get_sample_value("knnlm_requests_total", labels))
        return bool(found[-1])

    await until(counted)
    return found[-1] or 0.0


async def test_a_stream_of_replies_is_admitted_counted_and_logged_as_any_call(caplog: pytest.LogCaptureFixture) -> None:
    core = EchoCore()
    with caplog.at_level(logging.INFO, "services.runtime.rpc"):
        async with echo_grpc(core, max_concurrent_requests=1) as (host, channel):
            call = count(channel, metadata=(("x-request-id", "abc"),))
            assert await call.read() == b"first"
            await core.entered.wait()
            stub = lm_pb2_grpc.LanguageModelStub(channel)
            assert (await failure(stub.GetModel(lm_pb2.GetModelRequest())))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
            core.gate.set()
            assert await call.read() == b"done"
            assert await call.read() is grpc.aio.EOF
            assert ("x-request-id", "abc") in list(await call.trailing_metadata())
            assert await requests(host, "OK") == 1
            assert (await stub.GetModel(lm_pb2.GetModelRequest())).model_id
    (record,) = [r for r in caplog.records if r.__dict__["knnlm_fields"].get("route") == COUNT]
    assert record.__dict__["knnlm_fields"]["work_s"] == 1.0


@pytest.mark.parametrize(
    ("error", "code", "trailing"),
    [
        (Overloaded("full"), grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded"),
        (ZeroDivisionError("the password is swordfish"), grpc.StatusCode.INTERNAL, "internal"),
    ],
)
async def test_a_stream_that_fails_says_so_after_what_it_gave(
    error: Exception, code: grpc.StatusCode, trailing: str
) -> None:
    core = EchoCore()
    core.error = error
    core.gate.set()
    async with echo_grpc(core) as (host, channel):
        call = count(channel)
        assert [await call.read(), await call.read()] == [b"first", b"done"]
        found = await failure(call.read())
        assert (found[0], found[2]["knnlm-error-code"]) == (code, trailing)
        assert "swordfish" not in found[1]
        assert await requests(host, code.name) == 1


async def test_a_stream_ends_with_its_time_and_with_its_caller() -> None:
    core = EchoCore()
    async with echo_grpc(core, request_timeout_s=0.2) as (host, channel):
        call = count(channel)
        assert await call.read() == b"first"
        code, _, trailing = await failure(call.read())
        assert (code, trailing["knnlm-error-code"]) == (grpc.StatusCode.DEADLINE_EXCEEDED, "deadline_exceeded")
        assert core.left.is_set()
        assert await requests(host, "DEADLINE_EXCEEDED") == 1
    core = EchoCore()
    async with echo_grpc(core) as (host, channel):
        call = count(channel)
        await core.entered.wait()
        call.cancel()
        await asyncio.wait_for(core.left.wait(), 10)
        assert await requests(host, "CANCELLED") == 1


async def test_a_stream_needs_a_key_once_keys_are_set() -> None:
    async with echo_grpc(EchoCore(), api_keys=(SecretStr("k"),)) as (_, channel):
        assert (await failure(count(channel).read()))[0] == grpc.StatusCode.UNAUTHENTICATED
        assert await count(channel, metadata=(("authorization", "Bearer k"),)).read() == b"first"


@pytest.mark.slow  # gRPC pings once a second at most, and ends a connection at the fourth
async def test_a_client_that_pings_often_is_not_sent_away() -> None:
    """Pings pile up while a service is held up and come at once: by default gRPC ends such a connection."""
    pinging = [
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    async with (
        running(echo_service(EchoCore(), EchoSettings(port=0, grpc_port=0))) as host,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}", options=pinging) as channel,
    ):
        await asyncio.wait_for(channel.channel_ready(), 10)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(channel.wait_for_state_change(grpc.ChannelConnectivity.READY), 6)
