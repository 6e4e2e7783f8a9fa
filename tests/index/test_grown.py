"""A version that has grown answers as one built of what remains: added entries beside its index, removed ones never."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest
from knnlm.index.build import build_index
from knnlm.index.kernels import project, squared_distances
from knnlm.index.rescore import nearest_first
from knnlm.index.searcher import Searcher
from knnlm.messages import Document, SearchRequest
from knnlm.options import SearchOptions
from tests.grown import base, emptied, grow
from tests.index.growths import (
    ADDED,
    BASE,
    EXACT,
    GROWTHS,
    LM,
    REDUCED,
    Float32,
    assert_same,
    generous,
    live,
    queries,
    remaining,
)
from tests.index.helpers import brute_force
from tests.searching import asking, search


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


@pytest.mark.parametrize("name", GROWTHS)
def test_exact_search_is_bit_for_bit_that_of_a_version_built_of_the_rest(
    parent: Path, tmp_path: Path, name: str
) -> None:
    path = grow(parent, LM, *GROWTHS[name], version=name.replace(" ", "-"))
    dtype = Datastore.open(path).manifest.key_dtype
    twin = Searcher.open(base(tmp_path, remaining(GROWTHS[name]), LM, key_dtype=dtype))
    searcher, numbers = Searcher.open(path), live(path)
    for k in (1, 5, 100, 10_000):
        for rescore in (None, True):
            request = SearchRequest("toy", queries(), SearchOptions(k=k, rescore=rescore), ids=True)
            assert_same(searcher.search(request).neighbors, twin.search(request).neighbors, numbers)
    assert searcher.search(request).neighbors.values.shape == (12, len(numbers))
    raw = searcher.search(asking(request, rescore=False)).neighbors
    assert raw.ids is not None
    assert sorted(raw.ids[0].tolist()) == numbers.tolist()
    np.testing.assert_allclose(raw.distances, twin.search(request).neighbors.distances, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", EXACT[1:])
def test_an_index_that_visits_all_is_as_exact(half: Path, tmp_path: Path, recipe: str) -> None:
    path = grow(half, LM, *GROWTHS["both"], version=f"exact-{len(recipe)}-{recipe[0]}")
    twin = Searcher.open(base(tmp_path, remaining(GROWTHS["both"]), LM))
    searcher, numbers = Searcher.open(path, index=recipe), live(path)
    for k in (5, 200):
        request = SearchRequest("toy", queries(), SearchOptions(k=k), ids=True)
        found = searcher.search(asking(request, **generous(recipe))).neighbors
        assert_same(found, twin.search(request).neighbors, numbers)


def in_space(path: Path, recipe: str, keys: npt.NDArray[np.floating]) -> tuple[Float32, Float32]:
    """Keys and queries as the index reduces them, by the pre-transform that lies in its file."""
    index: Any = Searcher.open(path, index=recipe)._index  # its projection is the point
    made = project(np.asarray(keys, np.float32), index._project._matrix, index._project._offset)
    return made, index.project(queries())


@pytest.mark.parametrize("recipe", REDUCED)
def test_reduced_distances_are_those_of_brute_force_among_reduced_keys(half: Path, recipe: str) -> None:
    path = grow(half, LM, *GROWTHS["both"], version=f"reduced-{REDUCED.index(recipe)}")
    store, numbers = Datastore.open(path), live(path)
    keys, asked = in_space(path, recipe, np.concatenate([store.keys, store.added_keys()]))
    halves = keys.astype(np.float16)
    everything = np.tile(numbers, (len(asked), 1))
    distances = squared_distances(halves, asked, everything)
    order = np.argsort(distances, axis=1, kind="stable")[:, :50]  # of equal ones the lower number first
    request = search("toy", queries(), 50, **generous(recipe))
    found = Searcher.open(path, index=recipe).search(request).neighbors
    np.testing.assert_array_equal(found.distances, np.take_along_axis(distances, order, axis=1))
    np.testing.assert_array_equal(found.ids, numbers[order])
    true, _ = brute_force(halves[numbers], asked, 50)
    np.testing.assert_allclose(found.distances, true, rtol=1e-5)


@pytest.mark.parametrize("recipe", REDUCED)
def test_stored_keys_are_rescored_by_in_both_parts(half: Path, tmp_path: Path, recipe: str) -> None:
    path = grow(half, LM, *GROWTHS["both"], version=f"stored-{REDUCED.index(recipe)}")
    twin = Searcher.open(base(tmp_path, remaining(GROWTHS["both"]), LM))
    request = SearchRequest("toy", queries(), SearchOptions(k=50, rescore=True), ids=True)
    found = Searcher.open(path, index=recipe).search(asking(request, **generous(recipe))).neighbors
    assert_same(found, twin.search(request).neighbors, live(path))


def test_far_estimates_of_the_base_stand_beside_true_distances_of_what_was_added(tmp_path: Path) -> None:
    """An index that rescores its nearest candidates alone: added entries are all rescored."""
    path = base(tmp_path / "store", BASE, LM)
    build_index(path, "pcar16,ivf8,pq4x4fs")
    fields = {**generous("ivf"), "overfetch": None, "k": 450}
    alone = Searcher.open(path)
    assert alone.index.rescored == 256
    of_base = alone.search(search("toy", queries(), **fields)).neighbors
    store = Datastore.open(grow(path, LM, *GROWTHS["added"]))
    numbers = np.arange(alone.manifest.entries, store.entries)
    assert len(numbers) < 450  # all of them are candidates
    everything = np.tile(numbers, (len(queries()), 1))
    beside = squared_distances(store.added_keys(), queries(), everything - numbers[0])
    assert of_base.ids is not None
    both = np.concatenate([of_base.distances, beside], axis=1), np.concatenate([of_base.ids, everything], axis=1)
    expected = nearest_first(*both, 450)
    found = Searcher.open(store.path).search(search("toy", queries(), **fields)).neighbors
    np.testing.assert_array_equal(found.distances, expected[0])
    np.testing.assert_array_equal(found.ids, expected[1])


@pytest.mark.parametrize("recipe", [*REDUCED, "pca16,ivf8,sq8"])
def test_without_rescoring_added_entries_have_their_distance_in_the_space_of_the_index(half: Path, recipe: str) -> None:
    path = grow(half, LM, *GROWTHS["both"], version=f"raw-{len(recipe)}-{recipe[:3]}")
    store = Datastore.open(path)
    first = store.manifest.base_entries
    made, asked = in_space(path, recipe, store.added_keys())
    keys = made.astype(np.float16) if recipe.endswith("+fp16") else made
    fields = {name: value for name, value in generous(recipe).items() if name != "overfetch"}
    request = search("toy", queries(), store.entries, rescore=False, **fields)
    found = Searcher.open(path, index=recipe).search(request).neighbors
    assert found.ids is not None
    added = found.ids >= first
    assert added.sum() == len(asked) * (live(path) >= first).sum()
    expected = squared_distances(keys, asked, np.where(added, found.ids - first, -1))
    np.testing.assert_array_equal(found.distances[added], expected[added])
    # and the base's own approximations, however coarse, are of the same distances
    base_made, _ = in_space(path, recipe, store.keys)
    of_base = (found.ids >= 0) & ~added
    near = squared_distances(base_made, asked, np.where(of_base, found.ids, -1))
    assert np.corrcoef(found.distances[of_base], near[of_base])[0, 1] > 0.9
    assert found.distances[of_base].mean() == pytest.approx(near[of_base].mean(), rel=0.1)
    assert (np.diff(found.distances, axis=1) >= 0).all()


@pytest.mark.parametrize("recipe", ["flat", *EXACT[1:], *REDUCED])
def test_an_added_copy_is_as_far_as_what_it_copies_and_comes_behind_it(half: Path, recipe: str) -> None:
    path = grow(half, LM, [BASE], version=f"copy-{recipe.replace(',', '-').replace('+', '-')}")
    n = Datastore.open(half).entries
    request = search("toy", queries(), 2 * n, **generous(recipe))
    found = Searcher.open(path, index=recipe).search(request).neighbors
    assert found.ids is not None
    for row, distances in zip(found.ids, found.distances, strict=True):
        place = np.empty(2 * n, np.int64)
        place[row] = np.arange(2 * n)
        np.testing.assert_array_equal(distances[place[:n]], distances[place[n:]])
        assert (place[:n] < place[n:]).all()


@pytest.mark.parametrize("recipe", ["flat", "ivf8,sq8", "pca16,ivf8,sq8", *REDUCED])
@pytest.mark.parametrize("rescore", [None, True])
def test_the_answer_to_a_query_is_the_same_alone_and_in_any_batch(
    half: Path, recipe: str, rescore: bool | None
) -> None:
    path = half.with_name("batch")
    searcher = Searcher.open(path if path.exists() else grow(half, LM, *GROWTHS["both"], version="batch"), index=recipe)
    request = SearchRequest("toy", queries(), SearchOptions(k=20, rescore=rescore), ids=True)
    together = searcher.search(request).neighbors
    for lo, hi in ((0, 1), (3, 5), (4, 12), (11, 12)):
        some = searcher.search(replace(request, queries=request.queries[lo:hi])).neighbors
        np.testing.assert_array_equal(some.distances, together.distances[lo:hi])
        np.testing.assert_array_equal(some.ids, together.ids[lo:hi] if together.ids is not None else None)


@pytest.mark.parametrize("rescore", [None, True, False])
@pytest.mark.parametrize("recipe", ["flat", "ivf8,sq8", "hnsw16", REDUCED[0]])
def test_removed_entries_are_never_found_even_where_all_that_is_near_was_removed(
    half: Path, recipe: str, rescore: bool | None
) -> None:
    path = half.with_name("gone")
    if not path.exists():
        grow(half, LM, *GROWTHS["both"], version="gone")
    store, numbers = Datastore.open(path), live(path)
    removed = np.setdiff1d(np.arange(store.entries), numbers)
    asked = np.concatenate([store.keys, store.added_keys()])[removed[::40]]  # each the nearest of itself
    searcher = Searcher.open(path, index=recipe)
    for k in (1, 7, 3000):
        found = searcher.search(SearchRequest("toy", asked, SearchOptions(k=k, rescore=rescore), ids=True)).neighbors
        assert found.ids is not None
        assert not np.isin(found.ids, removed).any()
        assert found.values.shape == (len(asked), min(k, len(numbers)))
        assert (found.ids[:, 0] >= 0).all()


def test_what_a_request_excludes_is_excluded_beside_what_was_removed(parent: Path, tmp_path: Path) -> None:
    path = grow(parent, LM, *GROWTHS["both"], version="excluding")
    store, numbers = Datastore.open(path), live(path)
    rest = [d for d in remaining(GROWTHS["both"]) if d.id not in ("base5", "first2")]
    twin = Searcher.open(base(tmp_path, rest, LM, key_dtype=store.manifest.key_dtype))
    request = SearchRequest("toy", queries(), SearchOptions(k=60), ids=True)
    table = store.documents
    excluded = np.concatenate([np.arange(*(int(x[0]) for x in table.spans(table.numbers(name))))
                               for name in ("base5", "first2")])  # fmt: skip
    found = Searcher.open(path).search(asking(request, exclude_documents=("base5", "first2"))).neighbors
    assert_same(found, twin.search(request).neighbors, np.setdiff1d(numbers, excluded))


def test_a_removed_document_is_unknown_and_its_replacement_is_not(parent: Path) -> None:
    again = [Document("base0", "abc abc abc"), Document("base0", "abc abd")]
    path = grow(parent, LM, [again], [0], version="again")
    store, searcher = Datastore.open(path), Searcher.open(path)
    request = SearchRequest("toy", queries(), SearchOptions(k=3000, exclude_documents=("base0",)), ids=True)
    found = searcher.search(request).neighbors
    assert found.ids is not None
    assert (found.ids[found.ids >= 0] < store.manifest.base_entries).all()
    gone = Searcher.open(grow(parent, LM, [], [0], version="gone-0"))
    with pytest.raises(InvalidRequest, match="names 'base0', which is no document of toy gone-0"):
        gone.search(request)


@pytest.mark.parametrize("own", [False, True])
def test_an_entry_that_was_removed_excludes_nothing_more(parent: Path, own: bool) -> None:
    path = grow(parent, LM, *GROWTHS["both"], version=f"own-{int(own)}")
    searcher, numbers = Searcher.open(path), live(path)
    store = Datastore.open(path)
    removed = np.setdiff1d(np.arange(store.entries), numbers)
    request = SearchRequest("toy", queries(), SearchOptions(k=40), ids=True)
    plain = searcher.search(request).neighbors
    given = np.resize(removed[::50], 12).astype(np.int64)
    found = searcher.search(asking(request, exclude_entries=given, exclude_own_documents=own)).neighbors
    np.testing.assert_array_equal(found.ids, plain.ids)
    assert plain.ids is not None
    added = np.full(12, plain.ids.max())  # of the last document that was found, which was added
    assert added[0] >= store.manifest.base_entries
    without = searcher.search(asking(request, exclude_entries=added, exclude_own_documents=own)).neighbors
    assert without.ids is not None
    first, end = (int(place[0]) for place in store.documents.spans(store.document_of(added[:1])[0]))
    excluded = np.arange(first, end) if own else added[:1]
    assert np.isin(plain.ids, excluded).any()
    assert not np.isin(without.ids, excluded).any()
    with pytest.raises(InvalidRequest, match=rf"must lie in \[-1, {store.entries}\)"):
        searcher.search(replace(request, exclude_entries=np.full(12, store.entries)))


@pytest.mark.parametrize("removed", [(), (0,)])
def test_a_base_without_entries(tmp_path: Path, removed: tuple[int, ...]) -> None:
    parent = emptied(base(tmp_path / "store", [Document("none", "none")], LM))
    path = grow(parent, LM, ADDED, removed)
    twin = Searcher.open(base(tmp_path / "twin", [d for segment in ADDED for d in segment][len(removed) :], LM))
    searcher = Searcher.open(path)
    searcher.warm()
    request = SearchRequest("toy", queries(), SearchOptions(k=30), ids=True)
    assert_same(searcher.search(request).neighbors, twin.search(request).neighbors, live(path))


def test_when_all_was_removed_nothing_is_found(parent: Path) -> None:
    path = grow(parent, LM, ADDED, tuple(range(11)), version="nothing")
    searcher = Searcher.open(path)
    searcher.warm()
    found = searcher.search(SearchRequest("toy", queries(), SearchOptions(k=5), ids=True, passages=1))
    assert found.neighbors.values.shape == (12, 0)
    assert searcher.info(["v1"]).entries == 0
