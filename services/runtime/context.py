"""One request on its way through a service: who it is, how long it may take, where the time went.

The faces make it, engines read it. It rides in a context variable, so that logs and the clients of other services
find the request id and the deadline without every function passing them on.
"""

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from knnlm.errors import DeadlineExceeded, InvalidRequest
from knnlm.transport.context import outgoing

_CURRENT: ContextVar["RequestContext | None"] = ContextVar("request", default=None)
_ID = re.compile(r"[A-Za-z0-9._:/+=@~-]{1,128}")


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the work whose beginning is known. started: on the clock of time.perf_counter."""

    name: str
    started: float
    seconds: float


@dataclass
class RequestContext:
    """deadline: on the clock of time.monotonic. admin: came with an admin key. probe: another service looks how this
    one is, every second. timings: seconds per stage; those whose beginning is known are stages, too. error: the code of
    the error it was answered with. carried: pairs that its own calls to other services carry. started, began_ns: one
    moment, on time.perf_counter and on the calendar.
    """

    id: str
    face: str
    deadline: float
    admin: bool = False
    probe: bool = False
    timings: dict[str, float] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    error: str | None = None
    trace_id: str | None = None
    carried: tuple[tuple[str, str], ...] = ()
    started: float = field(default_factory=time.perf_counter)
    began_ns: int = field(default_factory=time.time_ns)

    def remaining(self) -> float:
        """Seconds left. Raises DeadlineExceeded when there are none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the request's time was over before its answer was ready")
        return left

    def logged(self) -> dict[str, float]:
        """The timings under names that say their unit."""
        return {f"{stage}_s": seconds for stage, seconds in self.timings.items()}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.timings[name] = self.timings.get(name, 0.0) + seconds
            self.stages.append(Stage(name, started, seconds))


def current() -> RequestContext:
    """The request being answered. Raises RuntimeError outside one."""
    request = _CURRENT.get()
    if request is None:
        raise RuntimeError("no request is being answered here")
    return request


def ids() -> dict[str, str]:
    """Fields that name the request being answered in a log line: its id, and its trace if it has one. Empty outside."""
    request = _CURRENT.get()
    if request is None:
        return {}
    trace = {} if request.trace_id is None else {"trace_id": request.trace_id}
    return {"request_id": request.id, **trace}


@contextmanager
def entered(request: RequestContext) -> Iterator[RequestContext]:
    """Make it `current()` inside, where clients of other services pass on its id, deadline and what it carries."""
    token = _CURRENT.set(request)
    try:
        with outgoing(request_id=request.id, deadline=request.deadline, metadata=request.carried):
            yield request
    finally:
        _CURRENT.reset(token)


def new_id(given: str | None) -> str:
    """The caller's request id, or a fresh one when there is none or it could break a log line."""
    return given if given is not None and _ID.fullmatch(given) else uuid.uuid4().hex


def seconds_allowed(asked: str | None, most: float) -> float:
    """Seconds a request may take: what its X-Request-Timeout header asks, at most what the service allows."""
    if asked is None:
        return most
    try:
        seconds = float(asked)
    except ValueError:
        seconds = float("nan")
    if not seconds > 0:  # NaN as well
        raise InvalidRequest(f"X-Request-Timeout must be seconds > 0, got {asked[:40]!r}", param="x-request-timeout")
    return min(seconds, most)
