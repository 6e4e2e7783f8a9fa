"""The memory of a datastore service while it answers the most that its limits let a request ask for."""

import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest

from knnlm.clients.call import Connection
from knnlm.clients.rpc import GrpcDatastore
from knnlm.errors import Unavailable
from knnlm.index.build import build_index
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from tests.index.helpers import clustered, datastore
from tests.services.processes import process

DIM = 16
MIB = 1 << 20
# what a search may take beside its answer: a block of candidates, and what FAISS and the allocator keep for later
ALLOWED = 160 * MIB
MILLION_KEYS = 2 * DIM * 1_000_000  # bytes of mapped files that a search reads, which count as the process's
RECIPES = ["flat", "ivf1024,flat", "ivf1024,pq8x4fs", "ivf1024,rabitqfs"]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")


@pytest.mark.parametrize("recipe", [pytest.param("flat", marks=pytest.mark.slow), "ivf256,pq8x4fs"])
def test_memory_of_the_largest_search_is_bounded(tmp_path: Path, recipe: str) -> None:
    """Unbounded it takes 40 bytes and more for each of 200 times 30,000 candidates."""
    assert peak(tmp_path, recipe, 30_000, 200, largest(recipe)) < ALLOWED


@pytest.mark.slow
def test_memory_is_bounded_where_nearly_all_is_excluded(tmp_path: Path) -> None:
    assert peak(tmp_path, "flat", 30_000, 200, SearchOptions(k=4096, exclude_own_documents=True)) < ALLOWED


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_memory_of_the_largest_search_of_a_million_keys_is_bounded(tmp_path: Path, recipe: str) -> None:
    """An answer of 64 MiB, the most that is sent: 1,023 queries with 4,096 neighbors each, and copies of it."""
    assert peak(tmp_path, recipe, 1_000_000, 1023, largest(recipe)) < ALLOWED + MILLION_KEYS + 4 * 64 * MIB


@pytest.mark.slow
def test_memory_is_bounded_where_nearly_all_of_a_million_is_excluded(tmp_path: Path) -> None:
    options = SearchOptions(k=4096, nprobe=1024, exclude_own_documents=True)
    assert peak(tmp_path, "ivf1024,flat", 1_000_000, 16, options) < ALLOWED + MILLION_KEYS


@pytest.mark.slow
@pytest.mark.parametrize(("k", "n"), [(1024, 4095), (1, 4096)])
def test_memory_of_the_batches_of_scoring_is_bounded(tmp_path: Path, k: int, n: int) -> None:
    options = SearchOptions(k=k, overfetch=16.0, nprobe=1024)
    assert peak(tmp_path, "ivf2000,pq8x4fs", 1_000_000, n, options) < ALLOWED + MILLION_KEYS + 4 * 16 * n * k


def largest(recipe: str) -> SearchOptions:
    """The most that the default limits allow."""
    return SearchOptions(k=4096, overfetch=16.0, nprobe=1024 if "ivf" in recipe else None)


def peak(tmp_path: Path, recipe: str, entries: int, queries: int, options: SearchOptions) -> int:
    """Bytes that one request adds to the service's memory at its highest."""
    path = datastore(tmp_path, clustered(entries, DIM), key_dtype="float16")
    if recipe != "flat":
        build_index(path, recipe)
    (tmp_path / "toy" / "CURRENT").write_text("v1")
    entries_of_queries = np.arange(queries, dtype=np.int64) if options.exclude_own_documents else None
    request = SearchRequest(
        "toy", clustered(queries, DIM, seed=1), options, ids=True, exclude_entries=entries_of_queries
    )
    with process("datastore", "--store", str(tmp_path), "--request-timeout-s", "600") as running:
        return asyncio.run(grown(running.grpc, running.process.pid, request))


async def grown(target: str, pid: int, request: SearchRequest) -> int:
    async with GrpcDatastore(Connection(target, timeout=600)) as client:
        small = SearchRequest(request.domain, request.queries[:4], SearchOptions(k=8))
        for _ in range(600):
            try:
                await client.search(small)
                break
            except Unavailable:  # still loading
                await asyncio.sleep(0.1)
        before = peak_begun_anew(pid)
        found = await client.search(request)
        assert len(found.neighbors.values) == len(request.queries)
        return status(pid, "VmHWM") - before


def peak_begun_anew(pid: int) -> int:
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return status(pid, "VmHWM")


def status(pid: int, name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])
