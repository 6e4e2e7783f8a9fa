"""What versions may hold in memory, where they lie, and what becomes of one for which there is no room."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm.clients.rpc import GrpcDatastore
from knnlm.datastore.catalog import Catalog
from knnlm.errors import DatastoreError, InsufficientMemory, KnnlmError, Unavailable
from knnlm.index.build import build_index
from knnlm.index.searcher import Searcher
from knnlm.messages import DomainInfo, SearchRequest
from knnlm.options import SearchOptions
from knnlm.testing import TEXTS, toy_datastore
from services.datastore.app import service
from services.datastore.loaded import Loaded, Opener
from services.datastore.settings import DatastoreSettings
from services.runtime.lifecycle import Host, running
from services.runtime.settings import load_settings
from tests.services.waiting import QUICK, until

REQUEST = SearchRequest("toy", np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32), SearchOptions(k=4))
VERSIONS = {"v1": TEXTS, "v2": TEXTS[:2], "v3": TEXTS[:1]}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for version, texts in VERSIONS.items():
        toy_datastore(tmp_path, version=version, texts=texts, activate=version == "v1")
    return tmp_path


def held(store: Path, version: str) -> int:
    """Bytes of a version with exact search that is read into memory: its keys, and the index of them in float32."""
    keys = np.load(store / "toy" / version / "keys.npy", mmap_mode="r")
    return int(keys.nbytes) + 4 * int(keys.size)


Check = Callable[[GrpcDatastore, Host], Awaitable[None]]


def serve(store: Path, check: Check, opener: Opener | None = None, **settings: Any) -> None:
    async def run() -> None:
        given = {"watch_interval_s": QUICK, "port": 0, "grpc_port": 0, **settings}
        host_service = service(DatastoreSettings(store=store, **given), opener)
        async with running(host_service) as host, GrpcDatastore(f"127.0.0.1:{host.grpc_port}") as client:
            await check(client, host)

    asyncio.run(run())


async def nothing(client: GrpcDatastore, host: Host) -> None:
    """Starting is the check."""


def memory_of(host: Host) -> dict[tuple[str, str, str], float]:
    """The metric, by domain, part and place."""
    return {
        (sample.labels["domain"], sample.labels["part"], sample.labels["place"]): sample.value
        for family in host.service.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "knnlm_domain_memory_bytes"
    }


async def accepted(client: GrpcDatastore, version: str) -> bool:
    try:
        return (await client.activate("toy", version)).version == version
    except InsufficientMemory:
        return False


def test_a_version_over_the_allowance_is_refused_and_the_old_one_keeps_answering(store: Path) -> None:
    left = held(store, "v2") - 1

    async def check(client: GrpcDatastore, host: Host) -> None:
        with pytest.raises(InsufficientMemory) as caught:
            await client.activate("toy", "v2")
        for number in (held(store, "v2"), left):
            assert f"{number} bytes" in caught.value.message
        assert Catalog(store).current("toy") == "v1"

        Catalog(store).activate("toy", "v2")  # somebody else insists

        async def stale() -> bool:
            return (await client.get_domain("toy")).state.startswith("stale: ")

        await until(stale)
        info = await client.get_domain("toy")
        assert info.version == "v1"
        for number in (held(store, "v2"), left):
            assert f"{number} bytes" in info.state
        assert (await client.search(REQUEST)).version == "v1"

    serve(store, check, memory="resident", max_memory_bytes=held(store, "v1") + left)


def test_what_just_fits_is_served(store: Path) -> None:
    async def check(client: GrpcDatastore, host: Host) -> None:
        assert (await client.activate("toy", "v2")).version == "v2"
        assert (await client.search(REQUEST)).version == "v2"

    serve(store, check, memory="resident", max_memory_bytes=held(store, "v1") + held(store, "v2"))


@pytest.mark.parametrize("grace", [0.0, 1e6])
def test_a_former_version_counts_until_it_is_let_go(store: Path, grace: float) -> None:
    async def check(client: GrpcDatastore, host: Host) -> None:
        assert await accepted(client, "v2")
        if grace:
            assert not await accepted(client, "v3")
            assert (await client.search(replace(REQUEST, version="v1"))).version == "v1"
        else:
            await until(lambda: accepted(client, "v3"))

    most = held(store, "v1") + held(store, "v2")
    serve(store, check, memory="resident", max_memory_bytes=most, grace_s=grace)


def test_a_domain_asked_for_by_name_that_does_not_fit_stops_the_start(store: Path) -> None:
    with pytest.raises(InsufficientMemory, match=rf"toy/v1 would hold .*\({held(store, 'v1')} bytes\).*100 bytes"):
        serve(store, nothing, domains=("toy",), memory="resident", max_memory_bytes=100)


def test_the_domains_that_fit_are_served_when_none_is_asked_for_by_name(store: Path) -> None:
    toy_datastore(store, domain="also", texts=TEXTS[:1])

    async def check(client: GrpcDatastore, host: Host) -> None:
        assert (await client.search(replace(REQUEST, domain="also"))).version == "v1"
        with pytest.raises(Unavailable, match=r"toy cannot be served: .* would hold"):
            await client.search(REQUEST)

    serve(store, check, memory="resident", max_memory_bytes=held(store, "v1"))


def test_mapped_files_do_not_count_and_read_ones_do(store: Path) -> None:
    for version in ("v1", "v2"):
        build_index(store / "toy" / version, "ivf4,fp16")
    most = held(store, "v1") // 4  # the centroids of either are read in any case

    async def check(client: GrpcDatastore, host: Host) -> None:
        info = await client.get_domain("toy")
        assert info.memory is not None
        assert (info.index, info.memory.index, info.memory.keys) == ("ivf4,fp16", "mapped", "mapped")
        assert info.memory.index_bytes + info.memory.keys_bytes > most
        assert await accepted(client, "v2")

    serve(store, check, max_memory_bytes=most)
    with pytest.raises(InsufficientMemory):
        serve(store, nothing, domains=("toy",), max_memory_bytes=most, memory="resident")


def test_memory_is_counted_by_part_and_place(store: Path) -> None:
    build_index(store / "toy" / "v2", "ivf4,fp16")
    shutil.rmtree(store / "toy" / "v3")

    async def check(client: GrpcDatastore, host: Host) -> None:
        keys = np.load(store / "toy" / "v1" / "keys.npy")
        assert memory_of(host) == {
            ("toy", "index", "resident"): 4 * keys.size,
            ("toy", "keys", "mapped"): keys.nbytes,
        }
        await client.activate("toy", "v2")
        assert set(memory_of(host)) == {("toy", "index", "mapped"), ("toy", "keys", "mapped")}
        shutil.rmtree(store / "toy")

        async def gone() -> bool:
            return not memory_of(host)

        await until(gone)

    serve(store, check)


def info_of(store: Path, **settings: Any) -> DomainInfo:
    found: list[DomainInfo] = []

    async def check(client: GrpcDatastore, host: Host) -> None:
        found.append(await client.get_domain("toy"))

    serve(store, check, **settings)
    return found[0]


def test_the_index_and_where_it_lies_are_what_the_settings_say(store: Path) -> None:
    build_index(store / "toy" / "v1", "ivf4,fp16")
    default, exact = info_of(store), info_of(store, index="flat")
    read = info_of(store, index="ivf4,fp16", memory="resident")
    assert [info.index for info in (default, exact, read)] == ["ivf4,fp16", "flat", "ivf4,fp16"]
    places = [(info.memory.index, info.memory.keys) for info in (default, exact, read) if info.memory]
    assert places == [("mapped", "mapped"), ("resident", "mapped"), ("resident", "resident")]


def test_an_index_that_the_version_lacks_stops_the_start_and_names_the_setting(store: Path) -> None:
    with pytest.raises(DatastoreError, match=r"no index 'hnsw8'.* set to index 'hnsw8'"):
        serve(store, nothing, domains=("toy",), index="hnsw8")


def test_a_device_that_is_not_there_stops_the_start(store: Path) -> None:
    with pytest.raises(DatastoreError, match="'cuda:99' is not there"):
        serve(store, nothing, domains=("toy",), device="cuda:99", index="flat")


def test_memory_that_ends_while_a_version_is_read_is_a_refusal_like_others(store: Path) -> None:
    def open_searcher(path: Path, memory_limit: int | None) -> Searcher:
        if path.name == "v2":
            raise MemoryError("cannot allocate")
        return Searcher.open(path, memory_limit=memory_limit)

    async def check(client: GrpcDatastore, host: Host) -> None:
        with pytest.raises(InsufficientMemory, match="memory ended"):
            await client.activate("toy", "v2")
        assert (await client.search(REQUEST)).version == "v1"

    serve(store, check, open_searcher)


class Broken(Searcher):
    closed = False

    def warm(self) -> None:
        raise DatastoreError("cold")

    def close(self) -> None:
        type(self).closed = True
        super().close()


def test_a_version_that_cannot_be_warmed_is_closed(store: Path) -> None:
    with pytest.raises(KnnlmError, match="cold"):
        Loaded(store / "toy" / "v1", lambda path, limit: Broken.open(path, memory_limit=limit))
    assert Broken.closed


def settings(*argv: str) -> DatastoreSettings:
    return load_settings(DatastoreSettings, ["--store", "s", *argv], prog="test")


def test_settings_of_memory_are_read() -> None:
    plain = settings()
    assert (plain.index, plain.memory, plain.device, plain.max_memory_bytes) == ("", "mapped", "cpu", None)
    given = settings("--index", "flat", "--device", "cuda:1", "--max-memory-bytes", "5000")
    assert (given.index, given.memory, given.device, given.max_memory_bytes) == ("flat", "mapped", "cuda:1", 5000)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--device", "gpu"], "--device"),
        (["--device", "cuda:"], "--device"),
        (["--memory", "disk"], "--memory"),
        (["--max-memory-bytes", "0"], "--max-memory-bytes"),
        (["--max-memory-bytes", "4GB"], "--max-memory-bytes"),
        (["--shard-max-replicas", "10001"], "--shard-max-replicas"),
        (["--shard-replicas-per-node", "101"], "--shard-replicas-per-node"),
        (["--shard-target-requests", "inf"], "--shard-target-requests"),
        (["--shard-cpus", "inf"], "--shard-cpus"),
    ],
)
def test_bad_settings_of_memory_and_shards_stop_the_start(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        settings(*argv)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


FREED = """
import ctypes, os, sys
from pathlib import Path
from types import SimpleNamespace
from services.datastore.loaded import Loaded

malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def open_searcher(path, memory_limit):
    blocks = []
    for _ in range(2000):
        blocks.append(malloc(64 << 10))
        ctypes.memset(blocks[-1], 1, 64 << 10)
        malloc(64)  # the last one keeps the heap from shrinking by itself
    close = lambda: [free(block) for block in blocks]
    return SimpleNamespace(warm=lambda: None, memory=None, held_bytes=0, close=close)

loaded = Loaded(Path(sys.argv[1]), open_searcher)
full = resident()
loaded.close()
print(full - resident())
"""


@pytest.mark.skipif(
    not hasattr(__import__("ctypes").CDLL(None), "malloc_trim"), reason="glibc alone keeps what is freed"
)
def test_the_memory_of_a_version_that_is_let_go_returns_to_the_system(store: Path) -> None:
    command = [sys.executable, "-c", FREED, str(store / "toy" / "v1")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100 << 20  # of 125 MiB
