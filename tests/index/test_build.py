import threading
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import knnlm.index.contract
from knnlm.datastore.files import locked
from knnlm.datastore.manifest import IndexRecord, Manifest
from knnlm.datastore.updates.revise import with_index
from knnlm.errors import Conflict, DatastoreCorrupt, DatastoreError, InvalidRequest
from knnlm.index.build import build_index, index_remark, remove_index, suited
from knnlm.index.contract import sample_rows
from knnlm.index.ivf import default_nprobe, visited
from knnlm.index.searcher import Searcher
from knnlm.index.table import family
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from tests.index.helpers import brute_force, clustered, datastore

KEYS = clustered(1000, 8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return datastore(tmp_path, KEYS)


def index_files(path: Path) -> list[str]:
    return sorted(f.name for f in path.iterdir() if "index" in f.name)


def test_auto_takes_what_is_chosen(path: Path) -> None:
    assert build_index(path) == "flat"
    assert Manifest.load(path).index == IndexRecord(recipe="flat")


def test_new_index_replaces_the_former_file(path: Path) -> None:
    build_index(path, "ivf4")
    first = index_files(path)
    build_index(path, "ivf4,sq8")
    second = index_files(path)
    assert len(first) == len(second) == 1
    assert first != second
    manifest = Manifest.load(path)
    assert [manifest.index.file] == second
    assert set(manifest.index.parameters) == {"nprobe", "overfetch"}
    build_index(path, "flat")
    assert index_files(path) == []
    assert Manifest.load(path).files.keys() == {f.name for f in path.iterdir()} - {"manifest.json"}


def test_opened_index_survives_its_replacement(path: Path) -> None:
    build_index(path, "ivf4")
    searcher = Searcher.open(path)
    request = SearchRequest("toy", KEYS[:5], SearchOptions(k=10))
    before = searcher.search(request).neighbors
    build_index(path, "ivf8,sq8")
    after = searcher.search(request).neighbors
    np.testing.assert_array_equal(before.distances, after.distances)


def test_interrupted_indexing_leaves_the_version_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_index(path, "ivf4")
    before = Manifest.load(path)

    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("knnlm.index.build.with_index", killed)
        with pytest.raises(KeyboardInterrupt):
            build_index(path, "ivf8")
    with pytest.raises(KeyboardInterrupt):
        build_index(path, "ivf8", on_progress=killed)
    assert Manifest.load(path) == before
    assert index_files(path) == [before.index.file]
    Searcher.open(path).search(SearchRequest("toy", KEYS[:5], SearchOptions(k=10)))


def test_what_a_killed_indexing_left_is_removed_by_the_next(path: Path) -> None:
    for name in (".index.building", "index.0123456789abcdef.faiss"):
        (path / name).write_bytes(b"half")
    build_index(path, "ivf8")
    assert index_files(path) == [Manifest.load(path).index.file]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("ivf4,pq3", "pq3 cuts a key into 3 equal parts, 8 dimensions cannot be"),
        ("ivf4000,pq3", "pq3 cuts a key into 3 equal parts"),
        ("pca9,sq8", "pca cannot make 9 dimensions of 8"),
        ("opq3,sq8", "opq3 cuts a key into 3 equal parts"),
        ("faiss:nonsense", "FAISS says: could not parse index string nonsense"),
        ("faiss:IVF4,PQ3", "FAISS says: .*multiple of the number of subquantizers"),
        ("faiss:IVF2000,Flat", r"FAISS cannot build faiss:IVF2000,Flat of 1000 keys: 'nx"),
        ("tree", "families: flat, ivf"),
    ],
)
def test_recipe_that_does_not_suit_is_refused(path: Path, recipe: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        build_index(path, recipe)
    assert index_files(path) == []


@pytest.mark.parametrize(
    ("entries", "recipe", "smaller"),
    [
        (255, "ivf1,pq4", "flat"),
        (1000, "ivf1001", "ivf25"),
        (1000, "pca4,ivf2000,sq8", "pca4,ivf25,sq8"),
        (300, "ivf1000,pq4x4fs", "ivf7,pq4x4fs"),
        (9, "pq4", "flat"),
        (7, "pca4,sq8", "flat"),
        (7, "pca4,ivf4,sq8", "flat"),
        (255, "opq4,hnsw8", "flat"),
        (0, "sq8", "flat"),
        (0, "hnsw8", "flat"),
        (0, "ivf1", "flat"),
    ],
)
def test_too_few_entries_for_a_recipe_give_a_smaller_one(
    tmp_path: Path, entries: int, recipe: str, smaller: str
) -> None:
    path = datastore(tmp_path, KEYS[:entries])
    choice = suited(path, recipe)
    assert choice.recipe == smaller
    assert f"{recipe} was asked for" in choice.reasons[0]
    assert build_index(path, recipe) == smaller


def test_several_indexes_answer_beside_each_other(path: Path) -> None:
    build_index(path, "ivf4,sq8")
    build_index(path, "ivf8", beside=True)
    build_index(path, "hnsw8", beside=True)
    assert [index.recipe for index in Manifest.load(path).indexes] == ["ivf4,sq8", "ivf8", "hnsw8"]
    assert len(index_files(path)) == 3
    for recipe in (None, "ivf8", "hnsw8", "flat"):
        searcher = Searcher.open(path, index=recipe)
        assert searcher.info(()).index == (recipe or "ivf4,sq8")
        assert searcher.info(()).indexes == ("ivf4,sq8", "ivf8", "hnsw8")
        assert (searcher.search(SearchRequest("toy", KEYS[:5], SearchOptions(k=1))).neighbors.distances == 0).all()
    with pytest.raises(InvalidRequest, match=r"has no index 'ivf9': it has flat, hnsw8, ivf4,sq8, ivf8"):
        Searcher.open(path, index="ivf9")


def test_building_beside_again_replaces_that_one(path: Path) -> None:
    build_index(path, "ivf4")
    build_index(path, "ivf8", beside=True)
    before = Manifest.load(path)
    build_index(path, "ivf8", beside=True, seed=1)
    after = Manifest.load(path)
    assert after.index == before.index
    assert [index.recipe for index in after.other_indexes] == ["ivf8"]
    assert after.other_indexes != before.other_indexes
    assert set(index_files(path)) == {after.index.file, after.other_indexes[0].file}


def test_one_file_of_two_recipes_stays_until_both_are_gone(path: Path) -> None:
    build_index(path, "ivf4")
    build_index(path, "ivf4,flat", beside=True)
    assert len(index_files(path)) == 1
    remove_index(path, "ivf4,flat")
    assert index_files(path) == [Manifest.load(path).index.file]
    Searcher.open(path)


def test_removed_index_is_gone_with_its_file(path: Path) -> None:
    build_index(path, "ivf4")
    build_index(path, "ivf8", beside=True)
    with pytest.raises(Conflict, match="ivf4 is the default index"):
        remove_index(path, "ivf4")
    with pytest.raises(InvalidRequest, match="has no index 'flat' to remove: it has ivf4, ivf8"):
        remove_index(path, "flat")
    remove_index(path, "ivf8")
    manifest = Manifest.load(path)
    assert manifest.other_indexes == ()
    assert index_files(path) == [manifest.index.file]
    assert manifest.files.keys() == {f.name for f in path.iterdir()} - {"manifest.json"}


def test_two_indexers_at_once_are_refused(path: Path) -> None:
    with locked(path / "keys.npy", wait=False, doing="x"), pytest.raises(Conflict, match="another process is indexing"):
        build_index(path, "ivf4")


def test_full_disk_is_an_error_and_the_version_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index: Any = faiss.write_index

    def full(index: Any, to: Any, *flags: int) -> None:
        if not isinstance(to, str):  # into memory
            write_index(index, to, *flags)
            return
        Path(to).write_bytes(b"half")
        raise RuntimeError("write error: No space left on device")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(DatastoreError, match=r"cannot write .*No space left"):
        build_index(path, "ivf4")
    assert Manifest.load(path).index.recipe == "flat"
    assert index_files(path) == []


def test_progress_reaches_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knnlm.index.contract, "CHUNK_BYTES", 8 * 4 * 300)
    seen: list[tuple[int, int]] = []
    build_index(path, "ivf4", on_progress=lambda *progress: seen.append(progress))
    assert seen == [(0, 1000), (300, 1000), (600, 1000), (900, 1000), (1000, 1000)]


