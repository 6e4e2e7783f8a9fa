"""What a service costs: queries per second over gRPC and over HTTP, beside calling the same index in process.

    python -m benchmarks.endpoint [--size N] [--text PATH ...] [--in-flight 4]

Batches of 64 queries, k = 1024, rescored, two threads for the search. The service is a process of its own, and this one
is its client, with the library's own clients and the answers decoded: both share the processor with the search. Some
calls are in flight at once, as callers of a service have them; one at a time is shown as well.
"""

import asyncio
import os
import sys
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np

from benchmarks.data import FOLDER, Prepared, prepare
from benchmarks.harness import arguments, figure, interleave, table
from benchmarks.system import THREADS, Running, service
from knnlm.clients.http import HttpDatastore
from knnlm.clients.rpc import GrpcDatastore
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from knnlm.protocols import DatastoreClient
from services.runtime.process import SWITCH_INTERVAL_S, configure_malloc, keep_loaded

BATCH, K = 64, 1024
IN_FLIGHT = 4
CALLS = 24  # of one program in one go
GOALS = {"gRPC": 0.9, "HTTP": 0.75}
IN_PROCESS = "in process"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--in-flight", type=int, default=IN_FLIGHT, help=f"calls at once (default {IN_FLIGHT})")
    parser.add_argument("--rounds", type=int, default=9, help="of every way in turn (default 9)")
    options = parser.parse_args()
    as_the_service_is()
    prepared = prepare(options.size, options.text)
    with service("datastore", FOLDER / "logs", "--store", str(prepared.store)) as running:
        measure(prepared, running, options.in_flight, options.rounds)


def as_the_service_is() -> None:
    """What runs in this process gets the threads and the memory that the service has, so that the way alone differs;
    its garbage collection, too, once the index is open.

    Starts the program again where that takes other variables: OpenMP reads them when it is loaded, which has happened.
    """
    wanted = {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "PASSIVE"}
    if not wanted.items() <= os.environ.items():
        again = [sys.executable, "-m", "benchmarks.endpoint", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, **wanted})  # noqa: S606
    configure_malloc(os.environ)
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def measure(prepared: Prepared, running: Running, in_flight: int, rounds: int) -> None:
    searcher = Searcher.open(prepared.path)
    searcher.warm()
    keep_loaded()
    requests = batches(prepared)
    turn = count()

    def in_process() -> int:
        for _ in range(CALLS):
            searcher.search(requests[next(turn) % len(requests)])
        return CALLS * BATCH

    with asyncio.Runner() as runner:

        def over(client: DatastoreClient, at_once: int) -> Callable[[], int]:
            async def calls() -> None:
                async def one() -> None:
                    for _ in range(CALLS // at_once):
                        await client.search(requests[next(turn) % len(requests)])

                await asyncio.gather(*(one() for _ in range(at_once)))

            def program() -> int:
                runner.run(calls())
                return CALLS // at_once * at_once * BATCH

            return program

        grpc, http = GrpcDatastore(running.grpc), HttpDatastore(running.http)
        json = HttpDatastore(running.http, encoding="base64")
        runner.run(same(searcher, [grpc, http, json], requests[0]))
        rates = interleave(
            {
                IN_PROCESS: in_process,
                "gRPC": over(grpc, in_flight),
                "HTTP": over(http, in_flight),
                "gRPC, one at a time": over(grpc, 1),
                "HTTP, one at a time": over(http, 1),
                "HTTP with JSON and base64": over(json, in_flight),
            },
            rounds=rounds,
        )
        for client in (grpc, http, json):
            runner.run(client.aclose())
    searcher.close()
    base = rates[IN_PROCESS]
    table(
        ("way", "queries/s", "of in process", "spread"),
        [(name, f"{rate.median:,.0f}", f"{rate.over(base):.2f}", f"{rate.spread:.0%}") for name, rate in rates.items()],
    )
    extra: dict[str, Any] = {
        "size": prepared.entries,
        "batch": BATCH,
        "k": K,
        "in_flight": in_flight,
        "threads": THREADS,
    }
    for name, goal in GOALS.items():
        rate = rates[name]
        alone = rates[f"{name}, one at a time"].over(base)
        figure(
            f"{name} endpoint / in process", rate.over(base), goal,
            queries_per_second=round(rate.median), one_at_a_time=round(alone, 3), **extra,
        )  # fmt: skip


def batches(prepared: Prepared) -> list[SearchRequest]:
    queries = prepared.queries[: len(prepared.queries) // BATCH * BATCH]
    if not len(queries):
        raise SystemExit(f"{len(prepared.queries)} queries, at least {BATCH} are needed")
    return [
        SearchRequest(prepared.domain, part, SearchOptions(k=K)) for part in np.split(queries, len(queries) // BATCH)
    ]


async def same(searcher: Searcher, clients: list[DatastoreClient], request: SearchRequest) -> None:
    """They are worth comparing: all give what the index in process gives."""
    expected = searcher.search(request).neighbors
    for client in clients:
        found = (await client.search(request)).neighbors
        assert np.array_equal(found.values, expected.values)
        assert np.allclose(found.distances, expected.distances, rtol=1e-5)


if __name__ == "__main__":
    main()
