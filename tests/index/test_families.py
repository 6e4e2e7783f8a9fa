"""What every row of the table promises, against brute force. A new family is tested by adding a recipe here."""

from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.manifest import Manifest
from knnlm.datastore.verify import verify
from knnlm.errors import InvalidRequest
from knnlm.index.build import build_index
from knnlm.index.contract import Family, SearchParameters
from knnlm.index.searcher import Searcher
from knnlm.index.table import FAMILIES, family
from knnlm.messages import SearchRequest
from tests.index.helpers import brute_force, clustered, datastore

N, DIM, K = 3000, 16, 20
# recipe: the least share of the true neighbors that must be found with the defaults
RECIPES = {"flat": 1.0, "ivf8": 0.99, "ivf8,flat": 0.99, "ivf8,fp16": 0.99, "ivf8,sq8": 0.98, "ivf8,pq8": 0.9}
KEYS = clustered(N, DIM)
QUERIES = clustered(40, DIM)[:40] + np.float32(0.1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module", params=RECIPES)
def path(request: pytest.FixtureRequest, store: Path) -> Path:
    """One version per recipe, indexed."""
    version = "v-" + request.param.replace(",", "-")
    path = datastore(store, KEYS, version=version)
    assert build_index(path, request.param) == request.param
    return path


def recall(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.mean([len(set(f) & set(t)) / len(t) for f, t in zip(found.tolist(), true.tolist(), strict=True)]))


def test_every_family_resolves_and_has_a_recipe_here() -> None:
    for name in FAMILIES:
        recipe = next(r for r in RECIPES if r.startswith(name))
        assert isinstance(family(recipe), Family)


@pytest.mark.parametrize("recipe", ["", "tree", "IVF8", "1", "auto"])
def test_unknown_family_lists_those_known(recipe: str) -> None:
    with pytest.raises(InvalidRequest, match="families: flat, ivf"):
        family(recipe)


@pytest.mark.parametrize(
    "recipe",
    [
        "flat,sq8",
        "flat8",
        "ivf",
        "ivf0",
        "ivf8,",
        "ivf8,sq4",
        "ivf8,pq",
        "ivf8,pq0",
        "ivf99999999",
        "ivf8,sq8,x",
        "ivf8\n",
    ],
)
def test_malformed_recipe_is_refused(recipe: str) -> None:
    with pytest.raises(InvalidRequest, match="is not known"):
        family(recipe)


def test_neighbors_are_near_enough_to_brute_force(path: Path) -> None:
    searcher = Searcher.open(path)
    result = searcher.search(SearchRequest("toy", QUERIES, K, ids=True)).neighbors
    assert result.ids is not None
    _, true = brute_force(KEYS, QUERIES, K)
    assert recall(result.ids, true) >= RECIPES[Manifest.load(path).index.recipe]


def test_distances_are_true_by_default(path: Path) -> None:
    result = Searcher.open(path).search(SearchRequest("toy", QUERIES, K, ids=True)).neighbors
    assert result.ids is not None
    expected = np.square(QUERIES[:, None].astype(np.float64) - KEYS[result.ids]).sum(axis=2)
    # float32 sums of 16 squares; the flat index expands |q - x|^2, of norms about 160
    np.testing.assert_allclose(result.distances, expected, rtol=1e-5, atol=1e-4)
    assert (np.diff(result.distances, axis=1) >= 0).all()
    assert result.distances.dtype == np.float32


def test_everything_searched_and_rescored_equals_brute_force(path: Path) -> None:
    searcher = Searcher.open(path)
    lists = {"nprobe": 8} if "ivf" in path.name else {}
    request = SearchRequest("toy", QUERIES, K, rescore=True, overfetch=float(N) / K, ids=True, **lists)  # type: ignore[arg-type]
    result = searcher.search(request).neighbors
    distances, ids = brute_force(KEYS, QUERIES, K)
    np.testing.assert_array_equal(result.ids, ids)
    np.testing.assert_allclose(result.distances, distances, rtol=1e-6)


def test_opened_twice_it_answers_equally(path: Path) -> None:
    request = SearchRequest("toy", QUERIES, K, ids=True)
    first, second = (Searcher.open(path).search(request).neighbors for _ in range(2))
    np.testing.assert_array_equal(first.distances, second.distances)
    np.testing.assert_array_equal(first.ids, second.ids)


def test_built_twice_with_one_seed_it_is_equal(path: Path, tmp_path: Path) -> None:
    before = Manifest.load(path)
    build_index(path, before.index.recipe)
    assert Manifest.load(path) == before


def test_rescored_answer_does_not_depend_on_the_batch(path: Path) -> None:
    searcher = Searcher.open(path)
    together = searcher.search(SearchRequest("toy", QUERIES, K, rescore=True, ids=True)).neighbors
    for i in range(len(QUERIES)):
        alone = searcher.search(SearchRequest("toy", QUERIES[i : i + 1], K, rescore=True, ids=True)).neighbors
        np.testing.assert_array_equal(alone.distances[0], together.distances[i])
        np.testing.assert_array_equal(alone.ids if alone.ids is None else alone.ids[0], together.ids[i])  # type: ignore[index]


def test_search_with_padding_says_so(path: Path) -> None:
    """k far over what is found: FAISS gives id -1, which must never be looked up."""
    searcher = Searcher.open(path)
    lists = {"nprobe": 1} if "ivf" in path.name else {}
    result = searcher.search(SearchRequest("toy", QUERIES[:4], N, ids=True, passages=N, passage_tokens=1, **lists))  # type: ignore[arg-type]
    neighbors = result.neighbors
    assert neighbors.ids is not None
    missing = neighbors.ids < 0
    assert missing.any() == ("ivf" in path.name)
    np.testing.assert_array_equal(neighbors.values < 0, missing)
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()  # padding last
    assert (neighbors.distances[missing] == np.finfo(np.float32).max).all()
    assert [len(p) for p in result.passages] == (~missing).sum(axis=1).tolist()


def test_verify_covers_the_index(path: Path) -> None:
    assert [c for c in verify(path) if c.problem is not None] == []
    file = Manifest.load(path).index.file
    if file is None:
        return
    data = (path / file).read_bytes()
    (path / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert [c.name for c in verify(path) if c.problem is not None] == [file]
    (path / file).write_bytes(data)


def test_memory_is_at_least_the_codes(path: Path) -> None:
    searcher = Searcher.open(path)
    per_key = {"flat": 64, "fp16": 32, "sq8": 16, "pq8": 8}
    codec = Manifest.load(path).index.recipe.rpartition(",")[2]
    assert searcher.memory_bytes >= N * per_key.get(codec, 64)
    tables = 4 * 8 * 8 * 256 if codec == "pq8" else 0  # lists, bytes of a code, centroids
    assert searcher.memory_bytes <= N * (per_key.get(codec, 64) + 8) + tables + 40_000
    searcher.warm()
    searcher.close()


def test_parameters_of_one_search_do_not_stay(path: Path) -> None:
    if "ivf" not in path.name:
        return
    searcher = Searcher.open(path)
    before = searcher.search(SearchRequest("toy", QUERIES, K, ids=True)).neighbors
    narrow = searcher.search(SearchRequest("toy", QUERIES, N, nprobe=1, ids=True)).neighbors
    after = searcher.search(SearchRequest("toy", QUERIES, K, ids=True)).neighbors
    assert (narrow.values < 0).any()
    np.testing.assert_array_equal(before.ids, after.ids)


def test_index_alone_promises_shapes(path: Path) -> None:
    manifest = Manifest.load(path)
    file = None if manifest.index.file is None else path / manifest.index.file
    index = family(manifest.index.recipe).open(KEYS, file, manifest.index.parameters)
    distances, ids = index.search(QUERIES, SearchParameters(7))
    assert distances.shape == ids.shape == (len(QUERIES), 7)
    assert (distances.dtype.name, ids.dtype.name) == ("float32", "int64")
