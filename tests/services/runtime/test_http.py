import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from pydantic import SecretStr
from starlette.types import Message

from knnlm.errors import Overloaded, UnknownDomain
from services.runtime import observability
from services.runtime.http import build_app, docs_page
from services.runtime.lifecycle import running
from services.runtime.service import Admission
from tests.services.echo import EchoCore, EchoSettings, echo_http, echo_service

GOOD = {"count": 1}


async def test_a_good_request_is_answered_with_its_id_and_times() -> None:
    async with echo_http(EchoCore()) as (client, _):
        answer = await client.post("/echo/a", json=GOOD, headers={"x-request-id": "abc-1"})
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] == "abc-1"
        assert answer.headers["server-timing"].startswith("work;dur=")
        assert "total;dur=" in answer.headers["server-timing"]


@pytest.mark.parametrize("given", ["a\nb", "x" * 200, "", "ä"])
def test_an_id_that_could_break_a_log_line_is_replaced(given: str) -> None:
    async def check() -> None:
        async with echo_http(EchoCore()) as (client, _):
            answer = await client.get("/version", headers={b"x-request-id": given.encode()})
            assert len(answer.headers["x-request-id"]) == 32

    asyncio.run(check())


BAD_BODIES = {
    "not JSON": (b"{", None),
    "no body": (b"", "body"),
    "a list": (b"[]", "body"),
    "missing": (b"{}", "count"),
    "unknown field": (b'{"count": 1, "cuont": 2}', "cuont"),
    "wrong type": (b'{"count": "1"}', "count"),
    "out of range": (b'{"count": 0}', "count"),
    "not a number": (b'{"count": NaN}', "count"),
    "not text": (b"\xff\xfe", None),
    "too deep": (b"[" * 100_000, None),
    "null": (b"null", "body"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_a_bad_body_is_400_in_the_one_shape_and_names_the_field(name: str) -> None:
    body, param = BAD_BODIES[name]
    async with echo_http(EchoCore()) as (client, _):
        answer = await client.post("/echo/a", content=body, headers={"content-type": "application/json"})
        error = answer.json()["error"]
        assert answer.status_code == 400
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == "invalid_request"
        assert error["param"] == param


async def test_unknown_routes_wrong_methods_and_raised_errors_have_the_one_shape() -> None:
    core = EchoCore()
    async with echo_http(core) as (client, _):
        assert (await client.get("/nope")).json()["error"]["code"] == "not_found"
        wrong = await client.get("/echo/a")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"
        core.error = UnknownDomain("unknown domain 'x'", param="domain")
        unknown = await client.get("/fail")
        assert unknown.status_code == 404
        assert unknown.json()["error"]["param"] == "domain"
        core.error = Overloaded("full", retry_after=3)
        full = await client.get("/fail")
        assert (full.status_code, full.headers["retry-after"]) == (429, "3")


def test_a_bug_is_500_logged_once_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        core = EchoCore()
        core.error = ZeroDivisionError("the password is swordfish")
        async with echo_http(core) as (client, _):
            answer = await client.get("/fail")
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "internal"
            assert "swordfish" not in answer.text
            assert answer.headers["x-request-id"]

    with caplog.at_level(logging.INFO):
        asyncio.run(check())
    assert [r.getMessage() for r in caplog.records if r.exc_info] == ["unhandled"]


async def test_a_body_over_the_limit_is_413_whatever_its_headers_promise() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    async with echo_http(EchoCore(), max_body_bytes=2000) as (client, echo):
        for content in (b" " * 2001, chunks()):
            answer = await client.post("/echo/a", content=content)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        padded = json.dumps(GOOD).encode().ljust(2000)
        allowed = await client.post("/echo/a", content=padded, headers={"content-type": "application/json"})
        assert allowed.status_code == 200
        assert echo.metrics.registry.get_sample_value("knnlm_rejected_total", {"reason": "too_large"}) == 2


async def test_a_request_may_ask_for_less_time_and_not_for_more() -> None:
    async with echo_http(EchoCore(), request_timeout_s=5.0) as (client, _):
        for asked, most in (("2", 2.0), ("900", 5.0)):
            answer = await client.post("/echo/a", json=GOOD, headers={"x-request-timeout": asked})
            assert 0 < answer.json()["left"] <= most
        for wrong in ("soon", "-1", "0", "nan"):
            answer = await client.post("/echo/a", json=GOOD, headers={"x-request-timeout": wrong})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-timeout")
        late = await client.post("/echo/a", json=GOOD, headers={"x-request-timeout": "1e-9"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")


async def test_more_requests_than_there_is_room_for_are_429() -> None:
    core = EchoCore()
    async with echo_http(core, max_concurrent_requests=1) as (client, _):
        slow = asyncio.create_task(client.get("/slow"))
        await core.entered.wait()
        refused = await client.post("/echo/a", json=GOOD)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert (await client.get("/readyz")).status_code == 200
        core.gate.set()
        assert (await slow).status_code == 200
        assert (await client.post("/echo/a", json=GOOD)).status_code == 200


async def test_a_caller_that_hangs_up_cancels_its_request() -> None:
    core = EchoCore()
    echo = echo_service(core)
    door = Admission(echo)
    door.readiness.enter("ready")
    hang_up = asyncio.Event()
    messages: Iterator[Message] = iter([{"type": "http.request", "body": b""}])

    async def receive() -> Message:
        for message in messages:
            return message
        await hang_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError(f"nobody is there to read {message}")

    scope = {"type": "http", "method": "GET", "path": "/slow", "headers": [], "query_string": b""}
    request = asyncio.ensure_future(build_app(echo, door)(scope, receive, send))
    await core.entered.wait()
    hang_up.set()
    await asyncio.wait_for(request, 10)
    assert core.left.is_set()
    labels = {"face": "http", "route": "/slow", "code": "499"}
    assert echo.metrics.registry.get_sample_value("knnlm_requests_total", labels) == 1


async def test_a_stream_is_passed_on_piece_by_piece_and_stops_when_its_caller_leaves() -> None:
    core = EchoCore()
    async with (
        running(echo_service(core)) as host,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{host.port}") as client,
    ):
        async with client.stream("GET", "/stream") as answer:
            assert answer.headers["x-request-id"]
            assert await anext(answer.aiter_text()) == "first "  # while the rest is still being waited for
        await asyncio.wait_for(core.left.wait(), 10)
        core.gate.set()
        assert (await client.get("/stream")).text == "first done"


async def test_readiness_says_why_not_and_loading_services_refuse_with_503() -> None:
    core = EchoCore()
    echo = echo_service(core)
    door = Admission(echo)
    transport = httpx.ASGITransport(build_app(echo, door))
    async with httpx.AsyncClient(base_url="http://test", transport=transport) as client:
        assert (await client.get("/livez")).status_code == 200
        loading = await client.get("/readyz")
        assert (loading.status_code, loading.json()["status"]) == (503, "loading")
        refused = await client.post("/echo/a", json=GOOD)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert refused.headers["retry-after"] == "1"
        door.readiness.enter("ready")
        assert (await client.get("/readyz")).json() == {"status": "ready", "reasons": []}
        core.problem = "the moon is in the way"
        troubled = await client.get("/readyz")
        assert (troubled.status_code, troubled.json()["reasons"]) == (503, ["the moon is in the way"])
        door.readiness.enter("draining")
        assert (await client.get("/readyz")).json()["status"] == "draining"
        assert (await client.post("/echo/a", json=GOOD)).status_code == 503


async def test_the_description_needs_nothing_from_elsewhere() -> None:
    async with echo_http(EchoCore()) as (client, _):
        openapi = (await client.get("/openapi.json")).json()
        assert "/echo/{name}" in openapi["paths"]
        assert "422" not in json.dumps(openapi)
        html = (await client.get("/docs")).text
        assert "/echo/{name}" in html
        assert "http" not in html.replace("http-equiv", "")


def test_the_description_escapes_what_it_shows() -> None:
    route = {"get": {"summary": "<script>", "responses": {"200": {"description": "<b>"}}}}
    html = docs_page({"info": {"title": "<t>", "version": "1"}, "paths": {"/<x>": route}})
    assert not any(tag in html for tag in ("<script>", "<b>", "<t>", "<x>"))


async def test_metrics_count_by_route_template() -> None:
    async with echo_http(EchoCore()) as (client, echo):
        for name in ("a", "b"):
            await client.post(f"/echo/{name}", json=GOOD)
        await client.get("/no/such/path")
        text = (await client.get("/metrics")).text
        assert 'knnlm_requests_total{code="200",face="http",route="/echo/{name}"} 2.0' in text
        assert 'knnlm_requests_total{code="404",face="http",route="unrouted"} 1.0' in text
        assert 'knnlm_build_info{service="echo"' in text
        assert echo.metrics.registry.get_sample_value("knnlm_inflight_requests") == 0


@pytest.fixture
def log_lines(capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    lines: list[str] = []
    yield lines
    root.handlers[:] = handlers
    root.setLevel(level)


def test_one_line_per_request_with_its_id_none_for_probes_and_no_content(
    capsys: pytest.CaptureFixture[str], log_lines: list[str]
) -> None:
    async def check() -> None:
        async with echo_http(EchoCore()) as (client, _):
            await client.get("/livez")
            body = {"count": 1, "word": "a secret prompt"}
            await client.post("/echo/a", json=body, headers={"x-request-id": "abc", "authorization": "Bearer hush"})

    observability.configure_logs("json", "info")
    asyncio.run(check())
    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert line["event"] == "request"
    assert (line["request_id"], line["route"], line["status"]) == ("abc", "/echo/{name}", 200)
    assert not any(secret in json.dumps(line) for secret in ("prompt", "hush"))


def test_log_lines_cannot_be_forged(capsys: pytest.CaptureFixture[str], log_lines: list[str]) -> None:
    observability.configure_logs("text", "info")
    observability.event(logging.getLogger("test"), "happened", reason='a\nlevel=error "b"', seconds=0.25)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert 'reason="a\\nlevel=error \\"b\\"" seconds=0.25' in err


def keyed(api: str = "", admin: str = "", host: str = "127.0.0.1") -> EchoSettings:
    def keys(text: str) -> tuple[SecretStr, ...]:
        return tuple(SecretStr(key) for key in text.split(",") if key)

    return EchoSettings(api_keys=keys(api), admin_api_keys=keys(admin), host=host)


@pytest.mark.parametrize(
    ("settings", "key", "ordinary", "admin"),
    [
        (keyed(), None, 200, 200),
        (keyed(), "anything", 200, 200),
        (keyed(), "", 200, 200),
        (keyed(host="0.0.0.0"), None, 200, 403),  # noqa: S104
        (keyed(api="a,b"), None, 401, 401),
        (keyed(api="a,b"), "c", 401, 401),
        (keyed(api="a,b"), "", 401, 401),
        (keyed(api="a,b"), "b", 200, 403),
        (keyed(admin="z"), None, 200, 403),
        (keyed(admin="z"), "wrong", 200, 403),
        (keyed(admin="z"), "z", 200, 200),
        (keyed(api="a", admin="z"), None, 401, 401),
        (keyed(api="a", admin="z"), "a", 200, 403),
        (keyed(api="a", admin="z"), "z", 200, 200),
    ],
)
async def test_who_may_call_what(settings: EchoSettings, key: str | None, ordinary: int, admin: int) -> None:
    async with echo_http(EchoCore(), **dict(settings)) as (client, _):
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        assert (await client.post("/echo/a", json=GOOD, headers=headers)).status_code == ordinary
        assert (await client.post("/admin", headers=headers)).status_code == admin
        assert (await client.get("/livez", headers=headers)).status_code == 200
