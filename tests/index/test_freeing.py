"""What is closed is given back: memory and maps; and it can be closed twice, but not used again."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from knnlm.errors import DatastoreError
from knnlm.index.build import build_index
from knnlm.index.freeing import drop_maps, drop_pages
from knnlm.index.searcher import Searcher
from knnlm.index.table import family
from knnlm.messages import Document, SearchRequest
from knnlm.options import SearchOptions
from knnlm.testing import ToyLanguageModel
from tests.grown import base, grow, some_documents
from tests.index.helpers import clustered, datastore

RECIPES = ["flat", "ivf8,sq8", "ivf8,pq8x4fs", "hnsw16,sq8", "sq8", "pq8", "rabitqfs", "pca16,ivf8,pq8x4fs+fp16",
           "opq4_16,hnsw16+fp16", "pca16,ivf8", "faiss:IVF8_HNSW8,PQ8x4fsr", "faiss:L2norm,IVF8,Flat"]  # fmt: skip
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells of memory on Linux alone")


def maps_of(path: Path) -> int:
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture(scope="module", params=RECIPES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = datastore(tmp_path_factory.mktemp("store"), clustered(600, 32))
    build_index(path, request.param)
    return path


@pytest.mark.parametrize("resident", [False, True])
def test_every_family_can_be_closed_twice_and_not_be_searched_again(path: Path, resident: bool) -> None:
    searcher = Searcher.open(path, resident=resident)
    index = searcher._index
    request = SearchRequest("toy", clustered(3, 32, seed=1), SearchOptions(k=5))
    searcher.search(request)
    searcher.warm()
    searcher.close()
    searcher.close()
    index.close()
    with pytest.raises(DatastoreError, match="was closed"):
        searcher.search(request)
    for use in (lambda: index.search(request.queries, 5), lambda: index.memory_bytes):
        with pytest.raises(AttributeError):
            use()


@LINUX
@pytest.mark.parametrize("resident", [False, True])
def test_no_map_of_a_closed_version_is_left(path: Path, resident: bool) -> None:
    before = maps_of(path)
    for _ in range(3):
        searcher = Searcher.open(path, resident=resident)
        searcher.warm()
        assert maps_of(path) > before
        searcher.close()
    assert maps_of(path) == before


@LINUX
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("segments", [1, 2])
def test_no_map_of_a_version_that_has_grown_is_left(tmp_path: Path, segments: int, resident: bool) -> None:
    lm = ToyLanguageModel()
    parent = base(tmp_path / "store", some_documents("base", [90], 0), lm)
    path = grow(parent, lm, [[Document(f"d{i}", "the cat sat")] for i in range(segments)], [0])
    searcher = Searcher.open(path, resident=resident)
    searcher.warm()
    assert maps_of(path)
    searcher.close()
    searcher.close()
    assert maps_of(path) == 0


def test_closing_an_index_leaves_others_of_the_same_file_alone(path: Path) -> None:
    first, second = Searcher.open(path), Searcher.open(path)
    request = SearchRequest("toy", clustered(3, 32, seed=1), SearchOptions(k=5), ids=True)
    before = second.search(request).neighbors
    first.close()
    after = second.search(request).neighbors
    np.testing.assert_array_equal(after.ids, before.ids)
    np.testing.assert_array_equal(after.distances, before.distances)


FREED = """
import os, sys
from pathlib import Path
import numpy as np
from knnlm.datastore.reader import Datastore
from knnlm.index.memory import release_freed
from knnlm.index.searcher import Searcher

def held():
    release_freed()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

path = Path(sys.argv[1])
first = Searcher.open(path, resident=True)  # what is loaded once and stays: libraries, compiled loops
first.warm()
first.close()
before = held()
searcher = Searcher.open(path, resident=True)
searcher.warm()
np.asarray(searcher._datastore.keys).sum(dtype="f8")
during = held()
searcher.close()
print(before, during, held())
"""


@LINUX
@pytest.mark.parametrize(
    "recipe", [*(pytest.param(r, marks=pytest.mark.slow) for r in ("flat", "hnsw16,flat")), "ivf4,flat"]
)
def test_memory_is_given_back(tmp_path: Path, recipe: str) -> None:
    path = datastore(tmp_path, clustered(8000, 256))
    build_index(path, recipe)
    done = subprocess.run([sys.executable, "-c", FREED, str(path)], capture_output=True, text=True, check=True)
    before, during, after = map(int, done.stdout.split())
    keys = 8000 * 256 * 4
    assert during - before > 1.8 * keys  # the index and the keys, each once
    assert after - before < 0.2 * keys


@LINUX
def test_dropped_pages_are_given_back_and_neighbors_stay(tmp_path: Path) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    whole = np.full(8 * page, 7, np.uint8)
    drop_pages(whole[page // 2 : 6 * page + 1])
    assert (whole[: page // 2] == 7).all()
    assert (whole[6 * page + 1 :] == 7).all()
    assert (whole == 0).sum() >= 4 * page
    drop_pages(whole[:10])  # no whole page
    drop_pages(whole[:0])


@LINUX
def test_a_dropped_map_is_read_again_from_its_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(10_000))
    mapped, held = np.load(tmp_path / "a.npy", mmap_mode="r"), np.arange(10_000)
    drop_maps(mapped, held)
    np.testing.assert_array_equal(mapped, np.arange(10_000))
    np.testing.assert_array_equal(held, np.arange(10_000))


def test_versions_are_closed_while_others_are_searched(path: Path) -> None:
    serving = Searcher.open(path)
    request = SearchRequest("toy", clustered(3, 32, seed=1), SearchOptions(k=5), ids=True)
    expected = serving.search(request).neighbors.ids
    failures: list[BaseException] = []

    def search() -> None:
        try:
            for _ in range(50):
                np.testing.assert_array_equal(serving.search(request).neighbors.ids, expected)
        except BaseException as err:  # noqa: BLE001  # of a thread: told below
            failures.append(err)

    thread = threading.Thread(target=search)
    thread.start()
    for _ in range(10):
        other = Searcher.open(path)
        other.search(request)
        other.close()
    thread.join()
    assert failures == []


def test_a_family_that_cannot_tell_its_kind_is_still_closed() -> None:
    index = family("flat").open(clustered(10, 4), None, {}, resident=True)
    index.close()
    index.close()
