import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.updates.revise import with_tuning
from knnlm.errors import DatastoreCorrupt, DatastoreMismatch, InvalidRequest, KnnlmError, UnknownDomain, UnknownVersion
from knnlm.index.build import build_index
from knnlm.index.searcher import Searcher
from knnlm.messages import PassagesRequest, SearchRequest
from knnlm.neighbors import Neighbors, merge
from knnlm.options import SearchOptions
from knnlm.testing import ToyLanguageModel, toy_datastore
from knnlm.tuning_records import Tuning
from tests.index.helpers import brute_force, clustered, datastore
from tests.searching import search

DIM = 16


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_datastore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def searcher(path: Path) -> Searcher:
    return Searcher.open(path)


def queries(n: int = 3, dtype: type = np.float32) -> npt.NDArray[np.floating]:
    array: npt.NDArray[np.floating] = clustered(n, DIM, seed=1).astype(dtype)
    return array


def test_answer_holds_what_was_asked_for(path: Path, searcher: Searcher) -> None:
    result = searcher.search(SearchRequest("toy", queries(), SearchOptions(k=5)))
    assert (result.domain, result.version) == ("toy", "v1")
    assert result.neighbors.distances.shape == (3, 5)
    assert result.neighbors.ids is None
    assert list(result.passages) == []
    assert set(result.timings) == {"search", "rescore"}
    full = searcher.search(
        SearchRequest("toy", queries(), SearchOptions(k=5), version="v1", ids=True, passages=2, passage_tokens=4)
    )
    assert full.neighbors.ids is not None
    values = np.load(path / "values.npy")
    np.testing.assert_array_equal(full.neighbors.values, values[full.neighbors.ids])
    assert [[p.entry for p in row] for row in full.passages] == full.neighbors.ids[:, :2].tolist()
    assert all(len(p.before) <= 4 and p.after[0] == values[p.entry] for row in full.passages for p in row)


def test_stored_context_finds_itself(path: Path, searcher: Searcher) -> None:
    keys = np.load(path / "keys.npy")[:50]
    result = searcher.search(SearchRequest("toy", keys, SearchOptions(k=3, rescore=True), ids=True)).neighbors
    np.testing.assert_array_equal(result.distances[:, 0], 0)
    assert result.ids is not None
    # equal keys are allowed: the text repeats itself
    np.testing.assert_array_equal(np.load(path / "keys.npy")[result.ids[:, 0]], keys)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_half_and_single_queries_equal_brute_force(path: Path, searcher: Searcher, dtype: type) -> None:
    asked = queries(20, dtype)
    distances, _ = brute_force(np.load(path / "keys.npy"), asked, 9)
    result = searcher.search(SearchRequest("toy", asked, SearchOptions(k=9))).neighbors
    np.testing.assert_allclose(result.distances, distances, rtol=1e-5, atol=1e-4)


def test_more_than_there_is_gives_all(searcher: Searcher) -> None:
    result = searcher.search(SearchRequest("toy", queries(), SearchOptions(k=100_000), ids=True)).neighbors
    assert result.values.shape == (3, 290)
    assert result.ids is not None
    assert [sorted(row) for row in result.ids.tolist()] == [list(range(290))] * 3


def test_no_queries_give_no_rows(searcher: Searcher) -> None:
    assert searcher.search(
        SearchRequest("toy", queries()[:0], SearchOptions(k=5), passages=1)
    ).neighbors.values.shape == (0, 5)


@pytest.mark.parametrize("rescoring", [None, True, False])
def test_empty_datastore_finds_nothing(tmp_path: Path, rescoring: bool | None) -> None:
    searcher = Searcher.open(datastore(tmp_path, np.empty((0, DIM), np.float32)))
    result = searcher.search(
        SearchRequest("toy", queries(), SearchOptions(k=5, rescore=rescoring), ids=True, passages=2)
    )
    assert result.neighbors.values.shape == (3, 0)
    assert not result.neighbors.present.any()
    assert list(result.passages) == [[], [], []]
    searcher.warm()


