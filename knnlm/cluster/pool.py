"""Work on a Ray cluster whose workers, and the machines under them, may die at any moment.

Two kinds: tasks without state (`run_tasks`), which Ray itself does again elsewhere, and work for actors that hold a
model (`Pool`). Both take work from an iterator as there is room for it and keep nothing of what is done, so that this
process stays as small as it is, however much there is to do. Errors of this project end the work; what kills a worker
is tried again, a few times.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Generic, TypeVar

from knnlm.cluster.connection import connect, first_line
from knnlm.errors import DatastoreError, KnnlmError, Unavailable

T = TypeVar("T")

ATTEMPTS = 4  # workers that may die of one piece of work
WAIT_SECONDS = 1.0  # between two looks at the clock
START_SECONDS = 900.0  # until the first worker answers: a large model takes minutes to load
FREEING_SECONDS = 10.0  # within which Ray frees the processors of workers that ended
MAX_STARTING = 32  # workers that are started at once
PIECE_SECONDS = 3600.0  # the longest that a piece may take: then its worker is ended and another one tries


@contextmanager
def connected(address: str, processors: int | None = None) -> Iterator[None]:
    """Inside, this process is connected to a Ray cluster. Arguments and errors: of knnlm.cluster.connection.connect."""
    with redirect_stdout(sys.stderr):  # what Ray prints of workers that die is no output of a command
        connect(address, processors, logging_level="ERROR")
        import ray

        try:
            yield
        finally:
            ray.shutdown()


def resources() -> tuple[int, int, int]:
    """(processors, GPUs, processors of the largest node) of the cluster."""
    import ray

    total = ray.cluster_resources()
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return int(total.get("CPU", 0)), int(total.get("GPU", 0)), int(max(nodes, default=0))


def free_processors(wanted: int) -> int:
    """How many of `wanted` processors one node can give a task now, at least 1.

    Ray reports taken processors for all nodes together; all of them are counted against the largest node. Waits up to
    FREEING_SECONDS for what workers of this process are giving back.
    """
    import ray

    processors, _, largest = resources()
    until = time.monotonic() + FREEING_SECONDS
    while True:
        taken: int = math.ceil(processors - ray.available_resources().get("CPU", 0))
        free = max(1, min(wanted, largest - taken))
        if free == wanted or time.monotonic() > until:
            return free
        time.sleep(FREEING_SECONDS / 20)


def stored(value: T) -> T:
    """A reference that tasks receive as `value` itself; it is sent to each node once."""
    import ray

    reference: Any = ray.put(value)
    return reference  # type: ignore[no-any-return]


def run_tasks(
    function: Callable[..., T], work: Iterable[tuple[Any, ...]], on_done: Callable[[int, T], None], *, cpus: int = 1,
    gpus: int = 0, within: float | None = None,
) -> None:  # fmt: skip
    """Run function(*arguments) on the cluster for every arguments of `work`; on_done gets its number and its result.

    As many run at a time as the cluster has room for, and as many wait. within: seconds until the first of them is
    done, None = however long it takes. Raises what function raises, DatastoreError for what no worker could do in
    ATTEMPTS attempts, lost workers and errors of file systems counted; Unavailable where nothing was done in time.
    """
    import ray

    task = ray.remote(
        num_cpus=cpus, num_gpus=gpus, max_retries=ATTEMPTS - 1, retry_exceptions=[OSError, MemoryError],
        scheduling_strategy="SPREAD",
    )(function)  # fmt: skip
    limit = max(2, 2 * resources()[0] // cpus)
    rest = enumerate(work)
    running: dict[Any, int] = {}
    until = None if within is None else time.monotonic() + within
    while True:
        while len(running) < limit and (found := next(rest, None)) is not None:
            running[task.remote(*found[1])] = found[0]
        if not running:
            return
        done, _ = ray.wait(list(running), num_returns=1, timeout=WAIT_SECONDS)
        if done:
            until = None
        elif until is not None and time.monotonic() > until:
            raise _no_worker(f"was free for {within:.0f} seconds")
        for reference in done:
            try:
                on_done(running.pop(reference), _result(reference))
            except _WorkerDied as err:
                raise DatastoreError(f"no worker could do a piece of work: {err}") from err


class Pool(Generic[T]):
    """Actors that each do one piece of work at a time. Those that die are replaced; `close` ends all of them."""

    def __init__(self, make: Callable[[], Any], size: int) -> None:
        """make: starts an actor with the methods `ready()` and `do(piece)`. size: how many there are."""
        self._make = make
        self._size = size
        self._starting: dict[Any, Any] = {}  # what `ready` will answer: the actor
        self._idle: deque[Any] = deque()
        self._busy: dict[Any, tuple[Any, Any, int, float]] = {}  # actor, piece, attempts before, begun when
        self._deaths = 0  # in a row, of actors that never became ready

    def run(self, work: Iterable[Any], on_done: Callable[[Any, T], None]) -> None:
        """Have every piece done; on_done hears it and what came of it, in the order in which they end. Raises as
        run_tasks does; Unavailable when no worker can be started."""
        import ray

        rest, again = iter(work), deque[tuple[Any, int]]()
        heard = time.monotonic()
        more = True
        while True:
            while self._idle and (more or again):
                piece, attempts = again.popleft() if again else (next(rest, None), 0)
                if piece is None:
                    more = False
                    break
                actor = self._idle.popleft()
                self._busy[actor.do.remote(piece)] = (actor, piece, attempts, time.monotonic())
            if not self._busy and not again and not more:
                return
            while (more or again) and len(self._starting) < min(MAX_STARTING, self._size - self._working):
                actor = self._make()
                self._starting[actor.ready.remote()] = actor
            done, _ = ray.wait([*self._busy, *self._starting], num_returns=1, timeout=WAIT_SECONDS)
            now = time.monotonic()
            for reference in done:
                heard = now
                if reference in self._starting:
                    self._started(reference)
                    continue
                actor, piece, attempts, _ = self._busy.pop(reference)
                try:
                    result: T = _result(reference)
                except _WorkerDied as err:
                    ray.kill(actor)
                    if attempts + 1 >= ATTEMPTS:
                        raise DatastoreError(f"{ATTEMPTS} workers died of one piece of work: {err}") from err
                    again.append((piece, attempts + 1))
                    continue
                self._idle.append(actor)
                on_done(piece, result)
            for actor, _, _, begun in list(self._busy.values()):
                if now - begun > PIECE_SECONDS:
                    ray.kill(actor)
            if not self._busy and not self._idle and now - heard > START_SECONDS:
                raise _no_worker(f"could be started for {START_SECONDS:.0f} seconds")

    @property
    def _working(self) -> int:
        return len(self._idle) + len(self._busy)

    def close(self) -> None:
        import ray

        for actor in (*self._starting.values(), *self._idle, *(actor for actor, *_ in self._busy.values())):
            ray.kill(actor)
        self._starting, self._busy = {}, {}
        self._idle.clear()

    def _started(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        try:
            _result(reference)
        except _WorkerDied as err:
            self._deaths += 1
            if self._deaths >= ATTEMPTS:
                raise Unavailable(f"workers die while they start: {err}", param="workers") from err
            return
        self._deaths = 0
        self._idle.append(actor)


def _no_worker(what: str) -> Unavailable:
    processors, gpus, _ = resources()
    return Unavailable(
        f"no worker {what}: the cluster has {processors} processors and {gpus} GPUs, which others may have taken "
        "(`ray status`)",
        param="workers",
    )


class _WorkerDied(Exception):
    """What ran a piece of work is gone, with its machine or without."""


def _result(reference: Any) -> Any:
    """What a task or a method gave. Raises its error where that is one of this project; _WorkerDied when it was lost,
    DatastoreError for any other."""
    import ray
    from ray import exceptions

    try:
        return ray.get(reference)
    except exceptions.RayTaskError as err:
        cause = err.cause
        if isinstance(cause, KnnlmError):
            raise cause from None
        if isinstance(cause, OSError | MemoryError):
            raise _WorkerDied(str(cause)) from err
        raise DatastoreError(f"a worker failed: {type(cause).__name__}: {cause}") from err
    except exceptions.RayError as err:
        raise _WorkerDied(first_line(err)) from err
