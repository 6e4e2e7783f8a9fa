"""One request is one trace through all three services; and what there is of traces without a collector."""

import asyncio
import json
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from knnlm.clients.http import HttpLanguageModel
from knnlm.errors import Unavailable
from knnlm.testing import ToyLanguageModel, toy_datastore
from knnlm.transport.context import outgoing, outgoing_metadata
from knnlm.v1 import lm_pb2, lm_pb2_grpc
from services.aggregator.app import service as aggregator_service
from services.aggregator.settings import AggregatorSettings
from services.datastore.app import service as datastore_service
from services.datastore.settings import DatastoreSettings
from services.lm.app import service as lm_service
from services.lm.settings import LmSettings
from services.runtime import observability
from services.runtime.context import RequestContext
from services.runtime.http_server import StartupFailed
from services.runtime.lifecycle import running, until_signal
from services.runtime.settings import load_settings
from services.runtime.tracing import make_tracing
from tests.services.collector import Sent, collecting
from tests.services.echo import EchoCore, EchoSettings, echo_http, echo_service
from tests.services.processes import ROOT

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


@asynccontextmanager
async def system(store: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an aggregator over a toy LM and a toy datastore; leaving sends what is left of the traces."""
    ports: Any = {"port": 0, "grpc_port": 0}
    async with AsyncExitStack() as stack:
        lm = lm_service(LmSettings(model="toy", **ports, **settings), lambda _: ToyLanguageModel())
        datastore = datastore_service(DatastoreSettings(store=store, **ports, **settings))
        hosts = [await stack.enter_async_context(running(service)) for service in (lm, datastore)]
        lm_target, datastore_target = (f"127.0.0.1:{host.grpc_port}" for host in hosts)
        face = AggregatorSettings(port=0, lm_target=lm_target, datastore_target=datastore_target, **settings)
        host = await stack.enter_async_context(running(aggregator_service(face)))
        yield await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://127.0.0.1:{host.port}"))


def test_one_request_is_one_trace_through_all_services(tmp_path: Path) -> None:
    toy_datastore(tmp_path)
    body = {"text": "the cat sat", "knn": {"domain": "toy", "k": 4, "lambda": 0.3, "temperature": 1.0}}

    async def check(endpoint: str) -> None:
        async with system(tmp_path, otlp_endpoint=endpoint) as client:
            headers = {"traceparent": PARENT, "tracestate": "vendor=1", "x-request-id": "abc"}
            answer = await client.post("/v1/next_token", json=body, headers=headers)
            assert answer.status_code == 200
            assert (await client.get("/livez", headers=headers)).status_code == 200

    with collecting() as collector:
        asyncio.run(check(collector.url))
        spans = [span for span in collector.spans if span.trace == TRACE]
    assert set(collector.paths) == {"/v1/traces"}
    servers = {span.service: span for span in spans if span.kind == "SERVER" and not span.name.endswith("Domains")}
    top, lm, datastore = (servers[f"knnlm-{name}"] for name in ("aggregator", "lm", "datastore"))
    assert (top.name, top.parent) == ("POST /v1/next_token", SPAN)
    assert (lm.name, lm.parent) == ("knnlm.v1.LanguageModel/Forward", top.id)
    assert datastore.name in ("knnlm.v1.Datastore/Search", "knnlm.v1.Datastore/GetDomain")
    assert datastore.parent == top.id
    assert {"http.route": "/v1/next_token", "http.response.status_code": 200}.items() <= top.attributes.items()
    assert {"rpc.method": "Forward", "rpc.grpc.status_code": 0}.items() <= lm.attributes.items()
    assert {span.attributes["knnlm.request_id"] for span in (top, lm, datastore)} == {"abc"}
    assert not any(span.failed for span in spans)
    assert isinstance(top.attributes["knnlm.lm_s"], float)  # known by its duration alone

    stages = [span for span in spans if span.kind == "INTERNAL"]
    below_lm = {span.name: span for span in stages if span.parent == lm.id}
    assert set(below_lm) == {"queue", "work"}
    assert lm.start <= below_lm["queue"].start <= below_lm["queue"].end <= below_lm["work"].start
    assert below_lm["work"].end <= lm.end
    search = next(span for span in spans if span.name.endswith("/Search"))
    assert search.parent == top.id
    assert {span.name for span in stages if span.parent == search.id} == {"queue", "work"}
    assert "knnlm.queue_s" not in search.attributes


Requests = list[tuple[str, str]]  # methods and paths; RPC for an rpc


async def traced(
    endpoint: str, requests: Requests, core: EchoCore | None = None, traceparent: str = "", **settings: Any
) -> None:
    async with (
        running(
            echo_service(core or EchoCore(), EchoSettings(port=0, grpc_port=0, otlp_endpoint=endpoint, **settings))
        ) as host,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{host.port}") as client,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
    ):
        for method, path in requests:
            if method == "RPC":
                call: Any = channel.unary_unary(path)
                await call(b"").code()
            else:
                body = {"count": 1} if path == "/echo/a" else None
                await client.request(method, path, json=body, headers={"traceparent": traceparent})


def sent(requests: Requests, core: EchoCore | None = None, **settings: Any) -> list[Sent]:
    """The spans of the requests, in the order in which they ended."""
    with collecting() as collector:
        asyncio.run(traced(collector.url, requests, core, **settings))
        return collector.spans


def test_a_request_of_nobody_elses_trace_begins_one_and_stages_stand_below_it() -> None:
    work, top = sent([("POST", "/echo/a")])
    assert (top.name, top.parent, top.kind) == ("POST /echo/{name}", "", "SERVER")
    assert (work.name, work.parent, work.trace) == ("work", top.id, top.trace)
    assert top.start <= work.start <= work.end <= top.end


def test_failures_tell_their_code_and_whose_fault_they_were() -> None:
    core = EchoCore()
    core.error = ZeroDivisionError("oh")
    asked = [
        ("GET", "/fail"),
        ("RPC", "/knnlm.v1.LanguageModel/GetModel"),
        ("GET", "/no/such"),
        ("PROPFIND", "/no/such"),
    ]
    spans = sent(asked, core)
    (rpc,) = (span for span in spans if "rpc.grpc.status_code" in span.attributes)  # it may end after later requests
    http, unrouted, odd = (span for span in spans if span is not rpc)
    assert (http.attributes["http.response.status_code"], http.attributes["error.type"], http.failed) == (
        500, "internal", True,
    )  # fmt: skip
    assert (rpc.attributes["rpc.grpc.status_code"], rpc.attributes["error.type"], rpc.failed) == (13, "internal", True)
    assert (unrouted.name, unrouted.attributes["error.type"], unrouted.failed) == ("GET unrouted", "not_found", False)
    assert odd.name == "_OTHER unrouted"


def test_a_share_of_none_sends_none_but_what_a_caller_sampled() -> None:
    asked = [("POST", "/echo/a")]
    assert sent(asked, trace_sample_ratio=0.0) == []
    assert sent(asked, trace_sample_ratio=1.0, traceparent=PARENT[:-2] + "00") == []
    assert {span.trace for span in sent(asked, trace_sample_ratio=0.0, traceparent=PARENT)} == {TRACE}


class Asking(EchoCore):
    """Notes what a call to another service would carry."""

    async def GetModel(self, request: Any, context: Any) -> lm_pb2.GetModelResponse:  # noqa: ARG002, N802
        self.happened.append(json.dumps(dict(outgoing_metadata())))
        return lm_pb2.GetModelResponse()


async def handed_on(metadata: dict[str, str], **settings: Any) -> dict[str, str]:
    core = Asking()
    async with (
        running(echo_service(core, EchoSettings(port=0, grpc_port=0, **settings))) as host,
        grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
    ):
        stub = lm_pb2_grpc.LanguageModelStub(channel)
        await stub.GetModel(lm_pb2.GetModelRequest(), metadata=tuple(metadata.items()))
        found: dict[str, str] = json.loads(core.happened[-1])
        return found


def test_without_a_collector_a_trace_is_handed_on_as_it_came() -> None:
    given = {"traceparent": PARENT, "tracestate": "vendor=1,other=2"}
    assert asyncio.run(handed_on({**given, "x-other": "no"})) == given
    assert asyncio.run(handed_on({})) == {}


def test_with_a_collector_the_services_own_span_is_handed_on() -> None:
    with collecting() as collector:
        given = {"traceparent": PARENT, "tracestate": "vendor=1"}
        found = asyncio.run(handed_on(given, otlp_endpoint=collector.url + "/v1/traces"))
        (span,) = collector.spans
    assert set(collector.paths) == {"/v1/traces"}
    assert found == {"traceparent": f"00-{TRACE}-{span.id}-01", "tracestate": "vendor=1"}
    assert span.parent == SPAN


@pytest.mark.parametrize(
    ("traceparent", "handed"),
    [
        (PARENT, PARENT),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", PARENT),
        (f"cc-{TRACE}-{SPAN}-01-\x07", PARENT),
        (f"00-{TRACE}-{SPAN}-01-too-long", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"cc-{TRACE}-{SPAN}-01-{'x' * 600}", None),
        ("nonsense", None),
        ("", None),
    ],
)
def test_what_is_no_trace_is_not_handed_on(traceparent: str, handed: str | None) -> None:
    for tracestate in (None, "a=\x07"):
        request = RequestContext("id", "http", 0.0)
        make_tracing("echo", EchoSettings()).begin(request, traceparent, tracestate)
        assert request.carried == ((("traceparent", handed),) if handed else ())
        assert request.trace_id == (TRACE if handed else None)


async def test_http_clients_send_what_rides_with_a_request() -> None:
    seen: list[dict[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(dict(request.headers))
        return httpx.Response(503)

    async with HttpLanguageModel("http://test", transport=httpx.MockTransport(answer)) as lm:
        with outgoing(metadata=[("traceparent", PARENT)]), pytest.raises(Unavailable, match="503"):
            await lm.get_model()
    assert seen[0]["traceparent"] == PARENT


@pytest.fixture
def lines() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_log_lines_name_the_trace(capsys: pytest.CaptureFixture[str], lines: None) -> None:
    async def check() -> None:
        async with echo_http(EchoCore()) as (client, _):
            await client.get("/version", headers={"traceparent": PARENT})
            await client.get("/version", headers={"traceparent": "nonsense"})

    observability.configure_logs("json", "info")
    asyncio.run(check())
    first, second = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert first["trace_id"] == TRACE
    assert "trace_id" not in second


def test_a_dead_collector_fails_no_request_and_keeps_nobody_from_ending() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        asyncio.run(asyncio.wait_for(traced(url, [("POST", "/echo/a")] * 3), 60))
    asyncio.run(asyncio.wait_for(traced("http://127.0.0.1:1", [("POST", "/echo/a")] * 3), 60))


@pytest.mark.parametrize(
    "endpoint", ["collector:4318", "grpc://collector", "http://", "http://c:port", "http://user:hush@collector"]
)
def test_an_endpoint_that_cannot_be_used_is_refused_and_not_shown(
    endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load_settings(EchoSettings, ["--otlp-endpoint", endpoint], prog="echo")
    said = capsys.readouterr().err
    assert "--otlp-endpoint (environment: KNNLM_ECHO_OTLP_ENDPOINT) must" in said
    assert "hush" not in said


def test_without_the_package_the_start_fails_and_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)  # as if it were not installed
    settings = EchoSettings(port=0, grpc_port=0, otlp_endpoint="http://127.0.0.1:1")
    with pytest.raises(StartupFailed, match=r"--otlp-endpoint.*pip install 'knnlm\[tracing\]'"):
        asyncio.run(until_signal(echo_service(EchoCore(), settings)))


def test_opentelemetry_is_loaded_only_where_it_is_asked_for() -> None:
    program = (
        "import sys, services.runtime.lifecycle; from services.lm.app import service;"
        "sys.exit(any(name.startswith(('opentelemetry.sdk', 'requests')) for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
