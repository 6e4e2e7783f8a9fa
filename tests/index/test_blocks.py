"""Searches in blocks of rows answer what a search of all rows at once does, and refuse more candidates than allowed."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.errors import TooLarge
from knnlm.index import exclusion, searcher
from knnlm.index.build import build_index
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.neighbors import Neighbors
from knnlm.options import SearchOptions
from knnlm.testing import toy_datastore
from tests.index.helpers import clustered, datastore

DIM = 16
RECIPES = ["flat", "ivf16,flat", "ivf16,sq8", "pca8,ivf16,pq4x4fs+fp16", "hnsw8"]
QUERIES = clustered(30, DIM, seed=1)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("excluding", [False, True])
def test_blocks_of_rows_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, excluding: bool
) -> None:
    path = datastore(tmp_path, clustered(1000, DIM))
    build_index(path, recipe)
    entries = np.arange(30, dtype=np.int64) if excluding else None
    request = SearchRequest("toy", QUERIES, SearchOptions(k=50), ids=True, exclude_entries=entries)
    opened = Searcher.open(path)
    whole = opened.search(request).neighbors
    for block in (1, 7 * 64 * 60):  # a row at a time, and some rows
        monkeypatch.setattr(searcher, "BLOCK_BYTES", block)
        monkeypatch.setattr(exclusion, "BLOCK_CANDIDATES", block // 64)
        parts = opened.search(request).neighbors
        assert whole.ids is not None
        assert parts.ids is not None
        np.testing.assert_array_equal(parts.distances, whole.distances)
        np.testing.assert_array_equal(parts.values, whole.values)
        np.testing.assert_array_equal(parts.ids, whole.ids)


def search(opened: Searcher, queries: npt.NDArray[np.float32] = QUERIES, **options: Any) -> Neighbors:
    return opened.search(SearchRequest("toy", queries, SearchOptions(**options), ids=True)).neighbors


def test_overfetch_beyond_the_limit_is_refused_with_both_numbers(tmp_path: Path) -> None:
    opened = Searcher.open(datastore(tmp_path, clustered(1000, DIM)), max_candidates=500)
    assert search(opened, k=50, overfetch=10).values.shape == (30, 50)
    with pytest.raises(TooLarge, match="at most 500 candidates, got 550") as refused:
        search(opened, k=50, overfetch=11)
    assert refused.value.param == "overfetch"
    with pytest.raises(TooLarge) as refused:
        search(opened, k=501)
    assert refused.value.param == "k"


def test_exclusion_that_needs_more_candidates_than_allowed_is_refused(tmp_path: Path) -> None:
    path = toy_datastore(tmp_path, texts=["the cat sat on the mat. " * 30, "and the dog sat on the log. " * 2])
    opened = Searcher.open(path, max_candidates=400)
    keys = np.load(path / "keys.npy")[:4].astype(np.float32)
    with pytest.raises(TooLarge, match="at most 400") as refused:
        search(opened, keys, k=40, exclude_documents=("0",))
    assert refused.value.param == "exclude_documents"
    assert search(opened, keys, k=40).values.shape == (4, 40)


@pytest.mark.parametrize("nprobe", [17, 2**31 - 1])
def test_more_lists_than_there_are_means_all_of_them(tmp_path: Path, nprobe: int) -> None:
    path = datastore(tmp_path, clustered(1000, DIM))
    build_index(path, "ivf16,flat")
    opened = Searcher.open(path)
    found, all_of_them = search(opened, k=50, nprobe=nprobe), search(opened, k=50, nprobe=16)
    assert found.ids is not None
    assert all_of_them.ids is not None
    np.testing.assert_array_equal(found.ids, all_of_them.ids)
