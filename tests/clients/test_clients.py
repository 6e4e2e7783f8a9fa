"""What clients do when things go wrong between them and a service; that they agree is in tests/contract."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable

import grpc
import httpx
import numpy as np
import pytest
from pydantic import SecretStr

from knnlm.clients.call import Connection
from knnlm.clients.http import HttpDatastore, HttpLanguageModel
from knnlm.clients.rpc import GrpcDatastore, GrpcLanguageModel
from knnlm.errors import DeadlineExceeded, InvalidRequest, KnnlmError, Overloaded, TooLarge, Unavailable, UnknownDomain
from knnlm.messages import Document, ForwardRequest, SearchRequest
from knnlm.options import SearchOptions
from knnlm.transport.context import outgoing, time_limit
from knnlm.v1 import lm_pb2, lm_pb2_grpc
from services.runtime.lifecycle import running
from tests.services.echo import EchoCore, EchoSettings, echo_service

Answer = Callable[[httpx.Request], httpx.Response]


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


async def test_no_service_is_unavailable_over_both() -> None:
    port = unused_port()
    async with GrpcDatastore(f"127.0.0.1:{port}") as over_grpc, HttpDatastore(f"http://127.0.0.1:{port}") as http:
        for client in (over_grpc, http):
            with pytest.raises(Unavailable, match=str(port)):
                await client.list_domains()


def over_http(answer: Answer) -> HttpDatastore:
    return HttpDatastore("http://test", transport=httpx.MockTransport(answer))


def error(status: int, code: str, **headers: str) -> httpx.Response:
    body = {"error": {"message": "a sentence", "type": "t", "param": "domain", "code": code}}
    return httpx.Response(status, json=body, headers=headers)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (error(404, "unknown_domain"), UnknownDomain),
        (error(429, "overloaded", **{"retry-after": "7"}), Overloaded),
        (error(413, "too_large"), TooLarge),
        (error(500, "internal"), KnnlmError),
        (error(418, "a_code_of_the_future"), KnnlmError),
        (httpx.Response(502, text="<html>bad gateway</html>"), Unavailable),
        (httpx.Response(404, text="no"), KnnlmError),
        (httpx.Response(404, json=[]), KnnlmError),
        (httpx.Response(200, text="not JSON"), KnnlmError),
        (httpx.Response(200, json=[]), KnnlmError),
    ],
)
def test_an_http_answer_becomes_the_error_that_was_meant(response: httpx.Response, expected: type[KnnlmError]) -> None:
    async def check() -> KnnlmError:
        async with over_http(lambda _: response) as client:
            with pytest.raises(KnnlmError) as raised:
                await client.get_domain("toy")
            return raised.value

    err = asyncio.run(check())
    assert type(err) is expected
    if isinstance(err, Overloaded):
        assert (err.retry_after, err.param, err.message) == (7.0, "domain", "a sentence")


async def test_http_timeouts_and_broken_connections_are_errors_of_ours() -> None:
    def fail(kind: type[httpx.TransportError]) -> Answer:
        def answer(request: httpx.Request) -> httpx.Response:
            raise kind("broken", request=request)

        return answer

    for kind, expected in ((httpx.ReadTimeout, DeadlineExceeded), (httpx.ReadError, Unavailable)):
        async with over_http(fail(kind)) as client:
            with pytest.raises(expected):
                await client.list_domains()


async def test_domains_are_quoted_in_paths() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.raw_path.decode())
        return error(404, "unknown_domain")

    async with over_http(answer) as client:
        with pytest.raises(UnknownDomain):
            await client.search(SearchRequest("a/b?c", np.zeros((1, 2), np.float32), SearchOptions(k=1)))
    assert seen == ["/v1/domains/a%2Fb%3Fc/search"]


async def test_the_request_id_and_what_is_left_of_its_time_go_with_every_call() -> None:
    seen: list[httpx.Headers] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return httpx.Response(200, json={"domains": []})

    async with (
        over_http(answer) as http,
        running(echo_service(EchoCore())) as host,
        GrpcLanguageModel(f"127.0.0.1:{host.grpc_port}") as over_grpc,
    ):
        with outgoing(request_id="abc", deadline=time.monotonic() + 5):
            await http.list_domains()
            assert (await over_grpc.get_model()).model_id == "abc"  # the echo service tells the id it got
    assert seen[0]["x-request-id"] == "abc"
    assert 0 < float(seen[0]["x-request-timeout"]) <= 5


NAMES: list[Callable[[HttpDatastore | GrpcDatastore, str], Awaitable[object]]] = [
    lambda client, name: client.search(SearchRequest(name, np.zeros((1, 2), np.float32), SearchOptions(k=1))),
    lambda client, name: client.get_domain(name),
    lambda client, name: client.get_domain("toy", name),
    lambda client, name: client.activate(name, "v1"),
    lambda client, name: client.add_documents(name, [Document("0", "a text")]),
    lambda client, name: client.remove_documents(name, ["0"]),
]


def test_names_that_are_not_unicode_are_refused_before_anything_is_sent() -> None:
    async def check() -> None:
        async with GrpcDatastore(f"127.0.0.1:{unused_port()}") as over_grpc:
            for client in (over_grpc, over_http(lambda _: httpx.Response(200, json={}))):
                for call in NAMES:
                    with pytest.raises(InvalidRequest, match="Unicode") as raised:
                        await call(client, "half a pair: \ud800")
                    assert raised.value.param in ("domain", "version")
            request = SearchRequest(
                "toy",
                np.zeros((1, 2), np.float32),
                SearchOptions(
                    k=1,
                    exclude_documents=(
                        "0",
                        "\ud800",
                    ),
                ),
            )
            with pytest.raises(InvalidRequest) as raised:
                await over_grpc.search(request)
            assert raised.value.param == "exclude_documents"
            for changed in (over_grpc.remove_documents("toy", ["\ud800"]),
                            over_grpc.add_documents("toy", [Document("\ud800", "a text")])):  # fmt: skip
                with pytest.raises(InvalidRequest) as raised:
                    await changed
                assert raised.value.param in ("ids", "id")

    asyncio.run(check())


def test_the_time_that_is_left_is_never_sent_as_none() -> None:
    seen: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(float(request.headers["x-request-timeout"]))
        return httpx.Response(200, json={"domains": []})

    async def check() -> None:
        async with HttpDatastore("http://test", timeout=0.0004, transport=httpx.MockTransport(answer)) as client:
            await client.list_domains()

    asyncio.run(check())
    assert 0 < seen[0] <= 0.0004


def test_no_call_is_made_when_the_time_is_over() -> None:
    assert time_limit(7.0) == 7.0
    with outgoing(deadline=time.monotonic() - 1), pytest.raises(DeadlineExceeded):
        time_limit(7.0)


async def test_grpc_waits_no_longer_than_it_was_told() -> None:
    request = ForwardRequest([np.zeros(1, np.int32)], [np.zeros(1, np.int32)], keys=True)
    async with (
        running(echo_service(EchoCore())) as host,
        GrpcLanguageModel(Connection(f"127.0.0.1:{host.grpc_port}", timeout=0.1)) as client,
    ):
        with pytest.raises(DeadlineExceeded):
            await client.forward(request)  # the echo service never answers it


class _Flaky(lm_pb2_grpc.LanguageModelServicer):
    """Not there for the first two calls of each rpc, as a replica that restarts."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self.code = code
        self.calls = 0

    async def GetModel(  # noqa: N802
        self,
        request: lm_pb2.GetModelRequest,  # noqa: ARG002
        context: "grpc.aio.ServicerContext[object, object]",
    ) -> lm_pb2.GetModelResponse:
        self.calls += 1
        if self.calls <= 2:
            await context.abort(self.code, "restarting")
        return lm_pb2.GetModelResponse(model_id="toy")

    async def Forward(  # noqa: N802
        self,
        request: lm_pb2.ForwardRequest,  # noqa: ARG002
        context: "grpc.aio.ServicerContext[object, object]",  # noqa: ARG002
    ) -> lm_pb2.ForwardResponse:
        raise AssertionError("not called here")


