"""What a Ray cluster costs beside one process: the way through a gateway, and one version cut into 1, 2, 4, 8 shards.

    python -m benchmarks.cluster_serving [--size N] [--shards 1 2 4 8] [--calls 100] [--datastore FOLDER]

The same keys and lists everywhere, batches of 64 queries with k = 1024, all asked in turn, call by call. Every shard is
a replica, a process, on one Ray node of this machine: with more shards than cores, what they compute for one batch is
divided among them, and only takes less time where there are cores. So the processor time of all replicas for a batch is
shown beside the time of the batch: that is what does not depend on the cores. `cluster_simulation`
is fitted to what this writes into build/bench/. Needs the extra `cluster`; without it nothing is measured.
"""

import asyncio
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import FOLDER, Prepared, add_datastore_option, asked_for
from benchmarks.harness import Latency, arguments, figure, latencies, table
from benchmarks.system import service
from knnlm.clients.rpc import GrpcDatastore
from knnlm.datastore.manifest import Manifest
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from tests.sharding import sharded

BATCH, K = 64, 1024
# what Ray reads: a cluster on loopback, one thread for each replica, nothing sent anywhere
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",
}
MODEL = FOLDER / "cluster-model.json"  # what cluster_simulation is fitted to
PROCESSES = 64  # that Ray may take this machine to have


def main() -> None:
    parser = arguments(__doc__ or "")
    add_datastore_option(parser)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--calls", type=int, default=100, help="of every program (default 100)")
    options = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        print("no Ray here (pip install 'knnlm[cluster]'): nothing is measured")
        return
    prepared = asked_for(options)
    recipe = Manifest.load(prepared.path).index.recipe
    for shards in options.shards:
        if not (prepared.path.with_name(f"s{shards}") / "manifest.json").is_file():
            sharded(prepared.path, shards, version=f"s{shards}", recipe=recipe)
    os.environ.update(ENVIRONMENT)
    measure(prepared, options.shards, options.calls, recipe)


def measure(prepared: Prepared, shards: list[int], calls: int, recipe: str) -> None:
    import ray

    from knnlm.cluster.applications import Applications
    from knnlm.cluster.registry import ShardOptions
    from knnlm.cluster.serving import open_version

    ray.init(address="local", num_cpus=PROCESSES, include_dashboard=False, log_to_driver=False, namespace="knnlm")
    address = ray.get_runtime_context().gcs_address
    applications = Applications(address)
    starts = cycle(range(0, len(prepared.queries) - BATCH + 1, BATCH))

    def request() -> SearchRequest:
        start = next(starts)
        return SearchRequest(prepared.domain, prepared.queries[start : start + BATCH], SearchOptions(k=K))

    with asyncio.Runner() as runner, ExitStack() as stack:
        logs = FOLDER / "cluster-logs"
        flags = ("--store", str(prepared.store))
        direct = stack.enter_context(service("datastore", logs / "direct", *flags, threads=1))
        cluster = ("--cluster", address, "--shard-cpus", "0.1")
        gateway = stack.enter_context(service("datastore", logs / "gateway", *flags, *cluster, threads=1))
        programs: dict[str, Callable[[SearchRequest], object]] = {"in process": Searcher.open(prepared.path).search}
        options = ShardOptions(cpus=0.1, check="small")
        for count in shards:
            opened = open_version(applications, prepared.path.with_name(f"s{count}"), options)
            programs[f"{count} shards"] = opened.search
        for name, running in (("gRPC, this process's index", direct), ("gRPC, gateway, 1 replica", gateway)):
            client = runner.run(_opened(running.grpc))
            stack.callback(runner.run, client.__aexit__(None, None, None))
            programs[name] = _called(runner, client)
        asked = {name: _asking(program, request) for name, program in programs.items()}
        taken = latencies(asked, calls)
        work = {count: _work(prepared, count, asked[f"{count} shards"], calls) for count in shards}
        _report(prepared, shards, taken, work, recipe)
    applications.close()


def _asking(program: Callable[[SearchRequest], object], request: Callable[[], SearchRequest]) -> Callable[[], object]:
    return lambda: program(request())


