"""What a random rotation before codes of equal parts is for: keys whose dimensions vary unevenly, against brute
force."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.index.auto_recipe import auto_recipe
from knnlm.index.build import build_index
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from tests.index.helpers import brute_force, clustered, datastore

N, DIM, K = 4000, 64, 32
SPECTRA = {
    "three outlier dimensions": np.where(np.isin(np.arange(DIM), (5, 30, 63)), 20.0, 1.0),
    "variances that fall": 1 / np.arange(1.0, DIM + 1),
}


def recall(path: Path, recipe: str, keys: npt.NDArray[np.float32], queries: npt.NDArray[np.float32]) -> float:
    """Share of the true neighbors among the candidates that the codes alone choose."""
    build_index(path, recipe)
    options = SearchOptions(k=K, nprobe=16, rescore=False)
    found = Searcher.open(path).search(SearchRequest("toy", queries, options, ids=True)).neighbors.ids
    assert found is not None
    _, true = brute_force(keys, queries, K)
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, true, strict=True)]))


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_rotation_finds_more_where_variances_are_uneven(tmp_path: Path, spectrum: str) -> None:
    keys, queries = (clustered(n, DIM, seed) * SPECTRA[spectrum].astype(np.float32) for n, seed in ((N, 0), (50, 1)))
    path = datastore(tmp_path, keys)
    plain, turned = (recall(path, f"{front}{DIM},ivf16,pq{DIM // 2}x4fs", keys, queries) for front in ("pca", "pcar"))
    assert turned > plain + 0.15
    assert turned > 0.55


@pytest.mark.parametrize("dim", [32, 64, 256, 1024])
def test_codes_of_the_default_index_are_of_turned_keys(dim: int) -> None:
    assert auto_recipe(100_000, dim).recipe.startswith(f"pcar{dim if dim < 128 else dim // 2},")
