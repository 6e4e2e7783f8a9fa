"""Many callers at once: 64 of them with one query each beside batches of 64, how even their waits are, and what is left
for a domain while another one is flooded.

    python -m benchmarks.concurrent [--size N] [--text PATH ...] [--callers 64]

k = 1024, rescored, two threads for the search. The batched rate is that of batches of 64, four in flight. All callers
are of one kind (benchmarks/load.py), never wait, and share the processor with the service. For the last figure two
domains hold the same entries: eight callers ask the one for 64 queries at a time, four ask the other for one.
"""

import asyncio
import os
import shutil
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import FOLDER, Prepared, prepare
from benchmarks.harness import Latency, Rate, arguments, figure, interleave, table
from benchmarks.load import Callers, GrpcCallers, HttpCallers, keep, search_post
from benchmarks.system import THREADS, Running, service
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import Manifest
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions

BATCH, K = 64, 1024
IN_FLIGHT = 4  # of batches
SECONDS = 1.0  # of one kind of callers in one go
SINGLE = 64  # callers
FLOOD, QUIET = 8, 4  # callers
OTHER = "quiet"  # the second domain
RATE_GOAL, TAIL_GOAL = 0.6, 5.0


@dataclass
class Load:
    """Callers of requests of `batch` queries, beside others that are not counted; and how long each of them waited."""

    callers: Callers
    batch: int
    beside: Callers | None = None
    rounds: list[list[float]] = field(default_factory=list)

    async def run(self) -> int:
        """The queries answered in SECONDS."""
        others = [] if self.beside is None else [keep(self.beside, SECONDS)]
        found, *_ = await asyncio.gather(keep(self.callers, SECONDS), *others)
        self.rounds.append(found)
        return len(found) * self.batch

    @property
    def latency(self) -> Latency:
        """The latency in all rounds but the first, which is not timed."""
        return Latency(tuple(chain.from_iterable(self.rounds[1:])))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--callers", type=int, default=SINGLE, help=f"of single queries (default {SINGLE})")
    parser.add_argument("--rounds", type=int, default=7, help="of every kind in turn (default 7)")
    options = parser.parse_args()
    prepared = prepare(options.size, options.text)
    folder = FOLDER / "concurrent"
    two_domains(prepared, folder)
    try:
        with service("datastore", FOLDER / "logs", "--store", str(folder)) as running, asyncio.Runner() as runner:
            measure(prepared, running, runner, options.callers, options.rounds)
    finally:
        shutil.rmtree(folder)


def measure(prepared: Prepared, running: Running, runner: asyncio.Runner, callers: int, rounds: int) -> None:
    stack = AsyncExitStack()
    loads = runner.run(_loads(prepared, running, callers, stack))

    def program(load: Load) -> Callable[[], int]:
        return lambda: runner.run(load.run())

    rates = interleave({name: program(load) for name, load in loads.items()}, seconds=SECONDS / 2, rounds=rounds)
    runner.run(stack.aclose())
    show(loads, rates)
    extra: dict[str, Any] = {"size": prepared.entries, "k": K, "threads": THREADS, "callers": callers}
    batched = max((rates[f"{face}, batches"] for face in ("HTTP", "gRPC")), key=lambda rate: rate.median)
    for face in ("HTTP", "gRPC"):
        rate, latency = rates[f"{face}, single"], loads[f"{face}, single"].latency
        figure(
            f"{face}: single queries of many callers / the faster batched rate", rate.over(batched), RATE_GOAL,
            queries_per_second=round(rate.median), batched=round(batched.median),
            of_its_own_batched=round(rate.over(rates[f"{face}, batches"]), 3), **extra,
        )  # fmt: skip
        figure(
            f"{face}: single queries of many callers, p99 / p50", latency.p99 / latency.p50, TAIL_GOAL, better="less",
            p50_ms=round(1e3 * latency.p50, 2), p99_ms=round(1e3 * latency.p99, 2), **extra,
        )  # fmt: skip
    quiet, beside = rates["quiet domain, alone"], rates["quiet domain, beside a flood"]
    waits = loads["quiet domain, beside a flood"].latency
    figure(
        "queries/s of a quiet domain beside a flooded one / alone", beside.over(quiet), None,
        queries_per_second=round(beside.median), alone=round(quiet.median), p50_ms=round(1e3 * waits.p50, 2),
        p99_ms=round(1e3 * waits.p99, 2), quiet_callers=QUIET, flood_callers=FLOOD, **extra,
    )  # fmt: skip


async def _loads(prepared: Prepared, running: Running, callers: int, stack: AsyncExitStack) -> dict[str, Load]:
    def requests(domain: str, batch: int) -> list[SearchRequest]:
        queries = prepared.queries[: len(prepared.queries) // BATCH * BATCH]
        return [SearchRequest(domain, part, SearchOptions(k=K)) for part in np.split(queries, len(queries) // batch)]

    async def http(domain: str, batch: int, number: int) -> Callers:
        return await stack.enter_async_context(
            HttpCallers(running.http, [search_post(r) for r in requests(domain, batch)], number)
        )

    async def grpc(batch: int, number: int) -> Callers:
        return await stack.enter_async_context(GrpcCallers(running.grpc, requests(prepared.domain, batch), number))

    flood = await http(prepared.domain, BATCH, FLOOD)
    return {
        "HTTP, batches": Load(await http(prepared.domain, BATCH, IN_FLIGHT), BATCH),
        "HTTP, single": Load(await http(prepared.domain, 1, callers), 1),
        "gRPC, batches": Load(await grpc(BATCH, IN_FLIGHT), BATCH),
        "gRPC, single": Load(await grpc(1, callers), 1),
        "quiet domain, alone": Load(await http(OTHER, 1, QUIET), 1),
        "quiet domain, beside a flood": Load(await http(OTHER, 1, QUIET), 1, flood),
    }


def show(loads: dict[str, Load], rates: dict[str, Rate]) -> None:
    rows = []
    for name, rate in rates.items():
        latency = loads[name].latency
        cells = (f"{rate.median:,.0f}", f"{1e3 * latency.p50:.1f}", f"{1e3 * latency.p99:.1f}", f"{rate.spread:.0%}")
        rows.append((name, *cells))
    table(("callers", "queries/s", "p50 ms", "p99 ms", "spread"), rows)


def two_domains(prepared: Prepared, store: Path) -> None:
    """A store in which two domains are the same files under two names."""
    shutil.rmtree(store, ignore_errors=True)
    manifest = Manifest.load(prepared.path)
    for domain in (prepared.domain, OTHER):
        folder = store / domain / manifest.version
        folder.mkdir(parents=True)
        for file in prepared.path.iterdir():
            if file.is_file() and file.name != "manifest.json":
                os.link(file, folder / file.name)
        manifest.model_copy(update={"domain": domain}).save(folder)
        Catalog(store).activate(domain, manifest.version)


if __name__ == "__main__":
    main()
