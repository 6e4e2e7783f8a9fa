"""A bounded queue before one worker thread: while it works, callers wait; when it is free, it takes what has come.

No timer: a lone request is never held back, and batches grow by themselves under load. The queue is counted in items
(rows, tokens) at entry and refuses at once when full. Work whose caller has left or whose time is over is dropped
before it is begun. It knows neither models nor indexes.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from knnlm.errors import DeadlineExceeded, Overloaded, Unavailable
from services.runtime.calls import Call
from services.runtime.metrics import Metrics

__all__ = ["Batcher"]

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    size: int
    group: Hashable
    future: "asyncio.Future[Result]"
    since: float = field(default_factory=time.perf_counter)
    waited: float = 0.0


class Batcher(Generic[Item, Result]):
    """Made and used in one event loop.

    process: called in the worker thread with items of one group; one result per item, in order. When it raises for
    several items, each is tried alone, so that nobody fails by what a stranger asked. size: what an item counts.
    group: items may share a call of `process` when these are equal. max_queue, max_batch: in sizes; a single larger
    item still runs, alone, but one over max_queue can never be admitted.
    """

    def __init__(
        self,
        process: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        size: Callable[[Item], int],
        group: Callable[[Item], Hashable],
        max_queue: int,
        max_batch: int,
        metrics: Metrics,
    ) -> None:
        self._process = process
        self._size = size
        self._group = group
        self._max_queue = max_queue
        self._max_batch = max_batch
        self._metrics = metrics
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._held = 0
        self._closing = False
        self._filled = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._loop_task = asyncio.get_running_loop().create_task(self._run())

    async def submit(self, item: Item, call: Call) -> Result:
        """Wait for the item's result, at most for the time the call has left; adds the `queue` stage to its timings.

        Raises Overloaded when the queue is full, DeadlineExceeded, Unavailable when closing, and what process raised.
        """
        size = self._size(item)
        left = call.remaining()
        if self._closing:
            raise Unavailable("the service is shutting down")
        if self._held + size > self._max_queue:
            self._metrics.rejected.labels("queue_full").inc()
            raise Overloaded(
                f"the queue is full: {self._held} of {self._max_queue} items wait, this request has {size}"
            )
        waiting = _Waiting[Item, Result](item, size, self._group(item), asyncio.get_running_loop().create_future())
        self._held += size
        self._metrics.queue_items.set(self._held)
        self._queue.append(waiting)
        self._filled.set()
        try:
            async with asyncio.timeout(left):
                return await waiting.future
        except TimeoutError as err:
            self._metrics.rejected.labels("deadline").inc()
            raise DeadlineExceeded("the request's time was over before its turn or during its work") from err
        except asyncio.CancelledError:
            self._metrics.rejected.labels("disconnected").inc()
            raise
        finally:
            self._held -= size
            self._metrics.queue_items.set(self._held)
            call.timings["queue"] = call.timings.get("queue", 0.0) + waiting.waited

    async def close(self) -> None:
        """Refuse new items, finish those accepted, end the thread."""
        self._closing = True
        self._filled.set()
        await self._loop_task
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = self._take()
            if batch:
                outcomes = await loop.run_in_executor(self._thread, self._work, [waiting.item for waiting in batch])
                for waiting, outcome in zip(batch, outcomes, strict=True):
                    _settle(waiting.future, outcome)
            elif self._closing:
                return
            else:
                self._filled.clear()
                await self._filled.wait()

    def _take(self) -> list[_Waiting[Item, Result]]:
        """The oldest item somebody still waits for, and all later ones of its group that fit beside it."""
        batch: list[_Waiting[Item, Result]] = []
        left: deque[_Waiting[Item, Result]] = deque()
        rows = 0
        for waiting in self._queue:
            if waiting.future.done():  # its caller left, or its time is over
                continue
            fits = not batch or (waiting.group == batch[0].group and rows + waiting.size <= self._max_batch)
            if not fits:
                left.append(waiting)
                continue
            waiting.waited = time.perf_counter() - waiting.since
            self._metrics.queue_wait.observe(waiting.waited)
            batch.append(waiting)
            rows += waiting.size
        self._queue = left
        if batch:
            self._metrics.batch_rows.observe(rows)
        return batch

    def _work(self, items: Sequence[Item]) -> list[Result | Exception]:
        try:
            results: list[Result | Exception] = list(self._process(items))
            if len(results) != len(items):
                raise RuntimeError(f"{len(items)} items gave {len(results)} results")
            return results
        except Exception as err:  # noqa: BLE001  the edge of the thread: it is raised again where the caller waits
            if len(items) == 1:
                return [err]
        return [outcome for item in items for outcome in self._work([item])]


def _settle(future: "asyncio.Future[Result]", outcome: Result | Exception) -> None:
    with contextlib.suppress(asyncio.InvalidStateError):  # cancelled while the thread worked
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
