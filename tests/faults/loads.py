"""Load on a service, and what came of each request: closed loops, which find how much it can do, and open ones, which
ask more than that whatever comes back."""

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from tests.faults.figures import percentile

__all__ = ["Ask", "Outcome", "closed_loop", "figures", "grpc_asks", "http_asks", "open_loop"]

PATIENCE = 90.0  # seconds: more than any service takes
C = grpc.StatusCode
HTTP_OF = {C.OK: 200, C.RESOURCE_EXHAUSTED: 429, C.UNAVAILABLE: 503, C.DEADLINE_EXCEEDED: 504}
BUSY = {503: "unavailable", 504: "deadline_exceeded"}


@dataclass(frozen=True)
class Outcome:
    """status: of HTTP, or what is said so in gRPC; 0: no answer. problem: None when the answer keeps the rules."""

    seconds: float
    status: int
    problem: str | None


Ask = Callable[[int], Awaitable[tuple[int, str | None]]]  # status and problem of the request of this number


@asynccontextmanager
async def http_asks(
    port: int, requests: Sequence[tuple[str, bytes]], content_type: str = "application/json"
) -> AsyncIterator[Ask]:
    """requests: path and body, taken in turn, over as many connections as are needed at once.

    A client of a few lines, because it shares the cores with the services: httpx takes longer to ask than they take to
    refuse.
    """
    head = "POST {} HTTP/1.1\r\nHost: x\r\nContent-Type: {}\r\nContent-Length: {}\r\n\r\n"
    ready = [head.format(path, content_type, len(body)).encode() + body for path, body in requests]
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(number: int) -> tuple[int, str | None]:
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
                writer.write(ready[number % len(ready)])
                begun = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
                headers = {
                    name.lower(): value.strip() for name, _, value in (line.partition(":") for line in begun[1:])
                }
                body = await reader.readexactly(int(headers["content-length"]))
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as err:
            return 0, repr(err)
        if headers.get("connection") == "close":
            writer.close()
        else:
            idle.append((reader, writer))
        status = int(begun[0].split()[1])
        return status, _problem(status, headers, body)

    yield ask
    for _, writer in idle:
        writer.close()


@asynccontextmanager
async def grpc_asks(target: str, path: str, raw: bytes, channels: int = 4) -> AsyncIterator[Ask]:
    """One message over several connections, serialized already."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(grpc.aio.insecure_channel(target, options=options)) for _ in range(channels)
        ]

        async def ask(number: int) -> tuple[int, str | None]:
            asked: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = opened[number % channels].unary_unary(path)
            call = asked(raw, timeout=PATIENCE)
            code = await call.code()
            status = HTTP_OF.get(code, 0)
            trailing = dict(await call.trailing_metadata() or ())
            if status == 429 and float(trailing.get("retry-after", 0)) < 1:
                return status, f"no retry-after: {trailing}"
            if status not in (200, 429, 503, 504):
                return status, f"{code}: {await call.details()}"
            return status, None

        yield ask


async def closed_loop(ask: Ask, clients: int, seconds: float) -> list[Outcome]:
    """`clients` that ask again as soon as they are answered."""
    outcomes: list[Outcome] = []
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        while time.monotonic() < end:
            outcomes.append(await _asked(ask, number))
            number += clients

    await asyncio.gather(*(client(number) for number in range(clients)))
    return outcomes


async def open_loop(ask: Ask, rate: float, seconds: float, halfway: Callable[[], None]) -> list[Outcome]:
    """`rate` requests a second, each begun at its time whether others are answered or not. halfway: called then.

    A client that cannot keep up begins fewer: how many there were tells.
    """
    begun = time.monotonic()
    half = begun + seconds / 2
    tasks: list[asyncio.Task[Outcome]] = []
    while (now := time.monotonic()) < begun + seconds:
        tasks.append(asyncio.create_task(_asked(ask, len(tasks))))
        if now >= half:
            halfway()
            half = math.inf
        await asyncio.sleep(max(0.0, begun + len(tasks) / rate - now))
    return list(await asyncio.gather(*tasks))


async def _asked(ask: Ask, number: int) -> Outcome:
    begun = time.monotonic()
    status, problem = await ask(number)
    return Outcome(time.monotonic() - begun, status, problem)


def _problem(status: int, headers: Mapping[str, str], body: bytes) -> str | None:
    """What is against the rules: another status, an error of another shape, no word on when to come again."""
    if status == 200:
        return None
    if status not in (429, *BUSY):
        return f"{status}: {body[:300]!r}"
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError) as err:
        return f"{status} without the shape of errors: {err!r}"
    if set(error) != {"message", "type", "param", "code"} or error["code"] != BUSY.get(status, "overloaded"):
        return f"{status} is {error}"
    after = headers.get("retry-after", "")
    if status == 429 and not (after.isdecimal() and int(after) >= 1):
        return f"429 with Retry-After {after!r}"
    return None


def figures(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    accepted = [one.seconds for one in outcomes if one.status == 200]
    refused = [one.seconds for one in outcomes if one.status == 429]
    return {
        "asked": len(outcomes),
        "statuses": dict(Counter(one.status for one in outcomes)),
        "accepted_per_s": round(len(accepted) / seconds, 1),
        "accepted_p50_s": round(percentile(accepted, 0.5), 3),
        "accepted_p99_s": round(percentile(accepted, 0.99), 3),
        "refused_p99_s": round(percentile(refused, 0.99), 3),
    }
