"""What Client and AsyncClient send, when they send it again, and what they make of what comes back."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from knnlm import AsyncClient, Client, DomainOptions, KnnOptions, SearchOptions
from knnlm.clients import aggregator, routes
from knnlm.clients.call import Connection
from knnlm.clients.routes import Json, Streamed
from knnlm.clients.rpc import GrpcLanguageModel
from knnlm.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    KnnlmError,
    Overloaded,
    PermissionDenied,
    Unavailable,
    UnknownModel,
)
from knnlm.messages import Document

Answer = Callable[[httpx.Request], httpx.Response]
TOKENIZED = {"count": 2, "max_model_len": 64, "tokens": [3, 4], "token_strs": None, "of_the_future": {"x": 1}}
CHANGE = {"domain": "cat", "version": "v2", "parent": "v1"}


def client(answer: Answer, **options: Any) -> Client:
    return Client("http://test", transport=httpx.MockTransport(answer), **options)


def error(status: int, code: str, **headers: str) -> httpx.Response:
    body = {"error": {"message": "a sentence", "type": "t", "param": "model", "code": code}}
    return httpx.Response(status, json=body, headers=headers)


class Service:
    """Answers in turn what it is given; the last for ever. Remembers what it was asked."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


def test_fields_that_are_not_given_are_not_sent_and_unknown_ones_of_the_answer_are_passed_over() -> None:
    service = Service(httpx.Response(200, json=TOKENIZED))
    with client(service) as c:
        answer = c.tokenize("a text", parse_special=True)
    assert (answer.tokens, answer.token_strs, answer.max_model_len) == ([3, 4], None, 64)
    assert json.loads(service.asked[0].content) == {"prompt": "a text", "parse_special": True}


def test_options_of_the_library_are_sent_as_the_request_has_them() -> None:
    knn = KnnOptions(
        (DomainOptions("cat"), DomainOptions("dog", "v1", 0.25, 3.0)),
        SearchOptions(k=7, exclude_documents=("a", "b")),
        combine="union",
        rule="fixed",
        on_datastore_error="lm_only",
    )
    body = routes.score("text", knn=knn).body
    assert json.loads(json.dumps(body)) == {
        "text": "text",
        "on_datastore_error": "lm_only",
        "knn": {
            "domains": [{"domain": "cat"}, {"domain": "dog", "version": "v1", "lambda": 0.25, "temperature": 3.0}],
            "combine": "union",
            "rule": "fixed",
            "k": 7,
            "exclude_documents": ["a", "b"],
        },
    }


def test_keys_and_address_come_from_arguments_then_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(httpx.Response(200, json={**CHANGE, "data": []}))

    def keys(**options: Any) -> list[str | None]:
        with Client(transport=httpx.MockTransport(service), **options) as c:
            c.models()
            c.remove_documents("cat", ["x"])
        return [request.headers.get("authorization") for request in service.asked[-2:]]

    for name in (aggregator.URL, aggregator.API_KEY, aggregator.ADMIN_API_KEY):
        monkeypatch.delenv(name, raising=False)
    assert keys() == [None, None]
    assert str(service.asked[-1].url).startswith("http://127.0.0.1:8000/v1/")
    assert keys(api_key="one") == ["Bearer one", "Bearer one"]
    monkeypatch.setenv(aggregator.URL, "http://elsewhere:1/prefix/")
    monkeypatch.setenv(aggregator.API_KEY, "of-all")
    assert keys() == ["Bearer of-all", "Bearer of-all"]
    assert str(service.asked[-1].url) == "http://elsewhere:1/prefix/v1/domains/cat/documents:remove"
    monkeypatch.setenv(aggregator.ADMIN_API_KEY, "of-admins")
    assert keys(api_key=lambda: "made") == ["Bearer made", "Bearer of-admins"]
    assert keys(admin_key="given") == ["Bearer of-all", "Bearer given"]


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="http://") as raised:
        Client("localhost:8000")
    assert raised.value.param == "base_url"
    with pytest.raises(InvalidRequest) as raised:
        Client("http://[::1")
    assert raised.value.param == "base_url"


@pytest.mark.parametrize("seconds", [float("nan"), float("inf")])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(seconds: float) -> None:
    with pytest.raises(InvalidRequest) as raised:
        Client(timeout=seconds)
    assert raised.value.param == "timeout"
    with pytest.raises(InvalidRequest, match="timeout"):
        Client().within(seconds)


@pytest.mark.parametrize("key", ["kei\nnes", "schl\xfcssel", "of me "])
async def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str) -> None:
    async with AsyncClient("http://127.0.0.1:1", api_key=key) as client:
        with pytest.raises(InvalidRequest) as raised:
            await client.models()
        assert raised.value.param == "api_key"
        assert key.strip() not in str(raised.value)
    lm = GrpcLanguageModel(Connection("127.0.0.1:1", api_key=lambda: key))
    with pytest.raises(InvalidRequest) as raised:
        await lm.get_model()
    assert raised.value.param == "api_key"
    await lm.aclose()


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (error(404, "unknown_model"), UnknownModel),
        (error(403, "permission_denied"), PermissionDenied),
        (error(409, "conflict", **{"x-should-retry": "false"}), Conflict),
        (error(500, "internal"), KnnlmError),
        (httpx.Response(404, text="<html>"), KnnlmError),
        (httpx.Response(200, text="not JSON"), KnnlmError),
        (httpx.Response(200, json={"tokens": "seven"}), KnnlmError),
        (httpx.ReadTimeout("slow"), DeadlineExceeded),
    ],
)
def test_errors_are_the_service_s_and_are_not_asked_for_again(
    response: httpx.Response | Exception, expected: type[KnnlmError]
) -> None:
    service = Service(response)
    with client(service) as c, pytest.raises(KnnlmError) as raised:
        c.tokenize("x")
    assert type(raised.value) is expected
    assert len(service.asked) == 1


