"""Services in this process behind real sockets, in an event loop of their own, for clients that block."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

__all__ = ["in_a_thread"]

T = TypeVar("T")


@contextmanager
def in_a_thread(opened: Callable[[], AbstractAsyncContextManager[T]]) -> Iterator[T]:
    """What the context manager gives, entered and left in the loop of another thread. Raises what entering raises."""
    loop = asyncio.new_event_loop()
    ready: list[T] = []
    entered, leave = threading.Event(), asyncio.Event()
    failure: list[BaseException] = []

    async def live() -> None:
        async with opened() as value:
            ready.append(value)
            entered.set()
            await leave.wait()

    def run() -> None:
        try:
            loop.run_until_complete(live())
        except BaseException as err:  # noqa: BLE001  the edge of the thread: raised again below
            failure.append(err)
        finally:
            loop.close()
            entered.set()

    thread = threading.Thread(target=run)
    thread.start()
    entered.wait()
    try:
        if failure:
            raise failure[0]
        yield ready[0]
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(leave.set)
        thread.join()
    if failure:
        raise failure[0]
