"""What a call to another service carries besides its message: the id of the request it serves, until when, and what
else rides with it (the trace it is part of).

A context variable, because a request fans out over code that has no business with any of it (the mixer, the pipeline).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from knnlm.errors import DeadlineExceeded

__all__ = ["PROBE", "Outgoing", "outgoing", "outgoing_id", "outgoing_metadata", "time_limit"]

PROBE = "knnlm-probe"  # the name of a pair that rides with calls which nobody waits for: they fill no log


@dataclass(frozen=True)
class Outgoing:
    request_id: str | None
    deadline: float | None  # of time.monotonic
    metadata: tuple[tuple[str, str], ...]


_NOTHING = Outgoing(None, None, ())
_OUTGOING: ContextVar[Outgoing] = ContextVar("outgoing", default=_NOTHING)


@contextmanager
def outgoing(
    *, request_id: str | None = None, deadline: float | None = None, metadata: Sequence[tuple[str, str]] = ()
) -> Iterator[None]:
    """Inside, every client sends this request id and waits no longer than the deadline (of time.monotonic).

    metadata: pairs that every call carries besides, as HTTP headers and as gRPC metadata: names in lower case, values
    of printable ASCII.
    """
    token = _OUTGOING.set(Outgoing(request_id, deadline, tuple(metadata)))
    try:
        yield
    finally:
        _OUTGOING.reset(token)


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
