import threading
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import knnlm.index.contract
from knnlm.datastore.files import locked
from knnlm.datastore.manifest import IndexRecord, Manifest, with_index
from knnlm.errors import Conflict, DatastoreCorrupt, DatastoreError, InvalidRequest
from knnlm.index.build import build_index, choose
from knnlm.index.ivf import Ivf, default_nprobe, sample_rows
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from tests.index.helpers import clustered, datastore

KEYS = clustered(1000, 8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return datastore(tmp_path, KEYS)


def index_files(path: Path) -> list[str]:
    return sorted(f.name for f in path.iterdir() if "index" in f.name)


@pytest.mark.parametrize("entries", [0, 1, 49_999])
def test_few_entries_are_searched_exactly(entries: int) -> None:
    recipe, reason = choose(entries, 64)
    assert recipe == "flat"
    assert str(entries) in reason


@pytest.mark.parametrize("entries", [50_000, 10**6, 10**8, 10**10])
def test_many_entries_get_lists_that_can_be_trained(entries: int) -> None:
    recipe, reason = choose(entries, 768)
    lists = int(recipe.removeprefix("ivf").removesuffix(",sq8"))
    assert 256 <= lists <= min(entries // 40, 65536)
    assert Ivf.parse(recipe).refusal(entries, 768) is None
    assert str(lists) in reason


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
    request = SearchRequest("toy", KEYS[:5], 10)
    before = searcher.search(request).neighbors
    build_index(path, "ivf8,sq8")
    after = searcher.search(request).neighbors
    np.testing.assert_array_equal(before.distances, after.distances)


def test_interrupted_indexing_leaves_the_version_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_index(path, "ivf4")
    before = Manifest.load(path)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("knnlm.index.build.with_index", killed)
        with pytest.raises(KeyboardInterrupt):
            build_index(path, "ivf8")
    with pytest.raises(KeyboardInterrupt):
        build_index(path, "ivf8", on_progress=killed)
    assert Manifest.load(path) == before
    Searcher.open(path).search(SearchRequest("toy", KEYS[:5], 10))
    build_index(path, "ivf8")
    assert len(index_files(path)) == 1


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("ivf1001", "1001 lists need at least as many entries, there are 1000"),
        ("ivf4,pq3", "pq3 cuts a key into 3 equal parts, 8 dimensions cannot be"),
        ("tree", "families: flat, ivf"),
    ],
)
def test_recipe_that_does_not_suit_is_refused(path: Path, recipe: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        build_index(path, recipe)
    assert index_files(path) == []


def test_product_quantizer_needs_entries(tmp_path: Path) -> None:
    path = datastore(tmp_path, KEYS[:255])
    with pytest.raises(InvalidRequest, match="pq4 needs at least 256 entries"):
        build_index(path, "ivf1,pq4")


def test_two_indexers_at_once_are_refused(path: Path) -> None:
    with locked(path / "keys.npy", wait=False, doing="x"), pytest.raises(Conflict, match="another process is indexing"):
        build_index(path, "ivf4")


def test_full_disk_is_an_error_and_the_version_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise RuntimeError("write error: No space left on device")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(DatastoreError, match=r"cannot write .*No space left"):
        build_index(path, "ivf4")
    assert Manifest.load(path).index.recipe == "flat"


def test_progress_reaches_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knnlm.index.contract, "CHUNK_BYTES", 8 * 4 * 300)
    seen: list[tuple[int, int]] = []
    build_index(path, "ivf4", on_progress=lambda *progress: seen.append(progress))
    assert seen == [(300, 1000), (600, 1000), (900, 1000), (1000, 1000)]


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
    with pytest.raises(DatastoreCorrupt, match=r"of \(500, 8\) keys, expected IndexIVF of \(1000, 8\)"):
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
    nprobe = default_nprobe(entries, nlist)
    assert 1 <= nprobe <= nlist
    assert nprobe == nlist or (nprobe * 64 >= nlist and nprobe * entries / nlist >= 16 * 1024)


def test_searches_while_indexing(path: Path) -> None:
    searcher = Searcher.open(path)
    expected = searcher.search(SearchRequest("toy", KEYS[:5], 10)).neighbors.values
    indexing = threading.Thread(target=build_index, args=(path, "ivf8,sq8"))
    indexing.start()
    while indexing.is_alive():
        np.testing.assert_array_equal(searcher.search(SearchRequest("toy", KEYS[:5], 10)).neighbors.values, expected)
    indexing.join()
