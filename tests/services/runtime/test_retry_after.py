"""When a caller that a full queue refused is told to come again: when there will be room, at the rate of late."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import TypeAlias

import pytest

from knnlm.errors import Overloaded
from services.runtime import batching
from services.runtime.batching import RATE_WEIGHT, Batcher
from services.runtime.context import RequestContext
from services.runtime.observability import Metrics

QUEUE = 100
Item = tuple[str, int]  # flow, size
Queue: TypeAlias = Batcher[Item, None]


class Worker:
    """Takes 1/rate of its own seconds for each of a size, and waits at a gate when there is one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rate = 10.0
        self.gate = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def clock(self) -> float:
        return self.now

    def __call__(self, items: Sequence[Item]) -> list[None]:
        self.now += sum(size for _, size in items) / self.rate
        asyncio.run_coroutine_threadsafe(self.gate.wait(), self.loop).result(30)
        return [None for _ in items]


def call() -> RequestContext:
    return RequestContext("id", "test", time.monotonic() + 30)


async def refused(queue: Queue, item: Item) -> float:
    with pytest.raises(Overloaded) as failed:
        await queue.submit(item, call())
    return failed.value.retry_after


def checked(monkeypatch: pytest.MonkeyPatch, check: Callable[[Worker, Queue], Awaitable[None]], lanes: bool) -> None:
    async def run() -> None:
        worker = Worker()
        monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=worker.clock))
        queue = Batcher(
            worker,
            size=lambda item: item[1],
            group=lambda item: item[0],
            flow=(lambda item: item[0]) if lanes else None,
            max_queue=QUEUE,
            max_batch=QUEUE,
            metrics=Metrics("test"),
        )
        await check(worker, queue)
        worker.gate.set()
        await queue.close()

    asyncio.run(run())


async def held(queue: Queue, item: Item) -> "asyncio.Task[None]":
    waiting = asyncio.create_task(queue.submit(item, call()))
    await asyncio.sleep(0)
    return waiting


async def worked(worker: Worker, queue: Queue, item: Item) -> None:
    worker.gate.set()
    await queue.submit(item, call())
    worker.gate.clear()


def test_a_full_queue_says_when_there_will_be_room(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(worker: Worker, queue: Queue) -> None:
        first = await held(queue, ("a", QUEUE))
        assert await refused(queue, ("a", 50)) == 1.0  # nothing is known yet
        worker.gate.set()
        await first
        worker.gate.clear()
        second = await held(queue, ("a", QUEUE))
        assert await refused(queue, ("a", 50)) == pytest.approx(50 / 10)
        assert await refused(queue, ("a", 1)) == 1.0  # never less
        worker.gate.set()
        await second

    checked(monkeypatch, check, lanes=False)


def test_the_rate_follows_the_work_and_the_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(worker: Worker, queue: Queue) -> None:
        await worked(worker, queue, ("a", 10))
        worker.rate = 1.0
        await worked(worker, queue, ("a", 10))
        rate = 10 + (1 - 10) * RATE_WEIGHT
        holding = await held(queue, ("a", QUEUE))
        assert await refused(queue, ("a", 50)) == pytest.approx(50 / rate)
        worker.gate.set()
        await holding
        for _ in range(60):
            await worked(worker, queue, ("a", 1))
        holding = await held(queue, ("a", QUEUE))
        assert await refused(queue, ("a", QUEUE)) == 30.0
        worker.gate.set()
        await holding

    checked(monkeypatch, check, lanes=False)


def test_a_lane_that_has_its_share_waits_for_the_turns_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(worker: Worker, queue: Queue) -> None:
        await worked(worker, queue, ("a", 10))
        holding = [await held(queue, ("a", 30)), await held(queue, ("b", 30))]
        assert await refused(queue, ("a", 24)) == pytest.approx((30 + 24 - QUEUE // 3) * 2 / 10)
        worker.gate.set()
        await asyncio.gather(*holding)

    checked(monkeypatch, check, lanes=True)
