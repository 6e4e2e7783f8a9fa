"""Recipes with +fp16: distances between keys as the pre-transform makes them, unless the stored keys are asked for."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.verify import verify
from knnlm.errors import InsufficientMemory, InvalidRequest
from knnlm.index.build import build_index
from knnlm.index.searcher import Searcher
from knnlm.index.table import family
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from tests.index.helpers import brute_force, clustered, datastore
from tests.searching import search

N, DIM, K = 1500, 32, 20
KEYS = clustered(N, DIM)
QUERIES = clustered(30, DIM)[:30] + np.float32(0.1)
RECIPES = ["pca16,ivf8,pq8x4fs+fp16", "pca16,ivf8,sq8+fp16", "opq4_16,hnsw16+fp16", "pca16,pq8x4fs+fp16"]


@pytest.fixture(scope="module", params=RECIPES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = datastore(tmp_path_factory.mktemp("store"), KEYS)
    assert build_index(path, request.param) == request.param
    return path


def reduced(path: Path, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """By FAISS's own pre-transform, in one matrix product."""
    index: Any = faiss.read_index(str(path / str(Manifest.load(path).index.file)))
    projected: npt.NDArray[np.float32] = index.chain.at(0).apply(vectors)
    return projected


def everything(**options: bool) -> SearchRequest:
    return search("toy", QUERIES, K, overfetch=N / K, ids=True, **options)


def test_distances_are_those_of_reduced_keys(path: Path) -> None:
    nprobe = 8 if "ivf" in Manifest.load(path).index.recipe else None
    request = SearchRequest("toy", QUERIES, SearchOptions(k=K, overfetch=N / K, nprobe=nprobe), ids=True)
    found = Searcher.open(path).search(request).neighbors
    halves = reduced(path, KEYS).astype(np.float16).astype(np.float32)
    distances, ids = brute_force(halves, reduced(path, QUERIES), K)
    assert found.ids is not None
    assert np.mean(found.ids == ids) > 0.97  # hnsw reaches most; the product above rounds otherwise
    same = found.ids == ids
    # a product of another number of rows rounds otherwise, and a key at the edge to the next float16
    np.testing.assert_allclose(found.distances[same], distances[same], rtol=2e-3)


def test_stored_keys_are_rescored_by_when_asked_for(path: Path) -> None:
    found = Searcher.open(path).search(everything(rescore=True)).neighbors
    assert found.ids is not None
    expected = np.square(QUERIES[:, None].astype(np.float64) - KEYS[found.ids]).sum(axis=2)
    np.testing.assert_allclose(found.distances, expected, rtol=1e-5)
    default = Searcher.open(path).search(everything()).neighbors
    assert (default.distances < found.distances).mean() > 0.9  # a projection shortens


def test_answer_does_not_depend_on_the_batch(path: Path) -> None:
    searcher = Searcher.open(path)
    together = searcher.search(SearchRequest("toy", QUERIES, SearchOptions(k=K), ids=True)).neighbors
    assert together.ids is not None
    for i in range(len(QUERIES)):
        alone = searcher.search(SearchRequest("toy", QUERIES[i : i + 1], SearchOptions(k=K), ids=True)).neighbors
        np.testing.assert_array_equal(alone.distances[0], together.distances[i])
        assert alone.ids is not None
        np.testing.assert_array_equal(alone.ids[0], together.ids[i])


def test_resident_answers_as_mapped_and_both_say_where_they_lie(path: Path) -> None:
    mapped, resident = Searcher.open(path), Searcher.open(path, resident=True)
    first, second = (
        s.search(SearchRequest("toy", QUERIES, SearchOptions(k=K), ids=True)).neighbors for s in (mapped, resident)
    )
    np.testing.assert_array_equal(first.distances, second.distances)
    np.testing.assert_array_equal(first.ids, second.ids)
    assert (mapped.memory.keys, resident.memory.keys) == ("mapped", "resident")
    assert mapped.memory.keys_bytes == resident.memory.keys_bytes == N * 16 * 2
    manifest = Manifest.load(path)
    size = manifest.files[str(manifest.index.file)].bytes
    assert mapped.memory.index_bytes >= size - N * 16 * 2


def test_mapped_rows_are_not_copied(path: Path) -> None:
    manifest = Manifest.load(path)
    file = path / str(manifest.index.file)
    index = family(manifest.index.recipe).open(KEYS, file, manifest.index.parameters, resident=False)
    assert index.reduced is not None
    whole = index._whole  # type: ignore[attr-defined]  # what FAISS holds is the point
    both = faiss.downcast_index(whole.index)
    assert not faiss.downcast_index(both.refine_index).codes.is_owned  # type: ignore[attr-defined]
    index.warm()


def test_memory_that_is_needed_is_less_than_the_file(path: Path) -> None:
    manifest = Manifest.load(path)
    file = path / str(manifest.index.file)
    chosen = family(manifest.index.recipe)
    keys = Datastore.open(path).keys
    mapped, resident = (chosen.resident_bytes(keys, file, resident=resident) for resident in (False, True))
    assert 0 < mapped <= resident - N * 16 * 2
    with pytest.raises(InsufficientMemory):
        Searcher.open(path, memory_limit=mapped - 1)
    Searcher.open(path, memory_limit=mapped)


def test_built_twice_it_is_equal_and_verified(path: Path) -> None:
    before = Manifest.load(path)
    build_index(path, before.index.recipe)
    assert Manifest.load(path).files == before.files
    assert [check for check in verify(path) if check.problem is not None] == []


@pytest.mark.parametrize("recipe", ["ivf8,sq8+fp16", "flat+fp16", "pca8+fp16", "pca8,ivf8,sq8+fp32", "hnsw8+fp16"])
def test_reduced_keys_need_a_front(recipe: str) -> None:
    with pytest.raises(InvalidRequest):
        family(recipe)
