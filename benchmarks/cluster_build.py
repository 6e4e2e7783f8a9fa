"""Building on a Ray cluster beside building in one process, and the memory of the command that leads it.

    python -m benchmarks.cluster_build [--size N] [--text PATH ...] [--workers 1 2 4]

Speed: tokens/s of making keys, from the first part that is done to the last, with 1, 2 and 4 workers of one thread each
on a cluster of this machine, over those of `knnlm build` with one thread. Starting workers and loading the model are
left out, as they weigh nothing in a build of hours. More workers than processors share them.

Memory: the peak of the process that runs `knnlm cluster build` for --size entries, over that for a tenth of them. It
may hold no more: plans and answers pass by, keys never come to it. Needs `pip install 'knnlm[cluster]'`.
"""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.building import documents, peak_bytes
from benchmarks.data import FOLDER, Prepared, prepare
from benchmarks.harness import arguments, figure, table
from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.progress import Progress
from knnlm.datastore.text import read_documents
from knnlm.lm.model import LanguageModel

MEMORY_GOAL = 1.1
FILES = 16
PART_ENTRIES = 512


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="workers (default 1 2 4)")
    options = parser.parse_args()
    prepared = prepare(options.size, options.text)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        few, many = (
            write(prepared, Path(folder) / name, n) for name, n in (("few", options.size // 10), ("many", options.size))
        )
        alone = apart(prepared.model, many, 0)
        found = {workers: apart(prepared.model, many, workers) for workers in options.workers}
        small = apart(prepared.model, few, options.workers[0])
    rows = [("one process", alone), *((f"{n} workers", one) for n, one in found.items())]
    table(["build", "tokens/s", "peak memory, MB"], [[w, f"{r:,.0f}", f"{m / 1e6:,.0f}"] for w, (r, m) in rows])
    for workers, (rate, _) in found.items():
        figure(
            f"cluster build with {workers} workers / one process: tokens/s", rate / alone[0], None, size=options.size,
            tokens_per_second=round(rate), one_process=round(alone[0]),
        )  # fmt: skip
    peak = found[options.workers[0]][1]
    figure(
        "cluster build: peak memory of the command / that of a tenth of the entries", peak / small[1], MEMORY_GOAL,
        better="less", size=options.size, megabytes=round(peak / 1e6), megabytes_of_a_tenth=round(small[1] / 1e6),
    )  # fmt: skip


def write(prepared: Prepared, folder: Path, entries: int) -> Path:
    """Write documents with at least `entries` entries to FILES files in the folder, and return it."""
    folder.mkdir()
    lm = LanguageModel.load(str(prepared.model), device="cpu")
    texts = list(documents(prepared.path, lm.tokenizer, entries))
    step = -(-len(texts) // FILES)
    for number, some in enumerate(texts[lo : lo + step] for lo in range(0, len(texts), step)):
        lines = (json.dumps({"id": d.id, "text": d.text}) + "\n" for d in some)
        (folder / f"{number:02d}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def apart(model: Path, text: Path, workers: int) -> tuple[float, int]:
    """Tokens/s and peak bytes of a new process that builds, on a cluster with `workers` workers, or alone with 0."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_build, args=(model, text, workers, sender))
    process.start()
    sender.close()
    try:
        found: tuple[float, int] = receiver.recv()
    except EOFError as err:
        raise RuntimeError(f"the process that builds with {workers} workers failed") from err
    process.join()
    print(f"{text.name}, {workers or 'no'} workers: {found[0]:,.0f} tokens/s, {found[1] / 1e6:,.0f} MB", flush=True)
    return found


def _build(model: Path, text: Path, workers: int, sender: Connection) -> None:
    torch.set_num_threads(1)
    seen: list[tuple[float, int]] = []

    def on_progress(p: Progress) -> None:
        if p.phase == "encode" and p.tokens and (not seen or p.tokens != seen[-1][1]):
            seen.append((time.perf_counter(), p.tokens))

    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        if workers:
            from knnlm.cluster.build import Plan, Workers
            from knnlm.cluster.build import build as build_on_cluster
            from knnlm.cluster.worker import ModelSource

            plan = Plan(ModelSource(str(model), "cpu", "auto", "ffn_input"), part_entries=PART_ENTRIES, index="flat")
            among = Workers("local", workers, 1, processors=max(workers, 2))
            build_on_cluster([str(text)], Catalog(Path(folder)), "bench", plan, among, on_progress=on_progress)
        else:
            lm = LanguageModel.load(str(model), device="cpu")
            catalog = Catalog(Path(folder))
            build(read_documents([text]), lm, catalog, "bench", part_entries=PART_ENTRIES, on_progress=on_progress)
    sender.send((_rate(seen), peak_bytes()))
    sender.close()


def _rate(seen: Iterable[tuple[float, int]]) -> float:
    """Tokens per second between the first and the last of (second, tokens so far)."""
    (begun, first), *_, (ended, last) = seen
    return (last - first) / (ended - begun)


if __name__ == "__main__":
    main()