@pytest.mark.parametrize(
    ("code", "calls", "expected"),
    [(grpc.StatusCode.UNAVAILABLE, 3, None), (grpc.StatusCode.RESOURCE_EXHAUSTED, 1, TooLarge)],
)
async def test_grpc_retries_what_was_not_there_and_nothing_else(
    code: grpc.StatusCode, calls: int, expected: type[KnnlmError] | None
) -> None:
    flaky = _Flaky(code)
    server = grpc.aio.server()
    lm_pb2_grpc.add_LanguageModelServicer_to_server(flaky, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with GrpcLanguageModel(f"127.0.0.1:{port}") as client:
            if expected is None:
                assert (await client.get_model()).model_id == "toy"
            else:
                with pytest.raises(expected):
                    await client.get_model()
    finally:
        await server.stop(None)
    assert flaky.calls == calls


async def test_a_key_is_sent_over_both() -> None:
    async def call(made: Callable[[], Awaitable[object]]) -> str:
        try:
            await made()
        except KnnlmError as err:
            return err.code
        return "ok"

    settings = EchoSettings(port=0, grpc_port=0, api_keys=(SecretStr("k"),))
    async with running(echo_service(EchoCore(), settings)) as host:
        for key, grpc_code, http_code in ((None, "unauthenticated", "unauthenticated"), ("k", "ok", "not_found")):
            async with (
                GrpcLanguageModel(Connection(f"127.0.0.1:{host.grpc_port}", api_key=key)) as over_grpc,
                HttpLanguageModel(f"http://127.0.0.1:{host.port}", api_key=key) as http,
            ):
                assert await call(over_grpc.get_model) == grpc_code
                assert await call(http.get_model) == http_code  # the echo service has no such route
