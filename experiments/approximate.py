"""The paper's index beside exact search of the same keys: made once for the experiments that look at it."""

import math
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.lab import Lab, Sight
from knnlm.datastore.manifest import Manifest
from knnlm.evaluation.splits import Part
from knnlm.index.build import build_index
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.neighbors import Neighbors
from knnlm.options import SearchOptions

__all__ = ["found", "lists", "paper_index", "recall"]

ENTRIES_PER_LIST = 256  # the paper's 103 million entries in 4,096 lists would leave ours with two
CODE_DIMENSIONS = 16  # of the paper: 1,024 dimensions in 64 bytes
MIN_TRAINED = 10_000  # entries below which codes of 256 centroids cannot be learnt
BLOCK = 1024


def lists(entries: int) -> int:
    """A power of two."""
    return 1 << max(2, round(math.log2(entries / ENTRIES_PER_LIST)))


def paper_index(path: Path) -> str:
    """The recipe of an index like the paper's (inverted lists, product quantization), built where it is not there."""
    manifest = Manifest.load(path)
    entries, dim = manifest.base_entries, manifest.key_dim
    codes = f"pq{dim // CODE_DIMENSIONS}" if entries >= MIN_TRAINED and dim % CODE_DIMENSIONS == 0 else "sq4"
    recipe = f"ivf{lists(entries)},{codes}"
    if recipe not in {index.recipe for index in manifest.indexes}:
        build_index(path, recipe, beside=True)
    return recipe


def found(lab: Lab, sight: Sight, part: Part, options: SearchOptions) -> Neighbors:
    """What that index finds for the held-out tokens of a view; kept."""
    path = lab.store(sight.learner, sight.corpus)
    recipe = paper_index(path)
    asked = "-".join(f"{name}{value}" for name, value in sorted(options.asked().items()))

    def make() -> dict[str, npt.NDArray[np.generic]]:
        held = lab.held(sight.learner, sight.corpus, part)
        parts = []
        with closing(Searcher.open(path, index=recipe)) as searcher:
            for start in range(0, len(held.queries), BLOCK):
                request = SearchRequest(path.parent.name, held.queries[start : start + BLOCK], options, ids=True)
                parts.append(searcher.search(request).neighbors)
        ids = np.concatenate([p.ids for p in parts if p.ids is not None])
        return {
            "distances": np.concatenate([p.distances for p in parts]),
            "values": np.concatenate([p.values for p in parts]), "ids": ids,
        }  # fmt: skip

    name = sight.corpus.replace(" ", "-")
    a = lab.kept(f"approximate/{sight.learner.name}-{name}-{recipe.replace(',', '-')}-{asked}-{part}", make)
    return Neighbors(a["distances"], a["values"], a["ids"])  # type: ignore[arg-type]


def recall(near: Neighbors, exact: Neighbors) -> float:
    """The share of the exact neighbors that were found."""
    if near.ids is None or exact.ids is None:
        raise ValueError("recall needs ids")
    hits = [len(np.intersect1d(a, b)) for a, b in zip(near.ids, exact.ids, strict=True)]
    return float(np.mean(hits) / exact.ids.shape[1])
