"""The default index beside the recipe of the paper in FAISS itself: queries/s at batch 64, k = 1024, and perplexity.

    python -m benchmarks.engine [--size N] [--text PATH ...] [--datastore FOLDER]

The paper's recipe (Khandelwal et al. 2020, arXiv 1911.00172): 4096 lists, 64 bytes of product quantisation, 32 probes,
distances as the codes give them. It is built and searched by faiss alone, with none of this project's code; trained
without the polysemous order of the codes, which takes minutes and changes nothing in such a search. With fewer than 39
entries for each of 4096 lists there are fewer lists; the line says how many. The default: what `knnlm index` takes by
itself, with all that a search of this project does, rescoring and the lookup of values included.

Both searches take turns in one process with the same threads, a quarter of a second each, many times: memory, which
other work on the machine slows for seconds, decides their speed. Exact search, for orientation, is timed after them.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from benchmarks.data import Prepared, add_datastore_option, asked_for
from benchmarks.harness import arguments, figure, interleave, table
from knnlm.datastore.reader import Datastore
from knnlm.evaluation.tuning import Observations, fit
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.neighbors import Neighbors
from knnlm.options import SearchOptions

LISTS, BYTES, PROBES = 4096, 64, 32
TRAINING_KEYS_PER_LIST, SAMPLED_PER_LIST = 39, 64  # FAISS warns below the first
BATCH, K = 64, 1024
ROUND_SECONDS, ROUNDS = 0.25, 41
EXACT_SECONDS, EXACT_ROUNDS = 1.0, 3

Search = Callable[[npt.NDArray[np.float32]], Neighbors]


def main() -> None:
    parser = arguments(__doc__ or "")
    add_datastore_option(parser)
    options = parser.parse_args()
    prepared = asked_for(options)
    datastore = Datastore.open(prepared.path)
    lists = min(LISTS, max(1, prepared.entries // TRAINING_KEYS_PER_LIST))
    searcher = Searcher.open(prepared.path)
    searcher.warm()
    searches: dict[str, Search] = {
        "default": lambda queries: (
            searcher.search(SearchRequest(prepared.domain, queries, SearchOptions(k=K))).neighbors
        ),
        "paper": faiss_search(paper_index(datastore.keys, lists, options.seed), datastore.values, PROBES),
        "exact": faiss_search(exact_index(datastore.keys), datastore.values, None),
    }
    codes = code_bytes(datastore.keys.shape[1])
    names = {
        "default": f"default: {searcher.manifest.index.recipe}",
        "paper": f"paper's recipe in FAISS: IVF{lists},PQ{codes}, {min(PROBES, lists)} probes",
        "exact": "exact search in FAISS",
    }
    programs = {name: timed(search, prepared.queries) for name, search in searches.items()}
    exact = {"exact": programs.pop("exact")}
    rates = interleave(programs, ROUND_SECONDS, ROUNDS) | interleave(exact, EXACT_SECONDS, EXACT_ROUNDS)
    perplexities = {name: perplexity(prepared, search) for name, search in searches.items()}
    table(
        ["index", "queries/s", "spread", "perplexity"],
        [
            [names[name], f"{rates[name].median:,.0f}", f"{rates[name].spread:.0%}", f"{perplexities[name]:.4f}"]
            for name in searches
        ],
    )
    if lists < LISTS:
        print(f"{prepared.entries:,} entries are too few to train {LISTS} lists: the paper's recipe has {lists} here")
    extra: dict[str, Any] = {  # Any: JSON
        "size": prepared.entries,
        "index": searcher.manifest.index.recipe,
        "lists": lists,
        "batch": BATCH,
        "k": K,
        "queries_per_second": {name: round(rate.median, 1) for name, rate in rates.items()},
        "perplexity": {name: round(value, 4) for name, value in perplexities.items()},
    }
    figure("default index / paper's recipe in FAISS: queries/s", rates["default"].over(rates["paper"]), 3.0, **extra)
    figure(
        "default index / paper's recipe in FAISS: perplexity",
        perplexities["default"] / perplexities["paper"],
        1.0,
        better="less",
        **extra,
    )


def paper_index(keys: npt.NDArray[np.floating], lists: int, seed: int) -> faiss.Index:
    """As a user of FAISS would make it: trained on a sample, everything added."""
    index = faiss.index_factory(keys.shape[1], f"IVF{lists},PQ{code_bytes(keys.shape[1])}np")
    size = min(len(keys), max(SAMPLED_PER_LIST * lists, 1 << 16))
    rows = np.sort(np.random.default_rng(seed).choice(len(keys), size, replace=False))
    index.train(keys[rows].astype(np.float32))
    _add(index, keys)
    return index


def code_bytes(dim: int) -> int:
    """BYTES, or the largest number below it that cuts a key into equal parts."""
    return max(m for m in range(1, BYTES + 1) if dim % m == 0)


def exact_index(keys: npt.NDArray[np.floating]) -> faiss.Index:
    index = faiss.IndexFlatL2(keys.shape[1])
    _add(index, keys)
    return index


def faiss_search(index: Any, values: npt.NDArray[np.int32], nprobe: int | None) -> Search:
    """FAISS's own search, then the values of what it found. index: faiss has no types for what it loads."""
    settings = None
    if nprobe is not None:
        settings = faiss.SearchParametersIVF()
        settings.nprobe = min(nprobe, index.nlist)
    stored = np.array(values)

    def search(queries: npt.NDArray[np.float32]) -> Neighbors:
        distances, ids = index.search(queries, min(K, index.ntotal), params=settings)
        return Neighbors(distances, np.where(ids >= 0, stored[ids], -1).astype(np.int32))

    return search


def timed(search: Search, queries: npt.NDArray[np.float32]) -> Callable[[], int]:
    """A program for `interleave`: one batch after another, all queries in turn."""
    starts = cycle(range(0, max(1, len(queries) - BATCH + 1), BATCH))

    def program() -> int:
        start = next(starts)
        return len(search(queries[start : start + BATCH]).values)

    return program


def perplexity(prepared: Prepared, search: Search) -> float:
    """At the temperature and lambda that are best for these neighbors."""
    parts = [search(prepared.queries[i : i + BATCH]) for i in range(0, len(prepared.queries), BATCH)]
    found = Neighbors(np.concatenate([p.distances for p in parts]), np.concatenate([p.values for p in parts]))
    observed = Observations(prepared.lm_log_probs, prepared.targets, found, len(prepared.documents))
    return fit(observed).tuning.knn_perplexity


def _add(index: faiss.Index, keys: npt.NDArray[np.floating]) -> None:
    for start in range(0, len(keys), 1 << 16):
        index.add(keys[start : start + (1 << 16)].astype(np.float32))


if __name__ == "__main__":
    main()
