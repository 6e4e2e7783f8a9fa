"""Lines that a program can read, whatever happened."""

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest

from services.runtime import observability
from tests.services.echo import EchoCore, echo_http


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_bug_is_one_json_line_with_its_traceback_and_its_request(capsys: pytest.CaptureFixture[str]) -> None:
    async def check() -> None:
        core = EchoCore()
        core.error = ZeroDivisionError('a "quoted"\nsecond line \x1b[31m \udcff')
        async with echo_http(core) as (client, _):
            await client.get("/fail", headers={"x-request-id": "abc"})

    observability.configure_logs("json", "debug")
    asyncio.run(check())
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (bug,) = [line for line in lines if line["event"] == "unhandled"]
    assert (bug["level"], bug["request_id"]) == ("error", "abc")
    assert "ZeroDivisionError" in bug["traceback"]
    assert "second line" in bug["traceback"]
    assert [line["route"] for line in lines if line["event"] == "request"] == ["/fail"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"\xff", {"a": {1, 2}}, "\ud800"])
def test_every_value_gives_json_that_strict_readers_take(value: object, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    observability.configure_logs("json", "info")
    observability.event(logging.getLogger("test"), "happened", value=value)
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line, parse_constant=refuse)["event"] == "happened"
