"""Routes that take and give protobuf messages over HTTP: the same messages as the rpcs, without gRPC.

A request with `Content-Type: application/protobuf` is answered in kind; errors are JSON, as everywhere. Arrays travel
as bytes, which JSON would have as base64 and have to parse. They pass by FastAPI: the middleware has done what is
common.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from knnlm.errors import InvalidRequest

PROTOBUF = "application/protobuf"
_NAMES = {PROTOBUF, "application/x-protobuf"}

# for openapi_extra of routes that have a ProtobufRoute
PROTOBUF_TOO: dict[str, Any] = {
    "requestBody": {"content": {PROTOBUF: {"schema": {"type": "string", "format": "binary"}}}},
    "responses": {"200": {"content": {PROTOBUF: {"schema": {"type": "string", "format": "binary"}}}}},
}

Message = TypeVar("Message")


@dataclass(frozen=True)
class ProtobufRoute:
    """path: a template as FastAPI's, of a POST route that takes JSON as well. answer: gives the reply's bytes for the
    parts of the path and the body; raises KnnlmError."""

    path: str
    answer: Callable[[Mapping[str, str], bytes], Awaitable[bytes]]
    _pattern: "re.Pattern[str]" = field(init=False)

    def __post_init__(self) -> None:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(self.path))
        object.__setattr__(self, "_pattern", re.compile(pattern))

    def match(self, path: str) -> Mapping[str, str] | None:
        """The parts of the path that the template names; None when it is another path."""
        found = self._pattern.fullmatch(path)
        return None if found is None else found.groupdict()


def is_protobuf(content_type: str | None) -> bool:
    return content_type is not None and content_type.partition(";")[0].strip().lower() in _NAMES


def parse(raw: bytes, decode: Callable[[bytes], Message]) -> Message:
    """The message that the bytes are. Raises InvalidRequest when they are not one."""
    try:
        return decode(raw)
    except DecodeError as err:
        raise InvalidRequest(f"the message is not what this call takes: {err}") from err