def test_domain_and_version_are_pinned(searcher: Searcher) -> None:
    with pytest.raises(UnknownDomain, match="'law', this is toy"):
        searcher.search(SearchRequest("law", queries(), SearchOptions(k=5)))
    with pytest.raises(UnknownVersion, match="answers from version v1, version 'v2' was asked for"):
        searcher.search(SearchRequest("toy", queries(), SearchOptions(k=5), version="v2"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (queries()[:, :7], r"shape \(n, 16\), got \(3, 7\)"),
        (queries()[0], r"shape \(n, 16\), got \(16,\)"),
        (queries(dtype=np.float64), "float32 or float16, got float64"),
        (np.where(np.arange(3)[:, None] == 1, np.nan, queries()).astype(np.float32), "query 1 is not finite"),
        (np.where(np.arange(3)[:, None] == 2, np.inf, queries()).astype(np.float16), "query 2 is not finite"),
    ],
)
def test_wrong_queries_are_refused(searcher: Searcher, asked: npt.NDArray[np.floating], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        searcher.search(SearchRequest("toy", asked, SearchOptions(k=5)))
    assert caught.value.param == "queries"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", 0),
        ("k", -1),
        ("nprobe", 4),
        ("ef_search", 4),
        ("overfetch", 0.5),
        ("passages", -1),
        ("passage_tokens", -1),
    ],
)
def test_wrong_parameters_are_refused_by_name(searcher: Searcher, name: str, value: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        searcher.search(search("toy", queries(), **{"k": 5, name: value}))  # type: ignore[arg-type]  # a float for all
    assert caught.value.param == name


def test_a_lookup_shows_what_the_search_would_have(searcher: Searcher) -> None:
    found = searcher.search(SearchRequest("toy", queries(), SearchOptions(k=5), ids=True, passages=5, passage_tokens=4))
    assert found.neighbors.ids is not None
    shown = searcher.passages(PassagesRequest("toy", "v1", found.neighbors.ids.ravel(), passage_tokens=4))
    assert repr(shown) == repr([passage for row in found.passages for passage in row])
    assert searcher.passages(PassagesRequest("toy", "v1", np.empty(0, np.int64))) == []


@pytest.mark.parametrize(
    ("fields", "expected", "param"),
    [
        ({"entries": np.array([3, 290])}, InvalidRequest, "entries"),
        ({"entries": np.array([-1])}, InvalidRequest, "entries"),
        ({"entries": np.array([np.iinfo(np.int64).min, np.iinfo(np.int64).max])}, InvalidRequest, "entries"),
        ({"entries": np.zeros((2, 2), np.int64)}, InvalidRequest, "entries"),
        ({"entries": np.zeros(2, np.int32)}, InvalidRequest, "entries"),
        ({"passage_tokens": -1}, InvalidRequest, "passage_tokens"),
        ({"version": "v2"}, UnknownVersion, "version"),
        ({"domain": "law"}, UnknownDomain, "domain"),
    ],
)
def test_wrong_lookups_are_refused_by_name(
    searcher: Searcher, fields: dict[str, Any], expected: type[KnnlmError], param: str
) -> None:
    with pytest.raises(expected) as caught:
        searcher.passages(dataclasses.replace(PassagesRequest("toy", "v1", np.array([0, 1])), **fields))
    assert caught.value.param == param


@pytest.mark.parametrize("overfetch", [0.5, float("nan"), float("inf")])
def test_overfetch_is_at_least_one(searcher: Searcher, overfetch: float) -> None:
    with pytest.raises(InvalidRequest, match="overfetch must be >= 1"):
        searcher.search(SearchRequest("toy", queries(), SearchOptions(k=5, rescore=True, overfetch=overfetch)))


def test_overfetch_without_rescoring_is_refused(searcher: Searcher) -> None:
    with pytest.raises(InvalidRequest, match="candidates for rescoring, which is off here"):
        searcher.search(SearchRequest("toy", queries(), SearchOptions(k=5, rescore=False, overfetch=2.0)))


def test_raw_distances_come_only_when_asked_for(tmp_path: Path) -> None:
    keys = clustered(500, DIM)
    path = datastore(tmp_path, keys)
    build_index(path, "ivf4,pq4x4fs")
    searcher, asked = Searcher.open(path), clustered(20, DIM, seed=2)

    def errors(rescoring: bool | None) -> npt.NDArray[np.float64]:
        found = searcher.search(SearchRequest("toy", asked, SearchOptions(k=20, rescore=rescoring), ids=True)).neighbors
        assert found.ids is not None
        true = np.square(asked[:, None].astype(np.float64) - keys[found.ids]).sum(axis=2)
        error: npt.NDArray[np.float64] = abs(found.distances - true) / true
        return error

    assert errors(None).max() < 1e-6
    assert errors(True).max() < 1e-6
    assert errors(False).mean() > 1e-2


def test_more_candidates_find_more(tmp_path: Path) -> None:
    keys, asked = clustered(2000, DIM), clustered(20, DIM, seed=2)
    path = datastore(tmp_path, keys)
    build_index(path, "pq2x4fs")
    searcher = Searcher.open(path)
    _, true = brute_force(keys, asked, 50)

    def hits(overfetch: float) -> int:
        found = searcher.search(
            SearchRequest("toy", asked, SearchOptions(k=50, overfetch=overfetch), ids=True)
        ).neighbors.ids
        assert found is not None
        return sum(len(set(f) & set(t)) for f, t in zip(found.tolist(), true.tolist(), strict=True))

    assert hits(1) < hits(4) < hits(40) == true.size


def test_nprobe_is_at_least_one_and_more_than_all_lists_is_all(tmp_path: Path) -> None:
    path = datastore(tmp_path, clustered(500, DIM))
    build_index(path, "ivf4")
    searcher = Searcher.open(path)
    with pytest.raises(InvalidRequest, match="nprobe must be >= 1, got 0"):
        searcher.search(SearchRequest("toy", queries(), SearchOptions(k=5, nprobe=0)))
    assert (
        searcher.search(SearchRequest("toy", queries(), SearchOptions(k=500, nprobe=10**6))).neighbors.values >= 0
    ).all()


def test_queries_far_beyond_float32_squares_still_answer(searcher: Searcher) -> None:
    asked = np.full((2, DIM), 3e38, np.float32)
    for rescoring in (True, False):
        result = searcher.search(SearchRequest("toy", asked, SearchOptions(k=5, rescore=rescoring))).neighbors
        assert np.isfinite(result.distances).all()


@pytest.mark.parametrize("rescoring", [True, False])
def test_entry_that_does_not_exist_is_never_looked_up(tmp_path: Path, rescoring: bool) -> None:
    """The right number of keys is not the right entries: contents are read by `knnlm verify` alone."""
    keys = clustered(500, DIM)
    path = datastore(tmp_path, keys)
    build_index(path, "ivf4")
    file = path / str(Manifest.load(path).index.file)
    index = faiss.read_index(str(file))
    index.reset()
    index.add_with_ids(keys, np.arange(500) + 100)
    faiss.write_index(index, str(file))
    searcher = Searcher.open(path)
    with pytest.raises(DatastoreCorrupt, match=r"found entry \d+ of 500"):
        searcher.search(SearchRequest("toy", keys[:5], SearchOptions(k=500, rescore=rescoring)))


def test_datastore_of_another_model_is_not_opened(path: Path) -> None:
    Searcher.open(path, expect=ToyLanguageModel().info)
    with pytest.raises(DatastoreMismatch):
        Searcher.open(path, expect=ToyLanguageModel(seed=1).info)


def test_info_says_what_is_served(tmp_path: Path) -> None:
    path = toy_datastore(tmp_path)
    tuning = Tuning(2.0, 0.25, 64, 20.0, 15.0, 100, 2)
    with_tuning(path, tuning)
    info = Searcher.open(path).info(Catalog(tmp_path).versions("toy"))
    assert (info.domain, info.version, info.versions, info.state) == ("toy", "v1", ("v1",), "ready")
    assert (info.entries, info.documents, info.key_dim, info.key_dtype) == (290, 4, 16, "float16")
    assert (info.index, info.tuning) == ("flat", tuning)
    assert info.weights_sha256 == ToyLanguageModel().info.weights_sha256


def test_threads_get_what_they_would_get_alone(tmp_path: Path) -> None:
    path = datastore(tmp_path, clustered(2000, DIM))
    build_index(path, "ivf16,sq8")
    searcher = Searcher.open(path)
    requests = [
        SearchRequest("toy", clustered(1 + i % 7, DIM, seed=i), SearchOptions(k=1 + i, nprobe=1 + i % 16), ids=True)
        for i in range(40)
    ]
    alone = [searcher.search(r).neighbors for r in requests]
    with ThreadPoolExecutor(4) as pool:
        together = [r.neighbors for r in pool.map(searcher.search, requests)]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.distances, other.distances)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 80), st.integers(0, 100))
def test_shards_merged_equal_the_whole(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], k: int, seed: int
) -> None:
    store = tmp_path_factory.mktemp("shards")
    # coarse numbers: many equal distances, whose order is then fixed by the ids
    keys = np.round(clustered(sum(sizes), 4, seed=seed))
    asked = np.round(clustered(5, 4, seed=seed + 1))

    def search(part: npt.NDArray[np.float32], version: str) -> Neighbors:
        searcher = Searcher.open(datastore(store, part, version=version))
        request = SearchRequest("toy", asked, SearchOptions(k=k, rescore=True, overfetch=100.0), ids=True)
        return searcher.search(request).neighbors

    whole = search(keys, "whole")
    parts = []
    for i, (lo, size) in enumerate(zip(np.cumsum([0, *sizes]), sizes, strict=False)):
        part = search(keys[lo : lo + size], f"part{i}")
        assert part.ids is not None
        parts.append(dataclasses.replace(part, ids=np.where(part.ids >= 0, part.ids + lo, -1)))
    merged = merge(parts, min(k, len(keys)))
    np.testing.assert_array_equal(merged.distances, whole.distances)
    np.testing.assert_array_equal(merged.ids, whole.ids)
