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


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):  # on a busy machine all of this may take long
        while True:
            met = condition()
            if met if isinstance(met, bool) else await met:
                return
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
        searcher = SlowSearcher.open(path, memory_limit=memory_limit)
        searcher.slow = self
        return searcher


class SlowSearcher(Searcher):
    slow: Slow

    def warm(self) -> None:
        """Does not search: the gate is closed."""

    def search(self, request: SearchRequest) -> SearchResult:
        self.slow.entered.set()
        self.slow.gate.wait()
        return super().search(request)

    def close(self) -> None:
        self.slow.closed.append(self.manifest.version)
        super().close()


class SlowModel(ToyLanguageModel):
    """Its answers wait at a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def forward(self, request: ForwardRequest) -> ForwardResult:
        self.gate.wait()
        return super().forward(request)
