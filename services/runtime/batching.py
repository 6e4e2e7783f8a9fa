"""A bounded queue before its worker threads: while they work, callers wait; one that is free takes what has come.

No timer: a lone request is never held back, and batches grow by themselves under load. The queue is counted in items
(rows, tokens) at entry and refuses at once when full. Work whose caller has left or whose time is over is dropped
before it is begun. It knows neither models nor indexes.

Fair queueing: a heavy caller does not delay the others. Requests of different flows (domains, say) are taken in turn,
and no flow may fill the queue alone; see Batcher.
"""

import asyncio
import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from knnlm.errors import DeadlineExceeded, Overloaded, Unavailable
from services.runtime.context import RequestContext, Stage
from services.runtime.observability import Metrics

RATE_WEIGHT = 0.1  # how much the last batch counts in the rate that says when a refused request should come again

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    size: int
    flow: Hashable
    group: Hashable
    future: "asyncio.Future[Result]"
    since: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    worked: float = 0.0  # seconds, with those it was put together with; 0: not begun, or not finished


class Batcher(Generic[Item, Result]):
    """Made and used in one event loop; worker threads take their work themselves, and never wait for the loop.

    process: called in a worker thread with items of one flow and group; one result per item, in order. When it raises
    for several items, each is tried alone, so that nobody fails by what a stranger asked. size: what an item counts.
    group: items may share a call of `process` when these are equal. max_queue, max_batch: in sizes; a single larger
    item still runs, alone, but one over max_queue can never be admitted. threads: more than one where `process` waits
    for other machines rather than computes.

    flow: None, or the flow an item belongs to. Flows that wait are served in turn, one batch each, of at most `quantum`
    in size: also when no other flow waits at the moment, but one was served just before, whose callers may be about to
    ask again. Only a flow that follows itself may fill a batch. Within a flow the oldest item decides what group is
    next. Of the queue, a flow may hold the share it had if there were one flow more than there are: half of it alone, a
    third beside another. So there is room for the next one to come, and a flood is refused before it fills the queue. A
    flow that holds nothing is admitted wherever the queue has room.
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
        flow: Callable[[Item], Hashable] | None = None,
        quantum: int | None = None,
        threads: int = 1,
    ) -> None:
        self._process = process
        self._size = size
        self._group = group
        self._flow = flow
        self._max_queue = max_queue
        self._max_batch = max_batch
        self._quantum = max_batch if quantum is None else min(quantum, max_batch)
        self._metrics = metrics
        self._held: Counter[Hashable] = Counter()  # per flow, until the caller has its result; for the loop alone
        self._total = 0
        self._queues: dict[Hashable, deque[_Waiting[Item, Result]]] = {}  # whose turn is next stands first
        self._served: Hashable = None  # the flow of the last batch; guarded as the queues are
        self._rate = 0.0  # size per second of work, of late; 0: nothing known yet. For the loop alone
        self._closing = False
        self._filled = threading.Condition()  # guards the queues and that it is closing
        self._loop = asyncio.get_running_loop()
        self._threads = [threading.Thread(target=self._run, name="batch", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    async def submit(self, item: Item, call: RequestContext) -> Result:
        """Wait for the item's result, at most for the time the call has left; adds the `queue` stage to its timings.

        Raises Overloaded when the queue or its flow's share of it is full, DeadlineExceeded, Unavailable when closing,
        and what process raised.
        """
        size, flow = self._size(item), None if self._flow is None else self._flow(item)
        left = call.remaining()
        if self._closing:
            raise Unavailable("the service is shutting down")
        self._admit(size, flow)
        waiting = _Waiting[Item, Result](item, size, flow, self._group(item), self._loop.create_future())
        self._hold(flow, size)
        with self._filled:
            self._queues.setdefault(flow, deque()).append(waiting)
            self._filled.notify()
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
            self._hold(flow, -size)
            call.timings["queue"] = call.timings.get("queue", 0.0) + waiting.waited
            call.stages.append(Stage("queue", waiting.since, waiting.waited))
            if waiting.worked:
                call.stages.append(Stage("work", waiting.since + waiting.waited, waiting.worked))

    async def close(self) -> None:
        """Refuse new items, finish those accepted, end the threads. What they gave last is then with its callers."""
        with self._filled:
            self._closing = True
            self._filled.notify_all()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _admit(self, size: int, flow: Hashable) -> None:
        held = self._held[flow]
        if self._total + size > self._max_queue:
            problem = f"the queue is full: {self._total} of {self._max_queue} items wait, this request has {size}"
            before = self._total + size - self._max_queue
        elif self._flow is not None and held and held + size > (share := self._share(flow)):
            problem = (
                f"{flow} has its share of the queue: {held} items wait, this request has {size}, "
                f"at most {share} of {self._max_queue} may wait beside those of others"
            )
            before = (held + size - share) * len(self._held)  # the others have their turns meanwhile
        else:
            return
        self._metrics.rejected.labels("queue_full").inc()
        raise Overloaded(problem, retry_after=self._seconds_for(before))

    def _seconds_for(self, size: int) -> float:
        """Seconds until `size` will have been worked on, at the recent rate: from 1 to 30."""
        return min(max(size / self._rate, 1.0), 30.0) if self._rate else 1.0

    def _share(self, flow: Hashable) -> int:
        return self._max_queue // (len(self._held.keys() | {flow}) + 1)

    def _hold(self, flow: Hashable, size: int) -> None:
        self._total += size
        self._held[flow] += size
        if not self._held[flow]:
            del self._held[flow]
        self._metrics.queue_items.set(self._total)

    def _run(self) -> None:
        while batch := self._next():
            started = time.perf_counter()
            outcomes = self._work([waiting.item for waiting in batch])
            seconds = time.perf_counter() - started
            for waiting in batch:
                waiting.worked = seconds
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                self._loop.call_soon_threadsafe(self._settle, batch, outcomes)
            del batch, outcomes  # not to be kept in memory until the next ones are there

    def _next(self) -> list[_Waiting[Item, Result]]:
        """What is worked on next; waits for it. Empty when closing and all is done."""
        with self._filled:
            while not (batch := self._take()) and not self._closing:
                self._filled.wait()
        now = time.perf_counter()
        for waiting in batch:
            waiting.waited = now - waiting.since
        return batch

    def _take(self) -> list[_Waiting[Item, Result]]:
        """The next batch, of the flow whose turn it is: the oldest item somebody still waits for, and all later ones of
        its group that fit beside it."""
        batch: list[_Waiting[Item, Result]] = []
        rows = 0
        while self._queues and not batch:
            flow = next(iter(self._queues))
            queue = self._queues.pop(flow)
            room = self._quantum if self._queues or flow != self._served else self._max_batch
            others: list[_Waiting[Item, Result]] = []
            while queue and (not batch or rows < room):
                waiting = queue.popleft()
                if waiting.future.done():  # its caller left, or its time is over
                    continue
                if batch and (waiting.group != batch[0].group or rows + waiting.size > room):
                    others.append(waiting)
                    continue
                batch.append(waiting)
                rows += waiting.size
            queue.extendleft(reversed(others))
            if queue:
                self._queues[flow] = queue  # behind all other flows
            if batch:
                self._served = flow
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

    def _settle(self, batch: Sequence[_Waiting[Item, Result]], outcomes: Sequence[Result | Exception]) -> None:
        """Hand every outcome to its caller, all at once. Called in the event loop."""
        size = sum(waiting.size for waiting in batch)
        self._metrics.batch_rows.observe(size)
        if batch[0].worked:
            rate = size / batch[0].worked * len(self._threads)
            self._rate += (rate - self._rate) * (RATE_WEIGHT if self._rate else 1.0)
        for waiting, outcome in zip(batch, outcomes, strict=True):
            self._metrics.queue_wait.observe(waiting.waited)
            if waiting.future.done():  # cancelled while the thread worked
                continue
            if isinstance(outcome, Exception):
                waiting.future.set_exception(outcome)
            else:
                waiting.future.set_result(outcome)
