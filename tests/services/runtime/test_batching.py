import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from knnlm.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from services.runtime.batching import Batcher
from services.runtime.context import RequestContext
from services.runtime.observability import Metrics

Item = tuple[str, int]  # group, number


class Worker:
    """Doubles numbers; waits at its gate, and remembers the batches it was given."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[Item]] = []

    def __call__(self, items: Sequence[Item]) -> list[int]:
        self.batches.append(list(items))
        self.entered.set()
        self.gate.wait()
        if any(number < 0 for _, number in items):
            raise InvalidRequest("negative")
        return [2 * number for _, number in items]


def batcher(
    work: Callable[[Sequence[Item]], list[int]],
    max_queue: int = 100,
    max_batch: int = 100,
    flow: Callable[[Item], str] | None = None,
    quantum: int | None = None,
    threads: int = 1,
) -> Batcher[Item, int]:
    return Batcher(
        work,
        size=lambda item: max(1, abs(item[1])),
        group=lambda item: item[0],
        flow=flow,
        quantum=quantum,
        threads=threads,
        max_queue=max_queue,
        max_batch=max_batch,
        metrics=Metrics("test"),
    )


def call(seconds: float = 30.0) -> RequestContext:
    return RequestContext("id", "test", time.monotonic() + seconds)


async def entered(worker: Worker) -> None:
    assert await asyncio.to_thread(worker.entered.wait, 10)


async def submitted(queue: Batcher[Item, int], items: Sequence[Item]) -> list["asyncio.Task[int]"]:
    tasks = [asyncio.create_task(queue.submit(item, call())) for item in items]
    await asyncio.sleep(0)  # all of them are in the queue
    return tasks


async def test_what_waits_is_worked_on_together_by_group_and_in_order() -> None:
    worker = Worker()
    queue = batcher(worker)
    first = await submitted(queue, [("a", 1)])
    await entered(worker)
    rest = await submitted(queue, [("a", 2), ("b", 3), ("a", 4), ("b", 5)])
    worker.gate.set()
    assert await asyncio.gather(*first, *rest) == [2, 4, 6, 8, 10]
    assert worker.batches == [[("a", 1)], [("a", 2), ("a", 4)], [("b", 3), ("b", 5)]]
    await queue.close()


async def test_a_batch_is_bounded_and_a_larger_item_runs_alone() -> None:
    worker = Worker()
    queue = batcher(worker, max_batch=5)
    first = await submitted(queue, [("a", 1)])
    await entered(worker)
    rest = await submitted(queue, [("a", 9), ("a", 3), ("a", 2), ("a", 1)])
    worker.gate.set()
    await asyncio.gather(*first, *rest)
    assert worker.batches[1:] == [[("a", 9)], [("a", 3), ("a", 2)], [("a", 1)]]
    await queue.close()


async def test_a_full_queue_refuses_at_once_and_has_room_again_later() -> None:
    worker = Worker()
    queue = batcher(worker, max_queue=10)
    tasks = await submitted(queue, [("a", 6), ("a", 4)])
    with pytest.raises(Overloaded) as refused:
        await queue.submit(("a", 1), call())
    assert refused.value.retry_after > 0
    worker.gate.set()
    await asyncio.gather(*tasks)
    assert await queue.submit(("a", 10), call()) == 20
    await queue.close()


async def test_work_is_dropped_when_its_caller_has_left_or_its_time_is_over() -> None:
    worker = Worker()
    queue = batcher(worker)
    first = await submitted(queue, [("a", 1)])
    await entered(worker)
    (left,) = await submitted(queue, [("a", 2)])
    late = asyncio.create_task(queue.submit(("a", 3), call(0.02)))
    (kept,) = await submitted(queue, [("a", 4)])
    left.cancel()
    with pytest.raises(DeadlineExceeded):
        await late
    worker.gate.set()
    assert await kept == 8
    assert worker.batches == [[("a", 1)], [("a", 4)]]
    await asyncio.gather(*first)
    await queue.close()


async def test_one_bad_item_fails_alone() -> None:
    worker = Worker()
    queue = batcher(worker)
    first = await submitted(queue, [("a", 1)])
    await entered(worker)
    rest = await submitted(queue, [("a", 2), ("a", -3), ("a", 4)])
    worker.gate.set()
    results = await asyncio.gather(*first, *rest, return_exceptions=True)
    assert [results[0], results[1], results[3]] == [2, 4, 8]
    assert isinstance(results[2], InvalidRequest)
    await queue.close()


async def test_closing_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    worker = Worker()
    queue = batcher(worker)
    tasks = await submitted(queue, [("a", 1), ("b", 2)])
    closing = asyncio.create_task(queue.close())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await queue.submit(("a", 3), call())
    worker.gate.set()
    await closing
    assert [task.result() for task in tasks] == [2, 4]


async def test_a_call_that_is_out_of_time_is_not_begun() -> None:
    worker = Worker()
    worker.gate.set()
    queue = batcher(worker)
    with pytest.raises(DeadlineExceeded):
        await queue.submit(("a", 1), call(-1.0))
    await queue.close()
    assert worker.batches == []


def first_letter(item: Item) -> str:
    """The flow of an item: the rest of its group is its options."""
    return item[0][0]


async def test_lanes_are_served_in_turn_however_much_one_of_them_asks() -> None:
    worker = Worker()
    queue = batcher(worker, max_batch=4, flow=first_letter, quantum=2)
    first = await submitted(queue, [("a", 1)])
    await entered(worker)
    rest = await submitted(queue, [("a", 1)] * 12 + [("b", 1)] * 4 + [("c", 1)])
    worker.gate.set()
    await asyncio.gather(*first, *rest)
    lanes = [(batch[0][0], len(batch)) for batch in worker.batches[1:]]
    # a flow that follows itself may fill a batch; after another's turn it may not, though nobody else waits
    assert lanes == [("a", 2), ("b", 2), ("c", 1), ("a", 2), ("b", 2), ("a", 2), ("a", 4), ("a", 2)]
    await queue.close()


async def test_items_without_lanes_fill_every_batch() -> None:
    worker = Worker()
    queue = batcher(worker, max_batch=4, quantum=2)
    first = await submitted(queue, [("a", 1)])
    await entered(worker)
    rest = await submitted(queue, [("a", 1)] * 6)
    worker.gate.set()
    await asyncio.gather(*first, *rest)
    assert [len(batch) for batch in worker.batches] == [1, 4, 2]
    await queue.close()


async def test_a_lane_that_came_late_waits_for_one_batch_of_each_other() -> None:
    worker = Worker()
    queue = batcher(worker, max_batch=2, flow=first_letter)
    first = await submitted(queue, [("a", 1)])
    await entered(worker)
    rest = await submitted(queue, [("a", 2)] * 20 + [("b", 2)])
    worker.gate.set()
    await asyncio.gather(*first, *rest)
    assert [batch[0][0] for batch in worker.batches].index("b") == 2
    await queue.close()


async def test_within_a_lane_the_oldest_is_next_whatever_its_options() -> None:
    worker = Worker()
    queue = batcher(worker, max_batch=3, flow=first_letter)
    first = await submitted(queue, [("a", 1)])
    await entered(worker)
    rest = await submitted(queue, [("a1", 1), ("a1", 1), ("a2", 1), ("a1", 1), ("a1", 1), ("a1", 3), ("a2", 1)])
    worker.gate.set()
    await asyncio.gather(*first, *rest)
    assert worker.batches[1:] == [
        [("a1", 1), ("a1", 1), ("a1", 1)],
        [("a2", 1), ("a2", 1)],
        [("a1", 1)],
        [("a1", 3)],
    ]
    await queue.close()


async def test_no_lane_fills_the_queue_alone_and_there_is_room_for_who_comes_next() -> None:
    worker = Worker()
    queue = batcher(worker, max_queue=12, flow=first_letter)
    tasks = await submitted(queue, [("a", 6)])
    with pytest.raises(Overloaded, match="a has its share of the queue: 6 items wait, this request has 1, at most 6"):
        await queue.submit(("a", 1), call())
    tasks += await submitted(queue, [("b", 3), ("b", 1)])  # a third of it, beside another
    with pytest.raises(Overloaded, match="b has its share"):
        await queue.submit(("b", 1), call())
    tasks += await submitted(queue, [("c", 2)])
    with pytest.raises(Overloaded, match="the queue is full"):
        await queue.submit(("d", 1), call())
    worker.gate.set()
    await asyncio.gather(*tasks)
    assert await queue.submit(("a", 12), call()) == 24  # more than its share, but it holds nothing
    await queue.close()


async def test_a_lane_whose_callers_have_left_takes_no_turn() -> None:
    worker = Worker()
    queue = batcher(worker, max_queue=4, flow=first_letter)
    first = await submitted(queue, [("a", 1)])
    await entered(worker)
    (left,) = await submitted(queue, [("b", 1)])
    (kept,) = await submitted(queue, [("c", 1)])
    left.cancel()
    await asyncio.sleep(0)
    more = await submitted(queue, [("d", 1)])
    worker.gate.set()
    assert await kept == 2
    await asyncio.gather(*first, *more)
    assert worker.batches == [[("a", 1)], [("c", 1)], [("d", 1)]]
    await queue.close()


async def test_who_leaves_during_the_work_costs_the_others_nothing() -> None:
    workers = [Worker(), Worker()]  # one for each batch
    turns = iter(workers)
    queue = batcher(lambda items: next(turns)(items))
    first = await submitted(queue, [("a", 1)])
    await entered(workers[0])
    left, kept = await submitted(queue, [("b", 2), ("b", 3)])
    workers[0].gate.set()
    await entered(workers[1])
    left.cancel()
    await asyncio.sleep(0)
    workers[1].gate.set()
    async with asyncio.timeout(10):
        assert await asyncio.gather(*first, kept) == [2, 6]
    await queue.close()


async def test_several_threads_work_at_once_and_all_end() -> None:
    both = threading.Barrier(2)

    def work(items: Sequence[Item]) -> list[int]:
        both.wait(10)  # passed by two batches at a time
        return [2 * number for _, number in items]

    queue = batcher(work, max_batch=1, threads=2)
    assert await asyncio.gather(*(queue.submit(("a", number), call()) for number in (1, 2, 3, 4))) == [2, 4, 6, 8]
    await queue.close()
    with pytest.raises(Unavailable):
        await queue.submit(("a", 1), call())
