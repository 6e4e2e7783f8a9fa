"""What every row of the table promises, against brute force. A new family is tested by adding a recipe here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from knnlm.datastore.manifest import IndexRecord, Manifest
from knnlm.datastore.verify import verify
from knnlm.errors import InvalidRequest
from knnlm.index.build import build_index
from knnlm.index.codecs import CODECS
from knnlm.index.contract import Family, Index, to_float32
from knnlm.index.ivf import IvfIndex
from knnlm.index.searcher import Searcher
from knnlm.index.table import FAMILIES, family
from knnlm.messages import SearchRequest
from knnlm.neighbors import Neighbors
from knnlm.options import SearchOptions
from tests.index.helpers import brute_force, clustered, datastore
from tests.searching import search

# 40 dimensions: no multiple of 16 or 32, so that every loop over them has a tail. So many queries that each is searched
# in a batch of another size than alone, by all threads.
N, DIM, K = 1200, 40, 20
# recipe: the least share of the true neighbors that must be found with the defaults; a model's keys are kinder
RECIPES = {
    "flat": 1.0,
    "ivf8": 0.99,
    "ivf8,flat": 0.99,
    "ivf8,fp16": 0.99,
    "ivf8,sq8": 0.98,
    "ivf8,sq4": 0.9,
    "ivf8,pq20": 0.9,
    "ivf8,pq20x4fs": 0.6,
    "ivf8,rabitq": 0.6,
    "ivf8,rabitqfs": 0.6,
    "hnsw16": 0.99,
    "hnsw16,sq8": 0.98,
    "hnsw16,pq20": 0.9,
    "fp16": 1.0,
    "sq8": 0.99,
    "sq4": 0.9,
    "pq20": 0.9,
    "pq20x4fs": 0.6,
    "rabitq": 0.6,
    "rabitqfs": 0.6,
    "pca30,ivf8,sq8": 0.6,
    "pca30,hnsw16": 0.6,
    "pcar30,ivf8,sq8": 0.6,
    "opq4_32,ivf8,pq16x4fs": 0.3,
    "faiss:IVF8_HNSW8,SQ8": 0.98,
    "faiss:HNSW16": 0.99,
    "faiss:IVF8,PQ20x4fsr": 0.6,
    "faiss:L2norm,IVF1,Flat": 0.9,
    "faiss:LSH": 0.2,
}
KEYS = clustered(N, DIM)
QUERIES = KEYS[:40] + np.float32(0.1)
HALVES = KEYS[:600].astype(np.float16).astype(np.float32)


@dataclass(frozen=True)
class Made:
    """One of the indexes of a version."""

    path: Path
    recipe: str

    @property
    def record(self) -> IndexRecord:
        return Manifest.load(self.path).index_of(self.recipe)

    @property
    def file(self) -> Path | None:
        return None if self.record.file is None else self.path / self.record.file

    def open(self, *, resident: bool = False) -> Searcher:
        return Searcher.open(self.path, index=self.recipe, resident=resident)


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datastore(tmp_path_factory.mktemp("store"), KEYS)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datastore(tmp_path_factory.mktemp("store"), HALVES, key_dtype="float16")


SLOW = {  # codecs of which another family, or another codec of the same kind, is tested always
    "ivf8,flat", "ivf8,fp16", "ivf8,sq4", "ivf8,pq20", "ivf8,rabitq", "hnsw16,sq8", "hnsw16,pq20", "sq4", "pq20x4fs",
    "rabitqfs", "pca30,hnsw16", "faiss:HNSW16", "opq4_32,ivf8,pq16x4fs",
}  # fmt: skip


@pytest.fixture(
    scope="module", params=[pytest.param(r, marks=[pytest.mark.slow] if r in SLOW else []) for r in RECIPES]
)
def made(request: pytest.FixtureRequest, singles: Path) -> Made:
    """All in one version, beside each other."""
    assert build_index(singles, request.param, beside=True) == request.param
    return Made(singles, request.param)


def recall(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.mean([len(set(f) & set(t)) / len(t) for f, t in zip(found.tolist(), true.tolist(), strict=True)]))


def knobs(searcher: Searcher, *, most: bool) -> dict[str, Any]:
    """Parameters with which an index searches everything it has, or as little as it can."""
    return dict.fromkeys(searcher._index.efforts, N if most else 1)


def find(searcher: Searcher, queries: npt.NDArray[np.floating], k: int = K, **options: Any) -> Neighbors:
    return searcher.search(search("toy", queries, k, ids=True, **options)).neighbors


def assert_same(one: Neighbors, other: Neighbors) -> None:
    np.testing.assert_array_equal(one.distances, other.distances)
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_array_equal(one.ids, other.ids)


def test_every_family_and_every_codec_has_a_recipe_here() -> None:
    for name in FAMILIES:
        recipe = next(r for r in RECIPES if r.startswith(name))
        assert isinstance(family(recipe), Family)
    for name in CODECS:
        assert any(r.rpartition(",")[2] == name.replace("<M>", "20") for r in RECIPES), name


def test_neighbors_are_near_enough_to_brute_force(made: Made) -> None:
    result = find(made.open(), QUERIES)
    assert result.ids is not None
    _, true = brute_force(KEYS, QUERIES, K)
    assert recall(result.ids, true) >= RECIPES[made.recipe]


def test_distances_are_true_by_default(made: Made) -> None:
    result = find(made.open(), QUERIES)
    assert result.ids is not None
    expected = np.square(QUERIES[:, None].astype(np.float64) - KEYS[result.ids]).sum(axis=2)
    np.testing.assert_allclose(result.distances, expected, rtol=1e-6)  # float32 sums of 40 squares
    assert (np.diff(result.distances, axis=1) >= 0).all()
    assert result.distances.dtype == np.float32


def assert_all_found(searcher: Searcher, keys: npt.NDArray[np.float32]) -> None:
    result = find(searcher, QUERIES, overfetch=float(N) / K, **knobs(searcher, most=True))
    distances, ids = brute_force(keys, QUERIES, K)
    assert result.ids is not None
    if "ef_search" in searcher._index.efforts:  # to a few keys no link of a graph leads
        assert recall(result.ids, ids) > 0.97
        return
    np.testing.assert_array_equal(result.ids, ids)
    np.testing.assert_allclose(result.distances, distances, rtol=1e-6)


def test_everything_searched_equals_brute_force(made: Made) -> None:
    assert_all_found(made.open(), KEYS)


@pytest.mark.parametrize("recipe", ["flat", "ivf8,sq8", "ivf8,pq20x4fs", "hnsw16", "rabitq", "pca30,ivf8,pq10x4fs"])
def test_keys_of_half_precision_too(halves: Path, recipe: str) -> None:
    assert build_index(halves, recipe) == recipe
    assert_all_found(Searcher.open(halves), HALVES)


def test_read_into_memory_it_answers_as_mapped(made: Made) -> None:
    mapped, resident = made.open(), made.open(resident=True)
    assert_same(find(mapped, QUERIES), find(resident, QUERIES))
    assert (resident.memory.index, resident.memory.keys) == ("resident", "resident")
    if not made.recipe.startswith("faiss:"):  # which hold anything, and are never mapped
        assert not lies_in_file(resident._index)


def test_opened_twice_it_answers_equally(made: Made) -> None:
    assert_same(*(find(made.open(), QUERIES) for _ in range(2)))


def test_built_twice_with_one_seed_it_is_equal(made: Made) -> None:
    before = made.record
    build_index(made.path, made.recipe, beside=True)
    assert made.record == before


def test_answer_does_not_depend_on_the_batch(made: Made) -> None:
    searcher = made.open()
    together = find(searcher, QUERIES)
    assert together.ids is not None
    for lo, hi in [*((i, i + 1) for i in range(8)), (8, 11), (11, 40)]:
        part = find(searcher, QUERIES[lo:hi])
        np.testing.assert_array_equal(part.distances, together.distances[lo:hi])
        np.testing.assert_array_equal(part.ids, together.ids[lo:hi])


def test_search_with_padding_says_so(made: Made) -> None:
    """k far over what is found: FAISS gives id -1, which must never be looked up."""
    searcher = made.open()
    options = SearchOptions(k=N + 5, **knobs(searcher, most=False))
    result = searcher.search(SearchRequest("toy", QUERIES[:4], options, ids=True, passages=N, passage_tokens=1))
    neighbors = result.neighbors
    assert neighbors.ids is not None
    assert neighbors.ids.shape == (4, N)
    missing = neighbors.ids < 0
    if searcher._index.efforts.get("nprobe", 0) > 1:  # one list of eight was visited
        assert missing.any(axis=1).all()
    elif "ef_search" not in searcher._index.efforts:
        assert not missing.any()
    np.testing.assert_array_equal(neighbors.values < 0, missing)
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()  # padding last
    assert (neighbors.distances[missing] == np.finfo(np.float32).max).all()
    for row in neighbors.ids:
        assert len(set(row[row >= 0])) == (row >= 0).sum()
    assert [len(p) for p in result.passages] == (~missing).sum(axis=1).tolist()


def test_verify_covers_the_index(made: Made) -> None:
    file = made.file
    assert (file is None) == (made.recipe == "flat")
    if file is None:
        pytest.skip("exact search has no file")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert [c.name for c in verify(made.path) if c.problem is not None] == [file.name]
    file.write_bytes(data)
    assert [c for c in verify(made.path) if c.problem is not None] == []


def test_an_index_says_whether_it_is_of_these_keys(made: Made) -> None:
    searcher = made.open()
    keys, rows = to_float32(searcher.datastore.keys), np.arange(0, N, 7)
    agreeing = searcher._index.made_of(keys[rows], rows)
    if agreeing is None:
        assert made.recipe == "flat" or made.recipe.startswith("faiss:") or made.recipe.endswith("fs")
        return
    assert agreeing.mean() > 0.95
    other = searcher._index.made_of(keys[::-1][rows], rows)
    assert other is not None
    assert other.mean() < 0.7


def bytes_per_key(recipe: str) -> float:
    """Of codes and ids alone."""
    codec = recipe.rpartition(",")[2] if not recipe.startswith(("ivf8", "hnsw16")) or "," in recipe else "flat"
    dim = {"pca30": 30, "pcar30": 30, "opq4_32": 32}.get(recipe.partition(",")[0], DIM)
    code = {"flat": 4 * dim, "fp16": 2 * dim, "sq8": dim, "sq4": dim / 2, "pq20": 20, "pq20x4fs": 10, "pq16x4fs": 8,
            "rabitq": dim / 8, "rabitqfs": dim / 8, "hnsw16": 4 * dim}[codec]  # fmt: skip
    return code + 8 * ("ivf" in recipe)


def test_memory_is_that_of_codes_and_not_much_more(made: Made) -> None:
    recipe, searcher = made.recipe, made.open()
    if not recipe.startswith("faiss:"):
        # factors of rabitq and links of a graph; then what does not grow with the keys: lists, centroids, matrices
        more = 16 * ("rabitq" in recipe) + (4 * 36 + 20) * ("hnsw" in recipe)
        tables = 4 * 8 * 20 * 256 * (recipe == "ivf8,pq20") + 4 * 256 * DIM * ("pq" in recipe) + 4 * DIM * DIM
        assert (
            N * bytes_per_key(recipe) <= searcher.memory_bytes <= N * (bytes_per_key(recipe) + more) + tables + 10_000
        )
    assert searcher.memory.index_bytes == searcher.memory_bytes
    searcher.warm()
    searcher.close()


def lies_in_file(index: Index) -> bool:
    """As FAISS itself sees its lists, codes and links."""
    inner: Any = index._index  # type: ignore[attr-defined]
    if isinstance(index, IvfIndex):
        return isinstance(faiss.downcast_InvertedLists(inner.invlists), faiss.OnDiskInvertedLists)
    holder: Any = faiss.downcast_index(inner.storage) if hasattr(inner, "storage") else inner
    arrays = [holder.codes, *([inner.hnsw.neighbors] if hasattr(inner, "hnsw") else [])]
    owned = {getattr(array, "is_owned", True) for array in arrays}  # a plain vector cannot be mapped
    assert len(owned) == 1
    return owned == {False}


def test_what_is_called_mapped_lies_in_the_file(made: Made) -> None:
    """And only what needs no memory is let in without any."""
    searcher = made.open()
    needed = family(made.recipe).resident_bytes(KEYS, made.file, resident=False)
    if "fs" in made.recipe or made.recipe.startswith(("flat", "faiss:")):
        assert searcher.memory.index == "resident"
        assert needed >= N * (4 * DIM if made.file is None else 4)
        return
    assert searcher.memory.index == "mapped"
    assert lies_in_file(searcher._index)
    assert needed < searcher.memory_bytes
    if isinstance(searcher._index, IvfIndex):
        centroids = 4 * 8 * searcher._index._index.d
        assert needed >= centroids + (4 * 8 * 20 * 256 if made.recipe == "ivf8,pq20" else 0)


def test_parameters_of_one_search_do_not_stay(made: Made) -> None:
    searcher = made.open()
    little = knobs(searcher, most=False)
    before = find(searcher, QUERIES)
    find(searcher, QUERIES, N, **little)
    assert_same(before, find(searcher, QUERIES))
    for name in {"nprobe", "ef_search"} - little.keys():
        with pytest.raises(InvalidRequest, match=f"so {name} means nothing to it"):
            find(searcher, QUERIES, **{name: 1})


@pytest.mark.parametrize("recipe", ["ivf8,flat", "pcar40,ivf8,flat", "faiss:IVF8_HNSW8,Flat"])
@pytest.mark.parametrize("nprobe", [1, 3])
def test_the_nearest_lists_are_visited_and_no_other(tmp_path: Path, recipe: str, nprobe: int) -> None:
    """Brute force over the keys of the nearest centroids, by the codes of no loss, is what is found."""
    path = datastore(tmp_path, KEYS)
    build_index(path, recipe)
    searcher = Searcher.open(path)
    index: Any = faiss.read_index(str(path / str(Manifest.load(path).index.file)))
    lists: Any = faiss.extract_index_ivf(index)
    centroids = lists.quantizer.reconstruct_n(0, 8)
    keys, queries = ((index.chain.at(0).apply(x) if ",ivf" in recipe else x) for x in (KEYS, QUERIES))
    _, list_of_key = brute_force(centroids, keys, 1)
    _, visited = brute_force(centroids, queries, nprobe)
    found = find(searcher, QUERIES, N, nprobe=nprobe)
    assert found.ids is not None
    for row, near in enumerate(visited):
        expected = np.flatnonzero(np.isin(list_of_key[:, 0], near))
        assert 0 < len(expected) < N
        assert set(found.ids[row][found.ids[row] >= 0]) == set(expected)


def test_entries_that_are_grouped_are_all_there_and_near_each_other(made: Made) -> None:
    searcher = made.open()
    grouped, keys = searcher.index.grouped(), np.array(searcher.datastore.keys, np.float64)
    if "ivf" in made.recipe:
        assert grouped is not None
    if grouped is None:
        return
    np.testing.assert_array_equal(np.sort(grouped), np.arange(len(keys)))
    steps = [np.square(np.diff(keys[order], axis=0)).sum(axis=1).mean() for order in (grouped, np.arange(len(keys)))]
    assert steps[0] < 0.8 * steps[1]


def test_parameters_of_a_search_do_something(made: Made) -> None:
    searcher = made.open()
    queries = np.random.default_rng(0).normal(0, 3, (40, DIM)).astype(np.float32)  # away from all clusters
    if "nprobe" in searcher._index.efforts:
        little, much = ((find(searcher, queries, N, nprobe=nprobe).values < 0).sum() for nprobe in (1, 8))
        assert little > much if searcher._index.efforts["nprobe"] > 1 else little == much
    if "ef_search" in searcher._index.efforts:
        # k is 1, so that k does not raise it
        near, far = (searcher._index.search(queries, 1, SearchOptions(ef_search=ef))[0] for ef in (N, 1))
        assert (near <= far).all()
        assert (near < far).any()


@pytest.mark.parametrize("rescoring", [None, False])
def test_distances_beyond_float32_are_the_farthest_there_are(made: Made, rescoring: bool | None) -> None:
    """Of opposite signs, so that sums of products are infinity less infinity."""
    queries = np.full((3, DIM), 3e38, np.float32)
    queries[1, ::2] *= -1
    result = find(made.open(), queries, rescore=rescoring)
    assert result.ids is not None
    assert np.isfinite(result.distances).all()
    assert (result.ids < N).all()
    assert (np.diff((result.ids < 0).astype(int), axis=1) >= 0).all()


def test_index_alone_promises_shapes(made: Made) -> None:
    index = family(made.recipe).open(KEYS, made.file, made.record.parameters, resident=False)
    distances, ids = index.search(QUERIES, 7)
    assert distances.shape == ids.shape == (len(QUERIES), 7)
    assert (distances.dtype.name, ids.dtype.name) == ("float32", "int64")
    assert index.overfetch >= 1


@pytest.mark.parametrize("recipe", ["flat", "ivf2", "ivf2,sq8", "ivf2,pq20x4fs", "rabitqfs", "hnsw16"])
def test_equal_keys_are_ordered_by_number(tmp_path: Path, recipe: str) -> None:
    """Which of them are kept is up to the index; their order, and that the batch does not matter, never is."""
    path = datastore(tmp_path, np.repeat(KEYS[:3], 100, axis=0))
    build_index(path, recipe)
    searcher = Searcher.open(path)
    result = find(searcher, KEYS[:3], 90)
    assert result.ids is not None
    tie = (np.diff(result.distances, axis=1) == 0) & (result.ids[:, 1:] >= 0)
    assert (np.diff(result.ids, axis=1)[tie] > 0).all()
    assert (result.distances[:, 0] == 0).all()
    alone = find(searcher, KEYS[1:2], 90)
    np.testing.assert_array_equal(alone.ids, result.ids[1:2])
