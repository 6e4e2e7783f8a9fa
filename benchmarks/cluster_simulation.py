"""Latency of a batch against the number of shards, drawn to 1,000: calculated, fitted to what cluster_serving measured.

    python -m benchmarks.cluster_simulation [--measured FILE] [--out FILE]

For a version of N keys cut into S shards, each replica on a core of its own:

    latency(S) = gateway + S * call + shard(S) + merge * S log2(S + 1)
    shard(S)   = fixed + scan * N / S

gateway, call: what the way to the gateway and each shard cost the gateway, whose process asks and merges
alone;
fixed, scan: what a batch costs a shard whatever its size, and for its share of the keys that are visited. The
processor time of the replicas of 1, 2, 4, 8 shards gives fixed and scan (least squares); what the batch took beyond
the time that the replicas need on the cores there were gives call, and merge is timed here on random distances.
Assumptions: shards of one size, cores that are free, no slowest shard (with 1,000 shards half of the batches wait for
one that is as slow as its p99.93), a network that carries every shard's 512 KiB in the time that this machine needs
for it. One gateway receives the answers of all shards: at 1,000 shards 0.5 GiB for a batch, which is what the curve
ends in. Runs after cluster_serving, which needs `pip install 'knnlm[cluster]'`.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cluster_serving import BATCH, MODEL, K
from benchmarks.harness import ROOT, figure, table

DRAWING = MODEL.with_name("scale.svg")

SHARDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)


@dataclass(frozen=True)
class Model:
    """Seconds of a batch. fixed: of a shard. scan: of all shards together for the keys they visit. call: of the gateway
    for each shard. gateway: besides. merge: for each shard, times log2(shards + 1)."""

    fixed: float
    scan: float
    call: float
    gateway: float
    merge: float

    def latency(self, shards: int) -> float:
        merging = self.merge * shards * math.log2(shards + 1) if shards > 1 else 0.0
        return self.gateway + self.call * shards + self.fixed + self.scan / shards + merging


def fit(measured: dict[str, Any]) -> Model:  # Any: JSON
    """measured: what cluster_serving wrote. The processor time of all S replicas is fixed * S + scan."""
    counts = sorted(map(int, measured["shards"]))
    cpu = np.array([measured["shards"][str(count)]["cpu_seconds"] for count in counts])
    (fixed, scan), *_ = np.linalg.lstsq(np.stack([counts, np.ones(len(counts))], axis=1), cpu, rcond=None)
    merge = merge_seconds(max(counts)) / (max(counts) * math.log2(max(counts) + 1))
    taken = np.array([measured["shards"][str(count)]["p50"] for count in counts])
    cores = int(measured["cores"])
    waited = np.array([(fixed + scan / n) * math.ceil(n / cores) for n in counts])
    merged = np.array([merge * n * math.log2(n + 1) for n in counts])
    (call, gateway), *_ = np.linalg.lstsq(
        np.stack([counts, np.ones(len(counts))], axis=1), taken - waited - merged, rcond=None
    )
    return Model(max(fixed, 0.0), max(scan, 0.0), max(call, 0.0), max(gateway, 0.0), merge)


def merge_seconds(shards: int) -> float:
    """What picking the K nearest of the answers of this many shards takes here."""
    rng = np.random.default_rng(0)
    distances = np.sort(rng.random((BATCH, shards, K), np.float32), axis=2).reshape(BATCH, -1)
    bits = distances.view(np.uint32).astype(np.uint64) << np.uint64(32)
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        pairs = np.partition(bits | np.arange(bits.shape[1], dtype=np.uint64), min(K, bits.shape[1] - 1), axis=1)[:, :K]
        pairs.sort(axis=1)
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken))


def drawn(model: Model, measured: dict[str, Any], out: Path) -> None:  # Any: JSON
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    usual = measured["visited"]
    scanned = model.scan / usual  # seconds for each visited entry
    with rc_context({"svg.hashsalt": "knnlm", "svg.fonttype": "none"}):
        drawing = Figure(figsize=(7, 4), layout="constrained")
        axes = drawing.add_subplot()
        for visited in (usual, 16 * usual, 256 * usual):
            larger = Model(model.fixed, scanned * visited, model.call, model.gateway, model.merge)
            axes.plot(SHARDS, [1e3 * larger.latency(n) for n in SHARDS], label=f"{visited:,} entries visited, model")
        counts = sorted(map(int, measured["shards"]))
        label = f"measured, {measured['cores']} cores for all shards"
        axes.plot(counts, [1e3 * measured["shards"][str(n)]["p50"] for n in counts], "ko", markersize=4, label=label)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="shards, each on a core of its own",
        )
        axes.set_ylabel("ms of a batch of 64, k = 1024")
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.legend(fontsize=8)
        drawing.savefig(out, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=DRAWING, help=f"the drawing (default {DRAWING.relative_to(ROOT)})")
    options, _ = parser.parse_known_args()  # others, as --size, are given by `python -m benchmarks`
    if not options.measured.is_file():
        print(f"no {options.measured}: `python -m benchmarks.cluster_serving` writes it; nothing is drawn")
        return
    measured = json.loads(options.measured.read_text(encoding="utf-8"))
    model = fit(measured)
    table(["shards", "ms, calculated"], [[str(n), f"{1e3 * model.latency(n):.1f}"] for n in SHARDS])
    drawn(model, measured, options.out)
    figure(
        "time of a batch, 1,000 shards / 8, calculated", model.latency(1000) / model.latency(8), None, better="less",
        milliseconds={name: round(1e3 * seconds, 4) for name, seconds in vars(model).items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
