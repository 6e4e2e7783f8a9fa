"""What requests in work may hold together: bytes over both faces, and who may send any at all."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from pydantic import SecretStr

from knnlm.transport.context import PROBE
from knnlm.v1 import common_pb2, lm_pb2, lm_pb2_grpc
from services.runtime.lifecycle import Host, running
from services.runtime.settings import load_settings
from tests.services.echo import EchoCore, EchoSettings, echo_http, echo_service
from tests.services.waiting import until

KIB = 1024
MOST = 256 * KIB
BOUNDS: Any = {"max_inflight_bytes": MOST, "max_body_bytes": MOST, "grpc_max_message_bytes": MOST}


def served(core: EchoCore, **settings: Any) -> Any:
    return running(echo_service(core, EchoSettings(port=0, grpc_port=0, **settings)))


def in_flight(host: Host) -> float:
    return host.service.metrics.registry.get_sample_value("knnlm_inflight_bytes") or 0.0


async def receiving(host: Host, count: int) -> bool:
    return host.service.metrics.registry.get_sample_value("knnlm_receiving_requests") == count


def message(size: int) -> lm_pb2.ForwardRequest:
    return lm_pb2.ForwardRequest(tokens=common_pb2.Tensor(data=bytes(size)))


async def refusal(call: Any) -> tuple[grpc.StatusCode, dict[str, str]]:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value.code(), {key: str(value) for key, value in failed.value.trailing_metadata()}


async def test_bytes_of_both_faces_are_bounded_together_and_given_back() -> None:
    core = EchoCore()
    async with (
        served(core, **BOUNDS) as host,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{host.port}") as client,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
    ):
        stub = lm_pb2_grpc.LanguageModelStub(channel)
        holding = asyncio.ensure_future(stub.Forward(message(200 * KIB)))
        await core.entered.wait()
        assert 200 * KIB < in_flight(host) < 201 * KIB

        full = await client.post("/echo/a", content=bytes(100 * KIB))
        assert (full.status_code, full.json()["error"]["code"]) == (429, "overloaded")
        assert full.headers["retry-after"] == "1"
        assert "--max-inflight-bytes" in full.json()["error"]["message"]
        code, trailing = await refusal(stub.Forward(message(100 * KIB)))
        assert (code, trailing["knnlm-error-code"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded")
        assert trailing["retry-after"] == "1"

        small = await client.post("/echo/a", json={"count": 1, "word": "x" * 10 * KIB})
        assert small.status_code == 200
        assert 200 * KIB < in_flight(host) < 201 * KIB
        rejected = host.service.metrics.registry.get_sample_value("knnlm_rejected_total", {"reason": "bytes_full"})
        assert rejected == 2

        core.gate.set()
        await holding
        assert in_flight(host) == 0
        await stub.Forward(message(200 * KIB))
        assert in_flight(host) == 0


async def test_a_body_counts_as_it_comes_whatever_its_length_promises() -> None:
    pause = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield bytes(150 * KIB)
        await pause.wait()
        yield bytes(50 * KIB)

    async with (
        served(EchoCore(), **BOUNDS) as host,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{host.port}") as client,
    ):
        slow = asyncio.create_task(client.post("/echo/a", content=slowly()))

        async def half_is_there() -> bool:
            return in_flight(host) == 150 * KIB

        await until(half_is_there)
        assert (await client.post("/echo/a", content=bytes(150 * KIB))).status_code == 429
        assert in_flight(host) == 150 * KIB
        pause.set()
        assert (await slow).status_code == 400
        assert in_flight(host) == 0


async def test_what_is_held_is_given_back_when_a_caller_leaves() -> None:
    core = EchoCore()
    async with (
        served(core, **BOUNDS) as host,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
    ):
        call = lm_pb2_grpc.LanguageModelStub(channel).Forward(message(200 * KIB))
        await core.entered.wait()
        call.cancel()
        await core.left.wait()

        async def nothing() -> bool:
            return in_flight(host) == 0

        await until(nothing)


@pytest.mark.parametrize(
    ("settings", "key", "expected"),
    [
        ({"api_keys": (SecretStr("right"),)}, "wrong", grpc.StatusCode.UNAUTHENTICATED),
        ({"max_concurrent_requests": 1}, "", grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_a_message_is_not_received_of_who_has_no_key_or_no_place(
    settings: dict[str, Any], key: str, expected: grpc.StatusCode
) -> None:
    core = EchoCore()
    async with (
        served(core, **settings) as host,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
    ):
        stub = lm_pb2_grpc.LanguageModelStub(channel)
        metadata = (("authorization", f"Bearer {key}"),)
        first = asyncio.ensure_future(stub.Forward(lm_pb2.ForwardRequest()))
        if not settings.get("api_keys"):
            await core.entered.wait()
        nothing_sent: Any = channel.stream_unary("/knnlm.v1.LanguageModel/Forward")
        call = nothing_sent(metadata=metadata)  # its message is never written, and it is answered all the same
        assert await asyncio.wait_for(call.code(), 20) == expected
        core.gate.set()
        await asyncio.gather(first, return_exceptions=True)


async def test_a_call_without_a_message_and_one_whose_message_never_comes_are_told() -> None:
    async with (
        served(EchoCore(), request_timeout_s=0.2) as host,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
    ):
        method: Any = channel.stream_unary("/knnlm.v1.LanguageModel/GetModel")
        ended = method()
        await ended.done_writing()
        code, trailing = await refusal(ended)
        assert (code, trailing["knnlm-error-code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")
        waiting = method()
        code, trailing = await refusal(waiting)
        assert (code, trailing["knnlm-error-code"]) == (grpc.StatusCode.DEADLINE_EXCEEDED, "deadline_exceeded")
        assert host.service.metrics.registry.get_sample_value("knnlm_inflight_requests") == 0


async def test_so_many_messages_are_received_at_once_as_fit_if_they_were_the_largest() -> None:
    async with (
        served(EchoCore(), **{**BOUNDS, "grpc_max_message_bytes": MOST // 2}) as host,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
    ):
        method: Any = channel.stream_unary("/knnlm.v1.LanguageModel/GetModel")
        slow = [method() for _ in range(2)]  # open, and nothing sent yet

        await until(lambda: receiving(host, 2))
        third = asyncio.ensure_future(lm_pb2_grpc.LanguageModelStub(channel).GetModel(lm_pb2.GetModelRequest()))

        await until(lambda: receiving(host, 3))
        done, _ = await asyncio.wait([third], timeout=0.1)
        assert not done
        await slow[0].write(b"")
        await slow[0].done_writing()
        assert (await third).model_id
        await slow[1].done_writing()
        assert await slow[1].code() == grpc.StatusCode.INVALID_ARGUMENT


def silent(channel: grpc.aio.Channel, count: int, metadata: tuple[tuple[str, str], ...] = ()) -> list[Any]:
    """Calls that are open and send nothing."""
    method: Any = channel.stream_unary("/knnlm.v1.LanguageModel/GetModel")
    return [method(metadata=metadata) for _ in range(count)]


TWO_SLOTS = {**BOUNDS, "grpc_max_message_bytes": MOST // 2}


@pytest.mark.parametrize("places", [256, 2])
async def test_calls_that_never_send_their_message_hold_the_others_up_for_seconds_only(places: int) -> None:
    """request_timeout_s is 60 here: it is not what ends them."""
    settings = {**TWO_SLOTS, "grpc_receive_timeout_s": 0.5, "max_concurrent_requests": places}
    async with (
        served(EchoCore(), **settings) as host,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
    ):
        idle = silent(channel, 60)
        reply = lm_pb2_grpc.LanguageModelStub(channel).GetModel(lm_pb2.GetModelRequest())
        assert (await asyncio.wait_for(reply, 15)).model_id
        # whichever came first: nobody waits behind the last
        ended, _ = await asyncio.wait([asyncio.ensure_future(refusal(c)) for c in idle], return_when="FIRST_COMPLETED")
        for code, trailing in (task.result() for task in ended):
            assert (code, trailing["knnlm-error-code"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded")
        for call in idle:
            call.cancel()


async def test_how_services_look_at_one_another_does_not_wait_for_messages_that_never_come() -> None:
    async with (
        served(EchoCore(), **TWO_SLOTS, grpc_receive_timeout_s=60) as host,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
    ):
        idle = silent(channel, 20)
        await until(lambda: receiving(host, 20))
        stub = lm_pb2_grpc.LanguageModelStub(channel)
        probe = stub.GetModel(lm_pb2.GetModelRequest(), metadata=((PROBE, "1"),))
        assert (await asyncio.wait_for(probe, 15)).model_id
        for call in idle:
            call.cancel()


async def test_a_message_may_come_late_where_nobody_waits_for_its_slot() -> None:
    async with (
        served(EchoCore(), **TWO_SLOTS, grpc_receive_timeout_s=0.05) as host,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
    ):
        (late,) = silent(channel, 1)
        await until(lambda: receiving(host, 1))
        await lm_pb2_grpc.LanguageModelStub(channel).GetModel(lm_pb2.GetModelRequest())
        await asyncio.sleep(0.2)  # four times what it would get
        await late.write(b"")
        await late.done_writing()
        assert await late.code() == grpc.StatusCode.OK


async def test_bodies_that_come_a_byte_at_a_time_hold_no_place() -> None:
    stopped = asyncio.Event()

    async def dripping() -> AsyncIterator[bytes]:
        for byte in (b"{", b'"'):
            yield byte
        await stopped.wait()

    async with echo_http(EchoCore(), max_concurrent_requests=2) as (client, service):
        slow = [asyncio.create_task(client.post("/echo/a", content=dripping())) for _ in range(5)]

        async def all_arrive() -> bool:
            return service.metrics.registry.get_sample_value("knnlm_inflight_bytes") == 10

        await until(all_arrive)
        assert (await client.post("/echo/a", json={"count": 1})).status_code == 200
        stopped.set()
        assert [(await call).status_code for call in slow] == [400] * 5
        assert service.metrics.registry.get_sample_value("knnlm_receiving_requests") == 0


@pytest.mark.parametrize("name", ["max_body_bytes", "grpc_max_message_bytes"])
def test_a_bound_that_no_single_request_fits_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-inflight-bytes", "70000", "--max-body-bytes", "70000", "--grpc-max-message-bytes", "70000"]
    given = [*flags, f"--{name.replace('_', '-')}", "70001"]
    with pytest.raises(SystemExit):
        load_settings(EchoSettings, given, prog="echo")
    assert f"{name} must be at most max_inflight_bytes, got 70001 and 70000" in capsys.readouterr().err
    assert load_settings(EchoSettings, flags, prog="echo").max_inflight_bytes == 70000


async def test_clients_of_grpc_are_told_to_connect_again() -> None:
    async with (
        served(EchoCore(), grpc_max_connection_age_s=1.0) as host,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
    ):
        stub = lm_pb2_grpc.LanguageModelStub(channel)
        await stub.GetModel(lm_pb2.GetModelRequest())
        assert channel.get_state() == grpc.ChannelConnectivity.READY
        await asyncio.wait_for(channel.wait_for_state_change(grpc.ChannelConnectivity.READY), 30)
        await stub.GetModel(lm_pb2.GetModelRequest())


async def test_http_without_a_place_does_not_read_the_body() -> None:
    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        raise AssertionError("nobody asked for more")

    core = EchoCore()
    async with echo_http(core, max_concurrent_requests=1) as (client, _):
        slow = asyncio.create_task(client.get("/slow"))
        await core.entered.wait()
        assert (await client.post("/echo/a", content=never())).status_code == 429
        core.gate.set()
        await slow
