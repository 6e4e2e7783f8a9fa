"""What is read again while the process runs, key files and certificates: every second, off the hot path."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from knnlm.errors import InvalidRequest
from services.runtime.logs import event

__all__ = ["SECONDS", "Renewable", "Renewal"]

LOG = logging.getLogger(__name__)
SECONDS = 1.0


class Renewable(Protocol):
    @property
    def name(self) -> str:
        """One word for the log: `keys`, `certificates`."""
        ...

    def refresh(self) -> Callable[[], None] | None:
        """Called in a thread: read the files, take over what they say now. What must be done in the event loop, which
        no request runs in beside it, is returned. Raises InvalidRequest when the files cannot be used: all stays.
        """
        ...


class Renewal:
    """Refreshes the parts until it is closed. What cannot be read is logged once, until it can be read again."""

    def __init__(self, parts: Sequence[Renewable], seconds: float = SECONDS) -> None:
        self._parts = parts
        self._seconds = seconds
        self._problems: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """In the event loop; does nothing when there is nothing to refresh."""
        if self._parts:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            for part in self._parts:
                await self._refresh(part)

    async def _refresh(self, part: Renewable) -> None:
        try:
            finish = await asyncio.to_thread(part.refresh)
            if finish is not None:
                finish()
        except InvalidRequest as err:
            if self._problems.get(part.name) != err.message:
                event(LOG, f"{part.name}_kept", logging.WARNING, reason=err.message)
            self._problems[part.name] = err.message
        except Exception:  # noqa: BLE001  the edge of a task that must outlive what nobody foresaw
            event(LOG, f"{part.name}_failed", logging.ERROR)
        else:
            self._problems.pop(part.name, None)
