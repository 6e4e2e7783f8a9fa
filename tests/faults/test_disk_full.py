"""A file system of two megabytes, full at one moment or another of building, indexing, adding, removing and activating:
a DatastoreError, the current version whole and served, and the same command continues once there is room.

A tmpfs where this process may mount one; where not, a limit on the size of files (EFBIG), in a process of its own.
"""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.updates.documents import add, remove
from knnlm.datastore.verify import verify
from knnlm.errors import DatastoreError
from knnlm.index.build import build_index
from knnlm.index.compact import compact
from knnlm.index.searcher import Searcher
from knnlm.messages import Document, SearchRequest
from knnlm.options import SearchOptions
from knnlm.testing import TEXTS, ToyLanguageModel, toy_datastore
from tests.faults.damage import QUERIES
from tests.faults.figures import report

pytestmark = pytest.mark.faults

SIZE = 2 << 20
STEP = 8192  # bytes more room at each attempt
BLOCK = 4096
MORE = [Document(f"new{n}", f"{n} " + "the dog sat on the log; " * 40) for n in range(30)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The store's folder on a file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"this process may not mount a file system: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def room(disk: Path, left: int) -> Iterator[None]:
    """Inside, all but `left` bytes of the disk are taken by a file that nobody else knows."""
    ballast = disk / ".ballast"
    status = os.statvfs(disk)
    taken = max(0, status.f_bavail * status.f_frsize - left)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(taken // BLOCK * BLOCK, 1))
    try:
        yield
    finally:
        ballast.unlink()


def served(store: Path) -> tuple[str, list[float]]:
    """The version that answers, opened as a service would, and what it answers."""
    catalog = Catalog(store)
    version = catalog.current("toy")
    assert version is not None
    searcher = Searcher.open(catalog.path("toy", version), check="all")
    try:
        found = searcher.search(SearchRequest("toy", QUERIES, SearchOptions(k=10)))
        return version, np.asarray(found.neighbors.distances).ravel().tolist()
    finally:
        searcher.close()


Work = Callable[[Path], object]


def _build(store: Path) -> object:
    return build(MORE, ToyLanguageModel(), Catalog(store), "toy", version="v2", part_entries=500, batch_tokens=512)


def _index(store: Path) -> object:
    return build_index(store / "toy" / "v1", "hnsw8,sq8")


def _add(store: Path) -> object:
    catalog = Catalog(store)
    return add(MORE, ToyLanguageModel(), catalog, "toy", activate=catalog.activate, part_entries=500, batch_tokens=512)


def _remove(store: Path) -> object:
    catalog = Catalog(store)
    return remove(["0", "3"], catalog, "toy", activate=catalog.activate)


def _compact(store: Path) -> object:
    catalog = Catalog(store)
    return compact(catalog, "toy", activate=catalog.activate)


def _activate(store: Path) -> None:
    Catalog(store).activate("toy", "v1")


WORK: dict[str, Work] = {
    "build": _build, "index": _index, "add": _add, "remove": _remove, "compact": _compact, "activate": _activate,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WORK))
def test_a_full_disk_costs_nothing_but_time(name: str, small_disk: Path) -> None:
    """From no room at all, a little more at each attempt, until the work succeeds."""
    store = small_disk / "store"
    toy_datastore(store, texts=[*TEXTS, *(f"{n}: {TEXTS[0]}" for n in range(20))])
    if name == "compact":
        catalog = Catalog(store)
        remove(["0"], catalog, "toy", activate=catalog.activate)
    before = served(store)
    refused = []
    for left in range(0, SIZE, STEP):
        try:
            with room(small_disk, left):
                WORK[name](store)
        except DatastoreError as err:
            refused.append(err.message)
        else:
            break
        assert served(store) == before, f"with {left} bytes left the version that answers has changed"
        assert all(not _problems(store / "toy" / version) for version in Catalog(store).versions("toy"))
    else:
        raise AssertionError(f"never succeeded, last: {refused[-1]}")
    if name != "activate":  # which needs one block
        assert refused, "there was always room"
    assert all(os.strerror(errno.ENOSPC) in message and str(store) in message for message in refused), refused
    served(store)
    for version in Catalog(store).versions("toy"):
        assert not _problems(store / "toy" / version)
    leftovers = [f.name for f in store.rglob(".*") if f.name.endswith((".tmp", ".building"))]
    report("disk_full", work=name, refused=len(refused), succeeded_with_bytes_left=left, leftovers=leftovers)
    assert not leftovers


def _problems(path: Path) -> list[str]:
    return [f"{check.name}: {check.problem}" for check in verify(path) if check.problem is not None]


LIMITED = """
import sys
from pathlib import Path
from tests.faults.test_disk_full import WORK
WORK[sys.argv[1]](Path(sys.argv[2]))
"""


@pytest.mark.parametrize("name", ["build", "index", "add"])
def test_a_limit_on_the_size_of_files_is_an_error_like_another(name: str, tmp_path: Path) -> None:
    """EFBIG, in a process of its own: no traceback of an OSError, the current version untouched."""
    toy_datastore(tmp_path)
    before = served(tmp_path)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the process is killed by it
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, name, str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=120, preexec_fn=limit,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},  # compiled code would be cut at the limit, and stay so
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("knnlm.errors.DatastoreError: cannot write"), ended.stderr[-2000:]
    assert served(tmp_path) == before
    WORK[name](tmp_path)
    served(tmp_path)
