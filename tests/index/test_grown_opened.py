"""A version that has grown, opened: what it says of itself, what it takes, and that it is indexed as before."""

from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.reader import Datastore
from knnlm.errors import DatastoreCorrupt, InsufficientMemory, InvalidRequest
from knnlm.index.added import added_bytes
from knnlm.index.build import build_index, suited
from knnlm.index.device import open_on_device
from knnlm.index.searcher import Searcher
from knnlm.index.table import family
from knnlm.messages import Document, Memory, PassagesRequest, SearchRequest
from knnlm.options import SearchOptions
from tests.grown import base, grow
from tests.index.growths import (
    ADDED,
    BASE,
    DIM,
    EXACT,
    GROWTHS,
    LM,
    REDUCED,
    assert_same,
    live,
    queries,
    remaining,
)
from tests.index.helpers import Given, brute_force, datastore
from tests.searching import asking


@pytest.fixture(scope="module", params=["float16", "float32"])
def parent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("parent") / "store", BASE, LM, key_dtype=request.param)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of float16, with every recipe indexed."""
    path = base(tmp_path_factory.mktemp("half") / "store", BASE, LM)
    for recipe in (*EXACT[1:], *REDUCED, "pca16,ivf8,sq8"):
        assert build_index(path, recipe, beside=True) == recipe
    return path


def test_info_tells_what_can_be_found(parent: Path) -> None:
    path = grow(parent, LM, *GROWTHS["both"], version="info")
    info = Searcher.open(path).info(["v1", "info"])
    assert (info.entries, info.documents) == (len(live(path)), 7)


def test_passages_of_added_entries_are_shown(parent: Path) -> None:
    path = grow(parent, LM, ADDED, version="passages")
    asked = np.asarray(Datastore.open(path).added_keys()[150:152])
    result = Searcher.open(path).search(
        SearchRequest("toy", asked, SearchOptions(k=1), ids=True, passages=1, passage_tokens=5)
    )
    assert [row[0].document for row in result.passages] == ["first2"] * 2
    for i, value in enumerate(result.neighbors.values[:, 0]):
        assert result.passages[i][0].after[0] == value


def test_entries_of_removed_documents_are_not_shown(parent: Path) -> None:
    path = grow(parent, LM, ADDED, [1], version="shown")
    store, searcher = Datastore.open(path), Searcher.open(path)
    start, end = (int(edges[0]) for edges in store.removed)
    for entry in (start, end - 1):
        with pytest.raises(InvalidRequest, match=f"entry {entry} was removed") as caught:
            searcher.passages(PassagesRequest("toy", "shown", np.array([end, entry])))
        assert caught.value.param == "entries"
    last = store.entries - 1
    shown = searcher.passages(PassagesRequest("toy", "shown", np.array([last, end]), passage_tokens=3))
    assert [int(p.after[0]) for p in shown] == store.values_of(np.array([last, end])).tolist()


@pytest.mark.parametrize("recipe", ["flat", "ivf8,sq8", "pca16,ivf8,sq8", REDUCED[0]])
@pytest.mark.parametrize("segments", [1, 2])
def test_memory_of_what_was_added_is_told_and_required(half: Path, recipe: str, segments: int) -> None:
    path = half.with_name(f"memory-{segments}")
    if not path.exists():
        grow(half, LM, ADDED[:segments], version=path.name)
    m = sum(max(len(d.text), 0) for segment in ADDED[:segments] for d in segment)  # a byte is a token, and BOS before
    space = 16 if "pca" in recipe else DIM
    kept = recipe.endswith("+fp16")
    for resident in (False, True):
        store, chosen = Datastore.open(path), family(recipe)
        copied = 2 * m * DIM * (segments > 1 or (resident and not kept))
        needed = added_bytes(store, chosen, resident=resident)
        assert needed == 4 * m * space + kept * 2 * m * space + copied
        grown, before = (Searcher.open(p, index=recipe, resident=resident).memory for p in (path, half))
        assert isinstance(grown, Memory)
        assert grown.index_bytes - before.index_bytes == 4 * m * space
        assert grown.keys_bytes - before.keys_bytes == 2 * m * (space if kept else DIM)
        index = store.manifest.index_of(recipe)
        file = None if index.file is None else path / index.file
        least = chosen.resident_bytes(store.keys, file, resident=resident) + needed
        least += store.keys.nbytes if resident and not kept else 0
        opened = Searcher.open(path, index=recipe, resident=resident, memory_limit=least)
        kept_bytes = opened.memory.keys_bytes - grown.keys_bytes + before.keys_bytes if resident else 0
        index_bytes = before.index_bytes if before.index == "resident" else 0
        assert opened.held_bytes == index_bytes + kept_bytes + needed
        with pytest.raises(InsufficientMemory):
            Searcher.open(path, index=recipe, resident=resident, memory_limit=least - 1)


@pytest.mark.parametrize("recipe", ["ivf8,sq8", REDUCED[0]])
def test_resident_answers_as_mapped(half: Path, recipe: str) -> None:
    path = half.with_name("resident")
    if not path.exists():
        grow(half, LM, *GROWTHS["both"], version="resident")
    request = SearchRequest("toy", queries(), SearchOptions(k=30), ids=True)
    mapped, resident = (
        Searcher.open(path, index=recipe, resident=resident).search(request).neighbors for resident in (False, True)
    )
    np.testing.assert_array_equal(mapped.distances, resident.distances)
    np.testing.assert_array_equal(mapped.ids, resident.ids)


def test_an_index_on_a_device_is_searched_beside_what_was_added(half: Path, tmp_path: Path) -> None:
    """By the code of a device, on this machine."""
    path = grow(half, LM, *GROWTHS["both"], version="device")
    store = Datastore.open(path)
    searcher = Searcher(store, open_on_device(store.keys, "cpu"), recipe="flat")
    searcher.warm()
    twin = Searcher.open(base(tmp_path, remaining(GROWTHS["both"]), LM))
    request = SearchRequest("toy", queries(), SearchOptions(k=60), ids=True)
    found, expected = (s.search(request).neighbors for s in (searcher, twin))
    np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-5, atol=1e-5)
    assert found.ids is not None
    assert expected.ids is not None
    assert np.mean(found.ids == live(path)[expected.ids]) > 0.95  # equal distances may be summed otherwise
    searcher.close()
    searcher.close()


def test_indexing_takes_the_base_and_answers_as_before(parent: Path) -> None:
    path = grow(parent, LM, *GROWTHS["both"], version="indexed")
    request = SearchRequest("toy", queries(), SearchOptions(k=30), ids=True)
    before = Searcher.open(path).search(request).neighbors
    assert suited(path, "ivf8").recipe == "ivf8"
    assert suited(path, f"ivf{Datastore.open(path).manifest.base_entries + 1}").recipe != "ivf8"
    build_index(path, "ivf8")
    searcher = Searcher.open(path)
    assert searcher.info(["indexed"]).index == "ivf8"
    assert_same(searcher.search(asking(request, nprobe=8)).neighbors, before, np.arange(10_000))


def test_a_value_that_is_no_token_is_never_answered(parent: Path) -> None:
    for name, value in (("values.npy", 258), ("values.1.npy", 258), ("values.2.npy", -1)):
        path = grow(parent, LM, ADDED, version=f"strange-{name}")
        values = np.load(path / name)
        values[7] = value
        (path / name).unlink()  # the base's is shared with the others
        np.save(path / name, values)
        searcher = Searcher.open(path)
        with pytest.raises(DatastoreCorrupt, match=rf"has value {value} at entry \d+, expected \[0, 258\)"):
            searcher.search(SearchRequest("toy", queries(), SearchOptions(k=10_000)))


@pytest.mark.parametrize("rescore", [None, False])
def test_rounding_of_products_does_not_decide_which_added_entries_are_nearest(
    tmp_path: Path, rescore: bool | None
) -> None:
    """Far from the origin, where |x|^2 - 2 q.x loses digits: the last of the k nearest must not be another for that."""
    keys = np.concatenate([np.zeros((1, DIM), np.float32), 100 + np.random.default_rng(0).random((3000, DIM))])
    keys = keys.astype(np.float32)
    parent = datastore(tmp_path / "store", keys[:1])
    path = grow(parent, Given(keys[1:]), [[Document("many", "a" * 3000)]])
    asked = keys[1:200] + np.float32(0.01)
    found = (
        Searcher.open(path)
        .search(SearchRequest("toy", asked, SearchOptions(k=20, rescore=rescore), ids=True))
        .neighbors
    )
    np.testing.assert_array_equal(found.ids, brute_force(keys, asked, 20)[1])
