"""Exact search on a device: queries per second of knnlm.index.device, beside FAISS's exact search on the CPU.

    python -m benchmarks.device [--size N] [--device cuda] [--synthetic DIM]

Runs on CUDA when there is a GPU, else on the CPU, and says which. --synthetic: random keys of that dimension instead of
a model's, for sizes that there is no text for; the time of exact search does not depend on what the keys are.
"""

import argparse
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.data import prepare
from benchmarks.harness import arguments, figure, interleave, table
from knnlm.datastore.reader import Datastore
from knnlm.index.contract import Float32, Index, Keys, chunks
from knnlm.index.device import open_on_device
from knnlm.index.flat import Flat

K = 1024
BATCHES = (1, 64, 512)
MAIN = 64  # the batch of the figure
CPU_BYTES = 1 << 32  # larger than this in float32, there is nothing beside it: FAISS would take all day
QUERIES = 4096


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--synthetic", type=int, metavar="DIM", help="random keys of so many dimensions")
    parser.add_argument("--seconds", type=float, default=1.0, help="per batch size, program and round (default 1)")
    options = parser.parse_args()
    keys, queries = _synthetic(options) if options.synthetic else _real(options)
    n, dim = keys.shape
    indexes: dict[str, Index] = {"device": open_on_device(keys, options.device)}
    if 4 * n * dim <= CPU_BYTES:
        indexes["faiss"] = Flat().open(keys, None, {}, resident=False)
    k = min(K, n)
    on = torch.cuda.get_device_name(options.device) if options.device != "cpu" else "CPU: no GPU was used"
    print(f"{n} keys, d = {dim}, {keys.dtype}, k = {k}; device: {options.device} ({on})")
    rates = {
        batch: interleave(
            {name: _searches(index, queries, batch, k) for name, index in indexes.items()}, options.seconds
        )
        for batch in BATCHES
    }
    rows = [
        [str(batch), f"{found['device'].median:.0f}"]
        + ([f"{found['faiss'].median:.0f}", f"{found['device'].over(found['faiss']):.2f}"] if "faiss" in found else [])
        for batch, found in rates.items()
    ]
    table(["batch", "device q/s", "faiss flat on CPU q/s", "ratio"][: len(rows[0])], rows)
    main_rate = rates[MAIN]
    figure(
        "exact search on a device, queries per second",
        main_rate["device"].median,
        None,
        size=n,
        device=options.device,
        on=on,
        dim=dim,
        dtype=str(keys.dtype),
        k=k,
        batch=MAIN,
        keys="synthetic" if options.synthetic else "of a model",
        bytes_on_device=indexes["device"].memory_bytes,
        spread=round(main_rate["device"].spread, 3),
        by_batch={str(batch): round(found["device"].median, 1) for batch, found in rates.items()},
        over_faiss_flat={str(b): round(f["device"].over(f["faiss"]), 3) for b, f in rates.items() if "faiss" in f},
    )


def _searches(index: Index, queries: Float32, batch: int, k: int) -> Callable[[], int]:
    """One search of `batch` queries at a time, through all of them and again."""
    place = 0

    def search() -> int:
        nonlocal place
        taken = np.arange(place, place + batch) % len(queries)
        place += batch
        index.search(queries[taken], k)
        return batch

    return search


def _real(options: argparse.Namespace) -> tuple[Keys, Float32]:
    prepared = prepare(options.size, options.text)
    return Datastore.open(prepared.path).keys, prepared.queries


def _synthetic(options: argparse.Namespace) -> tuple[npt.NDArray[np.float16], Float32]:
    """Uniform in [1, 2): random bits under one exponent, much faster to draw than normal numbers."""
    rng = np.random.default_rng(options.seed)
    keys = np.empty((options.size, options.synthetic), np.float16)
    for lo, hi in chunks(*keys.shape):
        keys[lo:hi] = _uniform(rng, (hi - lo, options.synthetic))
    return keys, _uniform(rng, (QUERIES, options.synthetic)).astype(np.float32)


def _uniform(rng: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.float16]:
    return (rng.integers(0, 1 << 10, shape, np.uint16) | np.uint16(0x3C00)).view(np.float16)


if __name__ == "__main__":
    main()