REFUSED = httpx.ConnectError("refused")
BROKEN = httpx.RemoteProtocolError("disconnected")
FULL, STARTING = error(429, "overloaded", **{"retry-after": "0"}), error(503, "unavailable", **{"retry-after": "0"})


@pytest.mark.parametrize("failure", [REFUSED, BROKEN, FULL, STARTING])
def test_what_may_be_repeated_is_repeated_by_both_clients(failure: httpx.Response | Exception) -> None:
    service = Service(failure, failure, httpx.Response(200, json=TOKENIZED))
    with client(service) as c:
        assert c.tokenize("x").tokens == [3, 4]
    assert len(service.asked) == 3

    async def check() -> None:
        again = Service(failure, failure, httpx.Response(200, json=TOKENIZED))
        async with AsyncClient("http://test", transport=httpx.MockTransport(again)) as c:
            assert (await c.tokenize("x")).tokens == [3, 4]
        assert len(again.asked) == 3

    asyncio.run(check())


@pytest.mark.parametrize(("failure", "attempts"), [(REFUSED, 2), (FULL, 2), (BROKEN, 1), (STARTING, 1)])
def test_a_change_is_repeated_only_when_it_has_not_begun(failure: httpx.Response | Exception, attempts: int) -> None:
    service = Service(failure, httpx.Response(200, json=CHANGE))
    with client(service) as c:
        if attempts == 1:
            with pytest.raises(Unavailable):
                c.add_documents("cat", [Document("a", "text")])
        else:
            assert c.add_documents("cat", [Document("a", "text")]).version == "v2"
    assert len(service.asked) == attempts


def test_retry_after_beyond_the_patience_is_not_waited_for() -> None:
    service = Service(error(429, "overloaded", **{"retry-after": "7"}))
    started = time.monotonic()
    with client(service, wait=3.0) as c, pytest.raises(Overloaded) as raised:
        c.tokenize("x")
    assert (len(service.asked), raised.value.retry_after) == (1, 7.0)
    assert time.monotonic() - started < 3.0


def test_one_timeout_holds_over_all_attempts_and_is_told_to_the_service() -> None:
    service = Service(STARTING)
    with client(service, wait=60.0) as c, pytest.raises(Unavailable):
        c.within(0.4).tokenize("x")
    limits = [float(request.headers["x-request-timeout"]) for request in service.asked]
    assert len(limits) > 2
    assert limits == sorted(limits, reverse=True)
    assert limits[0] <= 0.4


class Pieces(httpx.SyncByteStream):
    """A body that comes piece by piece, and says whether it was closed."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield from self.pieces

    def close(self) -> None:
        self.closed = True


COUNT = Streamed[Any]("POST", "/v1/completions", lambda event: event["n"], {})


def streamed(body: Pieces) -> Iterator[Any]:
    with client(lambda _: httpx.Response(200, stream=body)) as c:
        yield from c._stream(COUNT)


def test_events_are_read_however_they_are_cut() -> None:
    text = ': hi\r\n\r\ndata: {"n": "a\u2028b"}\n\ndata:{"n": 2}\r\n\r\nevent: x\ndata: [DONE]\n\n'.encode()
    whole = Pieces(text)
    assert list(streamed(whole)) == ["a\u2028b", 2]
    assert whole.closed
    assert list(streamed(Pieces(*(text[i : i + 1] for i in range(len(text)))))) == ["a\u2028b", 2]


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (b"", Unavailable),
        (b'data: {"error": {"message": "m", "type": "t", "param": null, "code": "overloaded"}}\n\n', Overloaded),
        (b"data: {\n\n", KnnlmError),
        (b"data: 7\n\n", KnnlmError),
    ],
)
def test_a_stream_that_breaks_off_raises_after_what_came(tail: bytes, expected: type[KnnlmError]) -> None:
    events = streamed(Pieces(b'data: {"n": 1}\n\n' + tail))
    assert next(events) == 1
    with pytest.raises(KnnlmError) as raised:
        next(events)
    assert type(raised.value) is expected


def test_a_stream_that_is_left_is_closed() -> None:
    body = Pieces(b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n")
    with client(lambda _: httpx.Response(200, stream=body)) as c:
        stream = c._stream(COUNT)
        assert next(stream) == 1
        stream.close()  # type: ignore[attr-defined]  # it is a generator
    assert body.closed


def test_a_stream_that_is_refused_raises_the_error() -> None:
    with client(Service(error(404, "unknown_model"))) as c, pytest.raises(UnknownModel):
        next(c._stream(COUNT))


def test_what_json_cannot_hold_is_refused_before_anything_is_sent() -> None:
    service = Service(httpx.Response(200, json={}))
    for body in ({"lambda": float("nan")}, {"lambda": object()}):
        with client(service) as c, pytest.raises(InvalidRequest, match="JSON"):
            c.score("x", knn=body)
    with client(service) as c, pytest.raises(InvalidRequest, match="Unicode"):
        c.domain("\ud800")
    with client(service) as c, pytest.raises(InvalidRequest, match="domain must not be empty") as raised:
        c.domain("")
    assert raised.value.param == "domain"
    assert service.asked == []


def test_the_body_is_kept_between_attempts() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        given: Json = json.loads(request.content)
        return httpx.Response(200, json={**TOKENIZED, "count": len(given["prompt"])})

    with client(answer) as c:
        assert [c.tokenize(text).count for text in ("a", "abc")] == [1, 3]
