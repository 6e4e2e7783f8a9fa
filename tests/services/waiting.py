"""Making a service wait, and waiting for it, without guessing how long anything takes."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

from knnlm.index.searcher import Searcher
from knnlm.messages import ForwardRequest, ForwardResult, SearchRequest, SearchResult
from knnlm.testing import ToyLanguageModel
from services.runtime.lifecycle import Host

QUICK = 0.02  # seconds between two looks


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110  what is waited for is another process' file in production
            await asyncio.sleep(QUICK)


def held(host: Host) -> float | None:
    return host.service.metrics.registry.get_sample_value("knnlm_queue_items")


class Slow:
    """Opens real searchers, whose searches wait at a gate; counts what is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.opened: list[str] = []
        self.closed: list[str] = []

    def __call__(self, path: Path, memory_limit: int | None) -> "SlowSearcher":
        self.opened.append(path.name)
        return SlowSearcher(self, path, memory_limit)


class SlowSearcher(Searcher):
    def __init__(self, slow: Slow, path: Path, memory_limit: int | None) -> None:
        real = Searcher.open(path, memory_limit=memory_limit)
        super().__init__(real._datastore, real._index)
        self._slow = slow

    def warm(self) -> None:
        """Does not search: the gate is closed."""

    def search(self, request: SearchRequest) -> SearchResult:
        self._slow.entered.set()
        self._slow.gate.wait()
        return super().search(request)

    def close(self) -> None:
        self._slow.closed.append(self.manifest.version)
        super().close()


class SlowModel(ToyLanguageModel):
    """Its answers wait at a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def forward(self, request: ForwardRequest) -> ForwardResult:
        self.gate.wait()
        return super().forward(request)
