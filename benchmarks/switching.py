"""How long a datastore service stands still while it switches a domain: the longest gap between two turns of its loop.

    python -m benchmarks.switching [--size N] [--switches 6]

Two versions of N random keys (2^20 by default: an exact index of 1 GiB, held in memory) are activated in turn, without
a time of grace, so that each switch loads one index and frees another, while a client searches. Beside it, for as many
keys, how long a thread waits while FAISS's own destructor frees such an index, and while the library closes one.
"""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np

from benchmarks.harness import ROOT, arguments, figure, table
from knnlm.datastore.arrays import ArrayWriter
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.document_table import Row
from knnlm.datastore.files import sha256_of
from knnlm.datastore.layout import DOCUMENTS, KEYS, TOKENIZER, TOKENS, VALUES, FileRecord
from knnlm.datastore.manifest import Manifest, ModelRecord, WindowsRecord
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from knnlm.testing import ToyLanguageModel
from services.datastore.app import service
from services.datastore.engine import Engine
from services.datastore.settings import DatastoreSettings
from services.runtime.context import RequestContext
from services.runtime.lifecycle import running

DIM = 256
ROWS = 1 << 16  # written at once
GOAL_MS = 50
STORE = ROOT / "build" / "bench" / "switching"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(size=1 << 20)
    parser.add_argument("--switches", type=int, default=6, help="of the domain, to and fro (default 6)")
    options = parser.parse_args()
    shutil.rmtree(STORE, ignore_errors=True)
    try:
        for number, version in enumerate(("v1", "v2")):
            random_version(STORE / "big" / version, options.size, options.seed + number)
        Catalog(STORE).activate("big", "v1")
        gaps = asyncio.run(switched(options.switches, options.size))
        alone = {"FAISS's destructor": freed_by_faiss(options.size), "close of a Searcher": freed_by_closing()}
    finally:
        shutil.rmtree(STORE, ignore_errors=True)
    gib = 4 * DIM * options.size / 2**30
    rows = [*gaps.items(), *(("a thread, " + name, gap) for name, gap in alone.items())]
    table(["the longest wait", "ms"], [[name, f"{1000 * gap:.1f}"] for name, gap in rows])
    former, ours = alone.values()
    figure("stall of a switch, ms", 1000 * gaps["loop, switching"], GOAL_MS, better="less", index_gib=gib)
    figure("stall of freeing, ours / FAISS's destructor", ours / former, None, index_gib=gib)


def random_version(path: Path, entries: int, seed: int) -> None:
    """A version of one document whose keys mean nothing."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lm = ToyLanguageModel(key_dim=DIM)
    tokens = rng.integers(0, lm.info.vocab_size, entries + 1, dtype=np.int32)
    with ArrayWriter(path / KEYS, (entries, DIM), "<f2") as keys:
        for lo in range(0, entries, ROWS):
            rows = min(ROWS, entries - lo)
            keys.write(lo, rng.standard_normal((rows, DIM), np.float32).astype(np.float16))
    np.save(path / VALUES, tokens[1:])
    np.save(path / TOKENS, tokens)
    (path / DOCUMENTS).write_bytes(Row("random", 0, entries + 1).line())
    (path / TOKENIZER).write_text(lm.tokenizer.json, encoding="utf-8")
    names = (KEYS, VALUES, TOKENS, DOCUMENTS, TOKENIZER)
    Manifest(
        domain=path.parent.name,
        version=path.name,
        model=ModelRecord.of(lm.info),
        key_function=lm.info.key_function,
        windows=WindowsRecord(context_length=entries + 1, min_context=1),
        key_dim=DIM,
        key_dtype="float16",
        entries=entries,
        documents=1,
        tokens=entries + 1,
        files={n: FileRecord(bytes=(path / n).stat().st_size, sha256=sha256_of(path / n)) for n in names},
    ).save(path)


async def switched(switches: int, entries: int) -> dict[str, float]:
    """Seconds of the longest gaps of the event loop: searching alone, and while switching as well."""
    settings = DatastoreSettings(store=STORE, port=0, grpc_port=0, grace_s=0.0, watch_interval_s=0.2)
    queries = np.random.default_rng(1).standard_normal((4, DIM)).astype(np.float32)
    made = service(settings)
    async with running(made):
        engine = made.core
        assert isinstance(engine, Engine)
        stop = asyncio.Event()

        async def searching() -> None:
            while not stop.is_set():
                await engine.search(
                    SearchRequest("big", queries, SearchOptions(k=64)),
                    RequestContext("bench", "none", time.monotonic() + 60),
                )

        client = asyncio.create_task(searching())
        async with Beat() as quiet:
            await asyncio.sleep(3)
        async with Beat() as busy:
            for number in range(switches):
                version = ("v2", "v1")[number % 2]
                call = RequestContext("bench", "none", time.monotonic() + 600, admin=True)
                assert (await engine.activate("big", version, call)).entries == entries
                await asyncio.sleep(1.5)  # until the former one is let go
        stop.set()
        await client
    return {"loop, searching": quiet.longest, "loop, switching": busy.longest}


class Beat:
    """How long the event loop went without a turn, inside the block."""

    longest = 0.0

    async def __aenter__(self) -> "Beat":
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _beat(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.longest = max(self.longest, now - last - 0.001)
            last = now


def freed_by_faiss(entries: int) -> float:
    index = faiss.IndexFlatL2(DIM)
    rng = np.random.default_rng(2)
    for lo in range(0, entries, ROWS):
        index.add(rng.standard_normal((min(ROWS, entries - lo), DIM), np.float32))
    held = [index]
    del index
    with waiting() as longest:
        held.clear()
    return longest()


def freed_by_closing() -> float:
    searcher = Searcher.open(STORE / "big" / "v1")
    searcher.warm()
    with waiting() as longest:
        searcher.close()
    return longest()


@contextmanager
def waiting() -> Iterator[Callable[[], float]]:
    """The longest time that another thread had to wait for the interpreter, inside the block."""
    gap, stop = [0.0], threading.Event()

    def beat() -> None:
        last = time.perf_counter()
        while not stop.is_set():
            time.sleep(0.0005)
            now = time.perf_counter()
            gap[0] = max(gap[0], now - last - 0.0005)
            last = now

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.1)
    gap[0] = 0.0
    try:
        yield lambda: gap[0]
        time.sleep(0.05)
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    main()
