"""One version of one domain in memory, shared by the searches in flight and let go after the last of them."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from knnlm.datastore.manifest import Manifest
from knnlm.messages import DomainInfo, SearchRequest, SearchResult

__all__ = ["Loaded", "Opener", "SearcherLike", "Stamp", "stamp"]

Stamp = tuple[str, int, int]  # version, and what tells that its manifest was rewritten (tuning, index)


class SearcherLike(Protocol):
    """As knnlm.index.searcher.Searcher."""

    @property
    def manifest(self) -> Manifest: ...
    @property
    def memory_bytes(self) -> int: ...
    def search(self, request: SearchRequest) -> SearchResult: ...
    def info(self, versions: Sequence[str], state: str = "ready") -> DomainInfo: ...
    def warm(self) -> None: ...
    def close(self) -> None: ...


Opener = Callable[[Path], SearcherLike]


def stamp(path: Path) -> Stamp:
    """What identifies the version at `path` as it is now. Raises OSError when it is gone."""
    status = os.stat(path / "manifest.json")
    return path.name, status.st_mtime_ns, status.st_ino


class Loaded:
    """Made warm, by a thread that may block. `leases` is touched in the event loop only."""

    def __init__(self, path: Path, open_searcher: Opener) -> None:
        self.stamp = stamp(path)  # before reading: a rewrite meanwhile is then seen as a change
        self.searcher = open_searcher(path)
        self.searcher.warm()
        self.leases = 0
        self.retired_at: float | None = None  # of time.monotonic
        self._searching = threading.Lock()

    @property
    def version(self) -> str:
        return self.stamp[0]

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Inside, the version is not let go."""
        self.leases += 1
        try:
            yield
        finally:
            self.leases -= 1

    def search(self, request: SearchRequest) -> SearchResult:
        with self._searching:
            return self.searcher.search(request)

    def close(self) -> None:
        """Free it; blocks, for seconds when the index is large. The lock: a search whose caller left holds no lease."""
        with self._searching:
            self.searcher.close()
