"""One version of one domain in memory, shared by the searches in flight and let go after the last of them."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

from knnlm.errors import DatastoreError, InsufficientMemory, InvalidRequest
from knnlm.index.memory import release_freed
from knnlm.messages import Passage, PassagesRequest, SearchRequest, SearchResult
from knnlm.protocols import Searching
from services.datastore.settings import DatastoreSettings

Stamp = tuple[str, int, int]  # version, and what tells that its manifest was rewritten (tuning, index)
Opener = Callable[[Path, int | None], Searching]  # a version's folder, and what it may hold in memory, in bytes


@runtime_checkable
class Replicated(Protocol):
    """What a version has beside `Searching` where the nodes of a cluster search it."""

    def replicas(self) -> Mapping[int, int]:
        """How many replicas of each shard answer."""
        ...

    def problems(self) -> Sequence[str]:
        """Why not all of it can be searched; empty when it can."""
        ...


@contextmanager
def setting_errors(settings: DatastoreSettings) -> Iterator[None]:
    """Turns InvalidRequest about this service's own settings, which is no fault of a caller, into a DatastoreError."""
    try:
        yield
    except InvalidRequest as err:
        raise DatastoreError(f"{err.message} (this service is set to index {settings.index!r})") from err


def opener(settings: DatastoreSettings) -> Opener:
    """Opens versions as the settings say. It raises as Searcher.open does."""

    def open_searcher(path: Path, memory_limit: int | None) -> Searching:
        from knnlm.index.sharded_searcher import open_searcher  # faiss: slow to import, while /livez answers already

        with setting_errors(settings):
            return open_searcher(
                path,
                index=settings.index or None,
                resident=settings.memory == "resident",
                device=settings.device,
                memory_limit=memory_limit,
                max_candidates=settings.max_candidates,
                check=settings.check,
            )

    return open_searcher


def stamp_of(path: Path) -> Stamp:
    """What identifies the version at `path` as it is now. Raises OSError when it is gone."""
    status = os.stat(path / "manifest.json")
    return path.name, status.st_mtime_ns, status.st_ino


class Loaded:
    """Made warm, by a thread that may block. `leases` is touched in the event loop only."""

    def __init__(self, path: Path, open_searcher: Opener, memory_limit: int | None = None, searches: int = 1) -> None:
        """memory_limit: bytes that it may hold. searches: at once; more than one where other processes do the work.
        Raises as open_searcher does; InsufficientMemory when memory ends."""
        self.stamp = stamp_of(path)  # before reading: a rewrite meanwhile is then seen as a change
        try:
            self.searcher = open_searcher(path, memory_limit)
        except MemoryError as err:
            raise InsufficientMemory(f"memory ended while {path} was loaded: {err}") from err
        try:
            self.searcher.warm()
        except BaseException:
            self.searcher.close()
            raise
        self.memory = self.searcher.memory
        self.held_bytes = self.searcher.held_bytes  # in this process's own memory
        self.leases = 0
        self.retired_at = 0.0  # by time.monotonic, when it last ceased to answer
        self._searches = searches
        self._searching = threading.Semaphore(searches)

    @property
    def version(self) -> str:
        return self.stamp[0]

    @property
    def replicas(self) -> Mapping[int, int]:
        """How many replicas of each shard answer; empty where this process searches itself."""
        return self.searcher.replicas() if isinstance(self.searcher, Replicated) else {}

    @property
    def problems(self) -> Sequence[str]:
        """Why not all of it can be searched."""
        return self.searcher.problems() if isinstance(self.searcher, Replicated) else ()

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

    def passages(self, request: PassagesRequest) -> Sequence[Passage]:
        with self._searching:
            return self.searcher.passages(request)

    def close(self) -> None:
        """Free it, and give its memory back to the system; blocks, for seconds when the index is large.

        It waits for them all: a search whose caller left holds no lease.
        """
        for _ in range(self._searches):
            self._searching.acquire()
        self.searcher.close()
        release_freed()