async def _opened(target: str) -> GrpcDatastore:
    return await GrpcDatastore(target).__aenter__()


def _called(runner: asyncio.Runner, client: GrpcDatastore) -> Callable[[SearchRequest], object]:
    return lambda request: runner.run(client.search(request))


def _work(prepared: Prepared, shards: int, program: Callable[[], object], calls: int) -> dict[str, float]:
    """Processor seconds that all replicas of one version take for a batch, and the bytes of one replica: its own, and
    those that it shares (libraries, and its mapped files)."""
    pids = _pids(f"ServeReplica:{prepared.domain}@s{shards}:")
    before = sum(map(_cpu_seconds, pids))
    for _ in range(calls):
        program()
    seconds = (sum(map(_cpu_seconds, pids)) - before) / calls
    memory = [_memory(pid) for pid in pids]
    own, shared = (float(np.mean([part[i] for part in memory])) for i in (0, 1))
    return {"cpu_seconds": seconds, "own_bytes": own, "shared_bytes": shared}


def _pids(title: str) -> list[int]:
    folders = [folder for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return [int(f.name) for f in folders if title in (f / "cmdline").read_text(errors="replace")]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> tuple[int, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    own = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return own, sizes["Rss"] - own


def _visited(path: Path) -> int:
    """Entries that a query visits by default, of lists of equal length; all where the index has no lists."""
    manifest = Manifest.load(path)
    lists = re.search(r"ivf(\d+)", manifest.index.recipe)
    share = 1.0 if lists is None else manifest.index.parameters["nprobe"] / int(lists[1])
    return round(manifest.entries * share)


def _report(
    prepared: Prepared, shards: list[int], taken: Mapping[str, Latency], work: Mapping[int, Any], recipe: str
) -> None:
    rows = []
    for name, latency in taken.items():
        shown = work.get(int(name.split()[0])) if name.endswith("shards") else None
        cells = ["", "", ""]
        if shown is not None:
            mebibytes = [f"{shown[part] / 2**20:.0f}" for part in ("own_bytes", "shared_bytes")]
            cells = [f"{1e3 * shown['cpu_seconds']:.1f}", *mebibytes]
        rows.append([name, f"{1e3 * latency.p50:.1f}", f"{1e3 * latency.p99:.1f}", *cells])
    table(["a batch", "p50 ms", "p99 ms", "CPU ms of replicas", "MiB of a replica: own", "shared"], rows)
    entries = Manifest.load(prepared.path).entries
    milliseconds = {name: round(1e3 * latency.p50, 2) for name, latency in taken.items()}
    direct, gateway = taken["gRPC, this process's index"], taken["gRPC, gateway, 1 replica"]
    added = float(np.median(np.subtract(gateway.seconds, direct.seconds)))
    figure(
        "a batch through a gateway of a Ray cluster, ms over gRPC to an index in process", 1e3 * added, None,
        better="less", size=entries, batch=BATCH, k=K, index=recipe, milliseconds=milliseconds,
    )  # fmt: skip
    most = max(shards)
    figure(
        f"CPU of all replicas for a batch, {most} shards / {min(shards)}",
        work[most]["cpu_seconds"] / work[min(shards)]["cpu_seconds"], None, better="less",
        size=entries, batch=BATCH, k=K, index=recipe,
        cpu_milliseconds={count: round(1e3 * one["cpu_seconds"], 2) for count, one in work.items()},
        own_mib={count: round(one["own_bytes"] / 2**20) for count, one in work.items()},
    )  # fmt: skip
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    fitted_to = {
        "entries": entries, "visited": _visited(prepared.path),
        "batch": BATCH, "k": K, "index": recipe, "cores": len(os.sched_getaffinity(0)),
        "in_process": taken["in process"].p50, "direct": direct.p50, "gateway": gateway.p50,
        "shards": {count: {"p50": taken[f"{count} shards"].p50, **work[count]} for count in shards},
    }  # fmt: skip
    MODEL.write_text(json.dumps(fitted_to, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