def test_file_that_is_no_index_is_corrupt(path: Path) -> None:
    build_index(path, "ivf4")
    file = Manifest.load(path).index.file
    assert file is not None
    size = (path / file).stat().st_size
    (path / file).write_bytes(b"x" * size)
    with pytest.raises(DatastoreCorrupt, match=rf"{file} is not an index"):
        Searcher.open(path)


def test_index_of_other_keys_is_corrupt(path: Path, tmp_path: Path) -> None:
    other = datastore(tmp_path / "other", clustered(500, 8))
    build_index(other, "ivf4")
    record = Manifest.load(other)
    assert record.index.file is not None
    (path / record.index.file).write_bytes((other / record.index.file).read_bytes())
    with_index(path, record.index, {record.index.file: record.files[record.index.file]})
    with pytest.raises(DatastoreCorrupt, match=r"holds \(500, 8\) keys, expected \(1000, 8\)"):
        Searcher.open(path)


def test_index_of_a_later_program_is_refused(path: Path) -> None:
    with_index(path, IndexRecord(recipe="graph32"), {})
    with pytest.raises(DatastoreError, match=r"index that this program does not know: .*'graph32'"):
        Searcher.open(path)


@given(st.integers(0, 5000), st.integers(1, 5000), st.integers(0, 5))
def test_training_sample_is_spread_over_the_corpus(entries: int, size: int, seed: int) -> None:
    rows = sample_rows(entries, size, seed)
    assert len(rows) == min(size, entries)
    assert (np.diff(rows) > 0).all()
    if len(rows):
        assert rows[0] >= 0
        assert rows[-1] < entries
        assert np.diff(rows, prepend=-1, append=entries).max() <= 2 * -(-entries // len(rows))


@given(st.integers(1, 10**9), st.integers(1, 65536))
def test_default_nprobe_visits_enough(entries: int, nlist: int) -> None:
    sizes = np.full(nlist, -(-entries // nlist))
    nprobe = default_nprobe(sizes)
    assert 1 <= nprobe <= nlist
    assert nprobe * sizes[0] >= min(visited(int(sizes.sum())), nlist * sizes[0])


def test_searches_while_indexing(path: Path) -> None:
    searcher = Searcher.open(path)
    expected = searcher.search(SearchRequest("toy", KEYS[:5], SearchOptions(k=10))).neighbors.values
    indexing = threading.Thread(target=build_index, args=(path, "ivf8,sq8"))
    indexing.start()
    while indexing.is_alive():
        np.testing.assert_array_equal(
            searcher.search(SearchRequest("toy", KEYS[:5], SearchOptions(k=10))).neighbors.values, expected
        )
    indexing.join()


def test_nprobe_follows_the_lists_that_queries_visit() -> None:
    """One list of nine in ten entries, as many equal keys make it, must not say how long the others are."""
    even = default_nprobe(np.full(40_000, 50))
    assert default_nprobe(np.array([1_800_025, *[5] * 39_995])) > 9 * even


@pytest.mark.parametrize("share", [0.6, 0.9])
def test_many_equal_keys_do_not_take_the_recall_of_the_others(tmp_path: Path, share: float) -> None:
    keys = clustered(20_000, 16)
    keys[: int(share * 20_000)] = keys[0]
    path = datastore(tmp_path, keys)
    build_index(path, "ivf400,flat")
    queries = clustered(40, 16, seed=1)
    found = Searcher.open(path).search(SearchRequest("toy", queries, SearchOptions(k=256), ids=True)).neighbors
    distances, _ = brute_force(keys, queries, 256)
    assert (found.distances <= distances[:, -1:] * (1 + 1e-5)).mean() > 0.9
    remark = index_remark(path, "ivf400,flat")
    assert remark is not None
    assert f"one of 400 lists holds {share:.0%}" in remark


@pytest.mark.parametrize("recipe", ["ivf16,sq8", "flat", "faiss:IVF16,Flat"])
def test_an_ordinary_index_has_no_remark(tmp_path: Path, recipe: str) -> None:
    path = datastore(tmp_path, clustered(2000, 16))
    build_index(path, recipe)
    assert index_remark(path, recipe) is None


@pytest.mark.parametrize(
    "recipe",
    ["ivf16,sq8", "pcar8,ivf16,pq4x4fs+fp16", "hnsw8", pytest.param("opq4_8,pq4", marks=pytest.mark.slow), "flat"],
)
def test_parts_added_to_one_trained_index_find_together_what_one_index_finds(tmp_path: Path, recipe: str) -> None:
    keys, chosen = clustered(3000, 16), family(recipe)
    trained = chosen.train(keys[::2], 0)
    assert trained == chosen.train(keys[::2], 0)
    asked = SearchOptions(nprobe=4 if "ivf" in recipe else None)
    parts = []
    for number, (low, high) in enumerate([(0, 3000), (0, 1000), (1000, 3000)]):
        file = tmp_path / str(number)
        parameters = chosen.add(trained, keys[low:high], file, lambda *_: None)
        index = chosen.open(keys[low:high], file if chosen.has_file else None, parameters, resident=False)
        distances, ids = index.search(clustered(30, 16, seed=1), 20, asked)
        parts.append((distances, np.where(ids >= 0, ids + low, -1)))
    whole, *others = parts
    together = np.sort(np.concatenate([near for near, _ in others], axis=1), axis=1)[:, :20]
    if "hnsw" in recipe:  # a graph of all keys has other links than those of its parts
        assert (np.isclose(together, np.sort(whole[0], axis=1), rtol=1e-5)).mean() > 0.9
    else:
        np.testing.assert_allclose(together, np.sort(whole[0], axis=1), rtol=1e-5)
