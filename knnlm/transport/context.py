"""What a call to another service carries besides its message: request id, deadline, and metadata such as the trace.

A context variable, because a request fans out over code that needs none of it (the mixer, the pipeline).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from knnlm.errors import DeadlineExceeded

PROBE = "knnlm-probe"  # metadata key of health probes, which services do not log
MAX_MESSAGE_BYTES = 64 << 20  # the largest gRPC message

# gRPC options: an answer of 64 queries has 512 KiB: fewer, larger frames, and a window that need not grow to it first
HTTP2 = (("grpc.http2.max_frame_size", 1 << 20), ("grpc.http2.lookahead_bytes", 4 << 20))


@dataclass(frozen=True)
class Outgoing:
    request_id: str | None
    deadline: float | None  # on the clock of time.monotonic
    metadata: tuple[tuple[str, str], ...]


_NO_REQUEST = Outgoing(None, None, ())
_OUTGOING: ContextVar[Outgoing] = ContextVar("outgoing", default=_NO_REQUEST)


@contextmanager
def outgoing(
    *, request_id: str | None = None, deadline: float | None = None, metadata: Sequence[tuple[str, str]] = ()
) -> Iterator[None]:
    """Clients that are called inside send this request id and wait no longer than the deadline (time.monotonic).

    metadata: further pairs of every call, as HTTP headers and as gRPC metadata: names in lower case, values
    of printable ASCII.
    """
    token = _OUTGOING.set(Outgoing(request_id, deadline, tuple(metadata)))
    try:
        yield
    finally:
        _OUTGOING.reset(token)


def outgoing_deadline() -> float | None:
    """Until when an answer is of use, on the clock of time.monotonic; None for ever."""
    return _OUTGOING.get().deadline


def outgoing_id() -> str | None:
    return _OUTGOING.get().request_id


def outgoing_metadata() -> Sequence[tuple[str, str]]:
    """The pairs to send with a call besides the request id and the key; none outside of a request."""
    return _OUTGOING.get().metadata


def time_limit(timeout: float) -> float:
    """Seconds the next call may take: the client's own timeout, or what is left until the deadline when that is less.

    Raises DeadlineExceeded when nothing is left.
    """
    deadline = _OUTGOING.get().deadline
    left = timeout if deadline is None else min(timeout, deadline - time.monotonic())
    if left <= 0:
        raise DeadlineExceeded("the request's time was over before another service could be asked")
    return left
