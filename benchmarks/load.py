"""Callers that never wait, for programs that measure a service: each has one call in flight at any time.

They do next to nothing, as load generators do: they and the service share the cores, and what a client library costs is
not what the service costs. They read every answer whole and look at its status; they do not parse it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol, Self
from urllib.parse import quote, urlsplit

import grpc

from knnlm.messages import SearchRequest
from knnlm.transport.context import HTTP2, MAX_MESSAGE_BYTES
from knnlm.v1 import datastore_pb2
from knnlm.wire.protos import to_proto

__all__ = ["Callers", "GrpcCallers", "HttpCallers", "Post", "keep", "search_post"]

CHANNELS = 4  # connections of all callers together: gRPC puts many calls on one
METHOD = "/knnlm.v1.Datastore/Search"


class Callers(Protocol):
    """callers: how many. `call`: one search by the caller of that number, the next of the requests."""

    callers: int

    async def call(self, number: int) -> None: ...


async def keep(callers: Callers, seconds: float) -> list[float]:
    """Each calls again as soon as it is answered. The seconds of every call that was begun in time."""
    found: list[float] = []
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        while (begun := time.perf_counter()) < end:
            await callers.call(number)
            found.append(time.perf_counter() - begun)

    await asyncio.gather(*(one(number) for number in range(callers.callers)))
    return found


class GrpcCallers:
    def __init__(self, target: str, requests: Sequence[SearchRequest], callers: int) -> None:
        self.callers = callers
        self._messages = [to_proto(request, datastore_pb2.SearchRequest).SerializeToString() for request in requests]
        self._turn = count()
        options = [
            *HTTP2,
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._channels = [grpc.aio.insecure_channel(target, options=options) for _ in range(min(CHANNELS, callers))]
        # without serializers they take and give bytes, which the stubs do not know
        self._calls: list[Callable[[bytes], Awaitable[bytes]]] = [
            channel.unary_unary(METHOD)  # type: ignore[misc]
            for channel in self._channels
        ]

    async def call(self, number: int) -> None:
        """Raises grpc.aio.AioRpcError."""
        await self._calls[number % len(self._calls)](self._messages[next(self._turn) % len(self._messages)])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for channel in self._channels:
            await channel.close()


@dataclass(frozen=True)
class Post:
    """What is sent to a path: a body of the content type."""

    path: str
    body: bytes
    content_type: str = "application/json"


def search_post(request: SearchRequest) -> Post:
    """A search as protobuf."""
    body = to_proto(request, datastore_pb2.SearchRequest).SerializeToString()
    return Post(f"/v1/domains/{quote(request.domain, safe='')}/search", body, "application/protobuf")


class HttpCallers:
    """Callers over HTTP, with a connection each."""

    def __init__(self, base_url: str, posts: Sequence[Post], callers: int) -> None:
        self.callers = callers
        self._address = urlsplit(base_url)
        self._messages = [self._message(post) for post in posts]
        self._turn = count()
        self._connections: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def call(self, number: int) -> None:
        """Raises RuntimeError for any status but 200."""
        reader, writer = self._connections[number]
        writer.write(self._messages[next(self._turn) % len(self._messages)])
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        body = await reader.readexactly(int(head.partition("content-length:")[2].partition("\r\n")[0]))
        if not head.startswith("http/1.1 200"):
            raise RuntimeError(f"{head.splitlines()[0]}: {body[:300]!r}")

    def _message(self, post: Post) -> bytes:
        head = (
            f"POST {post.path} HTTP/1.1\r\nhost: {self._address.netloc}\r\n"
            f"content-type: {post.content_type}\r\ncontent-length: {len(post.body)}\r\n\r\n"
        )
        return head.encode() + post.body

    async def __aenter__(self) -> Self:
        for _ in range(self.callers):
            host, port = self._address.hostname or "", self._address.port
            self._connections.append(await asyncio.open_connection(host, port, limit=1 << 22))
        return self

    async def __aexit__(self, *exc: object) -> None:
        for _, writer in self._connections:
            writer.close()
            await writer.wait_closed()
