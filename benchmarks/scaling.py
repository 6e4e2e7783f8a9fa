"""What ten times as many keys cost: time per query of the default index, at n and at 10 n entries of one datastore.

    python -m benchmarks.scaling [--size 10 n] [--text PATH ...] [--datastore FOLDER]

The smaller datastore is every tenth entry of the larger one, with its keys in a file of its own. Both have the index
that `knnlm index` takes for large datastores, with the number of lists that suits each: a small one too,
although it would be searched exactly by default. Both take turns, at batch 64 and k = 1024.
"""

import re
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np

from benchmarks.data import FOLDER, Prepared, add_datastore_option, asked_for
from benchmarks.harness import arguments, figure, interleave, table
from knnlm.datastore.reader import Datastore
from knnlm.evaluation.index_work import ReportFolder
from knnlm.index.auto_recipe import auto_recipe
from knnlm.index.ivf import lists_for
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions

TIMES = 10
BATCH, K = 64, 1024
SECONDS, ROUNDS = 1.0, 7
LARGE = 10**6  # entries, of which the default index is of the kind that is measured


def main() -> None:
    parser = arguments(__doc__ or "")
    add_datastore_option(parser)
    options = parser.parse_args()
    prepared = asked_for(options)
    whole = Datastore.open(prepared.path)
    searchers = {}
    for name, datastore in (("10 n", whole), ("n", tenth(whole))):
        recipe = recipe_for(datastore.manifest.entries, datastore.manifest.key_dim)
        folder = work_folder(prepared, name)
        searchers[name] = (recipe, ReportFolder(folder, datastore, options.seed).opened(recipe))
    rates = interleave({n: program(prepared, searcher) for n, (_, searcher) in searchers.items()}, SECONDS, ROUNDS)
    table(
        ["entries", "index", "us per query", "spread"],
        [
            [f"{searcher.manifest.entries:,}", recipe, f"{1e6 / rates[name].median:,.1f}", f"{rates[name].spread:.0%}"]
            for name, (recipe, searcher) in searchers.items()
        ],
    )
    figure(
        f"time per query with {TIMES} times as many keys",
        rates["n"].over(rates["10 n"]),
        2.5,
        better="less",
        size=whole.manifest.entries,
        smaller=searchers["n"][1].manifest.entries,
        indexes=[recipe for recipe, _ in searchers.values()],
        batch=BATCH,
        k=K,
        microseconds={name: round(1e6 / rate.median, 2) for name, rate in rates.items()},
    )


def recipe_for(entries: int, dim: int) -> str:
    """The default recipe of large datastores, with lists for this one."""
    return re.sub(r"ivf\d+", f"ivf{lists_for(entries)}", auto_recipe(LARGE, dim).recipe)


def tenth(datastore: Datastore) -> Datastore:
    """Every tenth entry, mapped from a file as the whole is."""
    checksum = datastore.manifest.files["keys.npy"].sha256
    file = FOLDER / f"tenth-{checksum[:12]}.npy"
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        building = file.with_name(f".{file.name}")
        np.save(building, datastore.keys[::TIMES])
        building.replace(file)
    keys = np.load(file, mmap_mode="r", allow_pickle=False)
    manifest = datastore.manifest.model_copy(update={"entries": len(keys)})
    values = np.ascontiguousarray(datastore.values[::TIMES])
    return Datastore(datastore.path, manifest, keys, values, datastore.tokens)


def work_folder(prepared: Prepared, name: str) -> Path:
    folder = FOLDER / f"scaling-{prepared.entries}-{prepared.domain}" / name.replace(" ", "")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def program(prepared: Prepared, searcher: Searcher) -> Callable[[], int]:
    queries = prepared.queries
    starts = cycle(range(0, len(queries) - BATCH + 1, BATCH))

    def search() -> int:
        start = next(starts)
        searcher.search(SearchRequest(prepared.domain, queries[start : start + BATCH], SearchOptions(k=K)))
        return BATCH

    return search


if __name__ == "__main__":
    main()
