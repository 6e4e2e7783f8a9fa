"""How large a JSON body may be before it is parsed: parsing holds up everything else that a service does."""

from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute

from knnlm.errors import InvalidRequest, TooLarge
from knnlm.sources import computed

MAX_LISTED = 1 << 18  # numbers in a body of JSON lists, parsed in a tenth of a second


def bounded(max_bytes: int | None, max_values: int, settings: str) -> type[APIRoute]:
    """A route that refuses bodies of more bytes, or of more values and keys, without parsing them.

    max_bytes: None where --max-body-bytes is enough. settings: what the two numbers follow from, as it is told to the
    caller.
    """

    class Bounded(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:  # Any: of the event loop
            handle = super().get_route_handler()

            async def handle_bounded(request: Request) -> Response:
                body = await request.body()
                if max_bytes is not None and len(body) > max_bytes:
                    raise TooLarge(f"the body may have {max_bytes} bytes here, got {len(body)} ({settings})")
                if b"\0" in body:  # UTF-16 and UTF-32 cannot do without: commas and quotes could not be counted
                    raise InvalidRequest("the body is not JSON in UTF-8: it has a zero byte", param="body")
                if await computed(len(body), has_more_values, body, max_values):
                    raise TooLarge(f"the body may hold {max_values} values and keys here, got more ({settings})")
                return await handle(request)

            return handle_bounded

    return Bounded


def packing() -> type[APIRoute]:
    """A route whose arrays may be packed: those that are larger than MAX_LISTED must be."""
    return bounded(None, MAX_LISTED, 'pack large arrays: {"dtype", "shape", "data"}')


def has_more_values(body: bytes, most: int) -> bool:
    """Whether a JSON text has more than `most` commas and colons: one per value but the first, one per key."""
    if _count(body, b",:") <= most:
        return False
    # what is outside of texts: JSON has no backslash there, and in a text each begins an escape
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    if _count(plain, b'"') > 2 * (most + 1):  # between two texts is one of them at least
        return True
    return _count(b"".join(plain.split(b'"')[::2]), b",:") > most


def _count(body: bytes, characters: bytes) -> int:
    """Times that any of the characters occurs; bytes.count is several times slower where they are many."""
    numbers = np.frombuffer(body, np.uint8)
    return sum(int(np.count_nonzero(numbers == character)) for character in characters)
