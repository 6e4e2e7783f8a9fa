import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from knnlm.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from services.runtime.batching import Batcher
from services.runtime.calls import Call
from services.runtime.metrics import Metrics

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
    work: Callable[[Sequence[Item]], list[int]], max_queue: int = 100, max_batch: int = 100
) -> Batcher[Item, int]:
    return Batcher(
        work,
        size=lambda item: max(1, abs(item[1])),
        group=lambda item: item[0],
        max_queue=max_queue,
        max_batch=max_batch,
        metrics=Metrics("test"),
    )


def call(seconds: float = 30.0) -> Call:
    return Call("id", "test", time.monotonic() + seconds)


async def entered(worker: Worker) -> None:
    assert await asyncio.to_thread(worker.entered.wait, 10)


async def submitted(queue: Batcher[Item, int], items: Sequence[Item]) -> list["asyncio.Task[int]"]:
    tasks = [asyncio.create_task(queue.submit(item, call())) for item in items]
    await asyncio.sleep(0)  # all of them are in the queue
    return tasks


def test_what_waits_is_worked_on_together_by_group_and_in_order() -> None:
    async def check() -> None:
        worker = Worker()
        queue = batcher(worker)
        first = await submitted(queue, [("a", 1)])
        await entered(worker)
        rest = await submitted(queue, [("a", 2), ("b", 3), ("a", 4), ("b", 5)])
        worker.gate.set()
        assert await asyncio.gather(*first, *rest) == [2, 4, 6, 8, 10]
        assert worker.batches == [[("a", 1)], [("a", 2), ("a", 4)], [("b", 3), ("b", 5)]]
        await queue.close()

    asyncio.run(check())


def test_a_batch_is_bounded_and_a_larger_item_runs_alone() -> None:
    async def check() -> None:
        worker = Worker()
        queue = batcher(worker, max_batch=5)
        first = await submitted(queue, [("a", 1)])
        await entered(worker)
        rest = await submitted(queue, [("a", 9), ("a", 3), ("a", 2), ("a", 1)])
        worker.gate.set()
        await asyncio.gather(*first, *rest)
        assert worker.batches[1:] == [[("a", 9)], [("a", 3), ("a", 2)], [("a", 1)]]
        await queue.close()

    asyncio.run(check())


def test_a_full_queue_refuses_at_once_and_has_room_again_later() -> None:
    async def check() -> None:
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

    asyncio.run(check())


def test_work_is_dropped_when_its_caller_has_left_or_its_time_is_over() -> None:
    async def check() -> None:
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

    asyncio.run(check())


def test_one_bad_item_fails_alone() -> None:
    async def check() -> None:
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

    asyncio.run(check())


def test_closing_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    async def check() -> None:
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

    asyncio.run(check())


def test_a_call_that_is_out_of_time_is_not_begun() -> None:
    async def check() -> None:
        worker = Worker()
        worker.gate.set()
        queue = batcher(worker)
        with pytest.raises(DeadlineExceeded):
            await queue.submit(("a", 1), call(-1.0))
        await queue.close()
        assert worker.batches == []

    asyncio.run(check())
