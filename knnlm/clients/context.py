"""What a call to another service carries besides its message: the id of the request it serves, and until when.

A context variable, because a request fans out over code that has no business with either (the mixer, the pipeline).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from knnlm.errors import DeadlineExceeded

__all__ = ["Outgoing", "outgoing", "outgoing_id", "time_limit"]


@dataclass(frozen=True)
class Outgoing:
    request_id: str | None
    deadline: float | None  # of time.monotonic


_NOTHING = Outgoing(None, None)
_OUTGOING: ContextVar[Outgoing] = ContextVar("outgoing", default=_NOTHING)


@contextmanager
def outgoing(*, request_id: str | None = None, deadline: float | None = None) -> Iterator[None]:
    """Inside, every client sends this request id and waits no longer than the deadline (of time.monotonic)."""
    token = _OUTGOING.set(Outgoing(request_id, deadline))
    try:
        yield
    finally:
        _OUTGOING.reset(token)


def outgoing_id() -> str | None:
    return _OUTGOING.get().request_id


def time_limit(timeout: float) -> float:
    """Seconds the next call may take: the client's own timeout, or what is left until the deadline when that is less.

    Raises DeadlineExceeded when nothing is left.
    """
    deadline = _OUTGOING.get().deadline
    left = timeout if deadline is None else min(timeout, deadline - time.monotonic())
    if left <= 0:
        raise DeadlineExceeded("the request's time was over before another service could be asked")
    return left
