"""What the default index loses in perplexity to exact search, on each of several corpora and on outlier dimensions.

    python -m benchmarks.default_quality [--text CORPUS ...] [--text CORPUS ...] [--size N] [--queries N]

Each --text is a corpus of its own. Each search is taken at its own best temperature and lambda on the same held-out
tokens; beside the difference stands its standard error, from the differences of the tokens. Beside the default:
four times its lists, which `knnlm tune` may choose. The last line is of the first corpus with three dimensions of its
keys, and of its queries, made 20 times as large: a spectrum as large models have it.
"""

import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.data import Prepared, prepare
from benchmarks.engine import exact_index, faiss_search
from benchmarks.harness import SMALL, figure, table
from knnlm.datastore.reader import Datastore
from knnlm.domains import knn_evidence
from knnlm.evaluation.tuning import Observations, fit
from knnlm.index.auto_recipe import auto_recipe
from knnlm.index.contract import Index, Keys
from knnlm.index.requests import Candidates
from knnlm.index.rescore import partly_rescored
from knnlm.index.table import family
from knnlm.mixture import Component, mix
from knnlm.neighbors import Neighbors
from knnlm.options import SearchOptions

K, BATCH = 1024, 256
GOAL = 1.003  # times the perplexity of exact search
OUTLIERS, FACTOR = (7, 100, 200), 20.0

Float32 = npt.NDArray[np.float32]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, nargs="+", action="append", metavar="PATH",
        help="documents of one corpus (default: docstrings of packages)",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=SMALL, help=f"entries of each datastore (default {SMALL})")
    parser.add_argument("--queries", type=int, default=8192, help="held-out tokens of each (default 8192)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for number, text in enumerate(options.text or [[]]):
        prepared = prepare(options.size, text, queries=options.queries)
        datastore = Datastore.open(prepared.path)
        name = ", ".join(path.parent.name if path.stem == "docs" else path.stem for path in text) or "docstrings"
        compare(name, prepared, np.array(datastore.keys), prepared.queries, datastore.values, options.seed)
        if number == 0:
            scale = np.ones(datastore.keys.shape[1], np.float32)
            scale[list(OUTLIERS)] = FACTOR
            keys = (datastore.keys * scale).astype(np.float16)
            compare(f"{name}, outliers", prepared, keys, prepared.queries * scale, datastore.values, options.seed)


def compare(
    name: str, prepared: Prepared, keys: Keys, queries: Float32, values: npt.NDArray[np.int32], seed: int
) -> None:
    """Print the table and the figure of one corpus."""
    recipe = auto_recipe(*keys.shape).recipe
    chosen = family(recipe)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "index"
        parameters = chosen.build(keys, file, seed, lambda *_: None)
        index = chosen.open(keys, file if chosen.has_file else None, parameters, resident=True)
        found = {
            "default": neighbors(index, keys, queries, values),
            "4 x lists": neighbors(index, keys, queries, values, times=4),
        }
        index.close()
    search = faiss_search(exact_index(keys), values, None)
    parts = [search(queries[i : i + BATCH]) for i in range(0, len(queries), BATCH)]
    exact = log_probs(prepared, joined(parts))
    losses = {way: exact - log_probs(prepared, result) for way, result in found.items()}
    ratios = {way: float(np.exp(loss.mean())) for way, loss in losses.items()}
    errors = {way: float(loss.std() / np.sqrt(len(loss))) for way, loss in losses.items()}
    rows = [[way, f"{ratio - 1:+.2%}", f"{errors[way]:.2%}"] for way, ratio in ratios.items()]
    table([f"{name}: {recipe}", "over exact", "standard error"], rows)
    figure(
        f"default index / exact search: perplexity, {name}", ratios["default"], GOAL, better="less",
        size=len(keys), index=recipe, parameters=dict(parameters), tokens=len(queries),
        exact=round(float(np.exp(-exact.mean())), 4),
        ratios={way: round(ratio, 5) for way, ratio in ratios.items()}, standard_error=round(errors["default"], 5),
    )  # fmt: skip


def neighbors(
    index: Index, keys: Keys, queries: Float32, values: npt.NDArray[np.int32], *, times: int = 1
) -> Neighbors:
    """As a Searcher finds them, visiting `times` as many lists."""
    options = SearchOptions.of({name: times * own for name, own in index.efforts.items()})
    candidates = Candidates.of(K, options, index)
    parts = []
    for start in range(0, len(queries), BATCH):
        batch = np.ascontiguousarray(queries[start : start + BATCH])
        estimates, ids = index.search(batch, candidates.found, options)
        distances, ids = partly_rescored(keys, batch, estimates, ids, K, candidates.rescored)
        parts.append(Neighbors(distances, np.where(ids >= 0, values[ids], -1).astype(np.int32)))
    return joined(parts)


def joined(parts: list[Neighbors]) -> Neighbors:
    return Neighbors(np.concatenate([p.distances for p in parts]), np.concatenate([p.values for p in parts]))


def log_probs(prepared: Prepared, found: Neighbors) -> npt.NDArray[np.float64]:
    """(n,) of the targets, at the temperature and lambda that are best for these neighbors."""
    tuning = fit(Observations(prepared.lm_log_probs, prepared.targets, found, len(prepared.documents))).tuning
    evidence = knn_evidence(found, tuning.temperature, prepared.targets)
    weight = np.full(len(prepared.targets), tuning.lmbda)
    return mix(prepared.lm_log_probs, [Component("knn", evidence.of_targets, weight)])


if __name__ == "__main__":
    main()
