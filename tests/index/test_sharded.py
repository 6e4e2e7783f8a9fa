"""A version of shards answers what the same documents answer in one folder: every option, every kind of index."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest, KnnlmError, UnknownDomain, UnknownVersion
from knnlm.index import sharding
from knnlm.index.build import build_index
from knnlm.index.exact import exact_neighbors
from knnlm.index.kernels import squared_distances
from knnlm.index.searcher import Searcher
from knnlm.index.sharded_searcher import ShardedSearcher, open_searcher
from knnlm.index.sharding import ShardResult
from knnlm.messages import PassagesRequest, SearchRequest, SearchResult
from knnlm.neighbors import Neighbors
from knnlm.options import SearchOptions
from tests.index.shards import build_queries, equal, in_shards, queries, whole
from tests.searching import search
from tests.sharding import sharded

__all__ = ["in_shards", "whole"]

RECIPES = ("flat", "ivf24", "ivf24,sq8", "pca8,ivf24+fp16", "ivf16,pq8x4fs", "hnsw8")


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ids": {"ids": True},
    "passages": {"passages": 3, "passage_tokens": 4, "ids": True},
    "passages of all": {"k": 5000, "passages": 5000, "passage_tokens": 1},
    "one": {"k": 1, "ids": True},
    "more than there are": {"k": 100_000, "ids": True},
    "excluded document": {"exclude_documents": ("d3", "d40"), "ids": True},
    "excluded entries": {"exclude_entries": np.arange(12, dtype=np.int64) * 300 - 1, "ids": True},
    "own documents": {
        "exclude_entries": np.arange(12, dtype=np.int64) * 300 - 1, "exclude_own_documents": True, "ids": True
    },
    "followed": {"follow": (np.arange(48, dtype=np.int64).reshape(12, 4) * 70) - 1, "ids": True},
    "followed and excluded": {
        "follow": (np.arange(48, dtype=np.int64).reshape(12, 4) * 70) - 1, "exclude_documents": ("d3",), "ids": True
    },
    "not rescored": {"rescore": False, "ids": True},
    "rescored": {"rescore": True, "overfetch": 2.0},
}  # fmt: skip


def asked(options: dict[str, Any]) -> SearchRequest:
    """Passages of all entries of two queries are many already."""
    return search("toy", queries(2 if options.get("k") == 5000 else 12), **{"k": 10, **options})


@pytest.mark.parametrize("recipe", ["flat", "ivf24", "ivf24,sq8"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_means_the_same(whole: Path, recipe: str, options: dict[str, Any]) -> None:
    one, many = indexed(whole, recipe)
    request = asked(options)
    expected, found = one.search(request), many.search(request)
    if recipe != "flat" or "rescore" not in options:
        equal(expected, found)
    else:  # not rescored, exact search is a product of matrices, whose rounding depends on what is in it
        np.testing.assert_allclose(found.neighbors.distances, expected.neighbors.distances, rtol=1e-4)


@pytest.mark.parametrize("options", ["passages", "passages of all", "excluded document", "followed", "own documents"])
def test_shards_are_merged_a_few_at_a_time(
    whole: Path, in_shards: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "MERGED_AT_ONCE", 2)
    request = asked(OPTIONS[options])
    equal(open_searcher(in_shards).search(request), Searcher.open(whole).search(request))


def test_what_is_held_of_answers_does_not_grow_with_the_shards(whole: Path) -> None:
    shards = 3 * sharding.MERGED_AT_ONCE
    manifest = Manifest.load(sharded(whole, shards, version="many", recipe="flat"))
    alive: list[weakref.ref[npt.NDArray[np.float32]]] = []
    most = 0

    def answers() -> Iterator[ShardResult]:
        nonlocal most
        for shard in range(shards):
            near = Neighbors(np.full((1, 4), shards - shard, np.float32), np.full((1, 4), shard, np.int32), ids[None])
            one = ShardResult(SearchResult("toy", "many", near))
            alive.append(weakref.ref(near.distances))
            most = max(most, sum(r() is not None for r in alive))
            yield one

    ids = np.arange(4, dtype=np.int64)
    whole_request = search("toy", queries(1), 6, ids=True)
    cut = sharding.Sharding(manifest)
    found = cut.merge(whole_request, cut.split(whole_request), answers())
    assert found.neighbors.values.tolist() == [[shards - 1] * 4 + [shards - 2] * 2]
    assert most <= sharding.MERGED_AT_ONCE + 1


@pytest.mark.parametrize("more", [{}, {"passages": 4, "passage_tokens": 2}, {"exclude_documents": ("d3", "d40")}])
@pytest.mark.parametrize(("columns", "share"), [(1, 0.3), (7, 1.0), (40, 0.5), (3, 0.0)])
def test_following_entries_finds_what_one_index_does(
    whole: Path, in_shards: Path, columns: int, share: float, more: dict[str, Any]
) -> None:
    """share: of the places that name an entry; the others are -1."""
    one, rng = Searcher.open(whole), np.random.default_rng(columns)
    follow = np.stack([rng.choice(one.manifest.entries, columns, replace=False) for _ in range(12)])
    follow[rng.random(follow.shape) >= share] = -1
    own = rng.integers(-1, one.manifest.entries, 12)
    for fields in ({}, {"exclude_entries": own}, {"exclude_entries": own, "exclude_own_documents": True}):
        request = search("toy", queries(), 10, ids=True, follow=follow, **fields, **more)
        equal(open_searcher(in_shards).search(request), one.search(request))


def test_a_shard_is_sent_its_own_entries_to_follow_alone(in_shards: Path) -> None:
    manifest = Manifest.load(in_shards)
    cut = sharding.Sharding(manifest)
    ends = cut.first_entries.tolist()
    follow = np.full((12, 9), -1, np.int64)
    follow[3, 2], follow[3, 7], follow[5, 1] = ends[1], ends[2] - 1, ends[1] + 5  # all of shard 1
    follow[8, 0] = ends[3]
    request = search("toy", queries(), 10, follow=follow, exclude_entries=np.arange(12))
    first, second, last = cut.split(request)
    assert [part.shard for part in (first, second, last)] == [0, 1, 3]
    assert first.request.follow is not None
    assert first.request.follow.shape == (0, 0)
    assert second.rows is not None
    assert second.rows.tolist() == [3, 5]
    assert second.request.follow is not None
    assert second.request.follow.tolist() == [[0, ends[2] - 1 - ends[1]], [5, -1]]
    np.testing.assert_array_equal(second.request.queries, request.queries[[3, 5]])
    assert last.request.follow is not None
    assert last.request.follow.tolist() == [[0]]
    named = cut.split(search("toy", queries(), 10, follow=follow, exclude_documents=("d3",)))
    assert [part.shard for part in named] == [0, 1, 2, 3]  # each knows its own documents


made: dict[tuple[Path, str], tuple[Any, Any]] = {}


def indexed(whole: Path, recipe: str) -> tuple[Searcher, ShardedSearcher]:
    """The version in one folder and in four shards, with an index of this recipe."""
    if (whole, recipe) not in made:
        if recipe not in ("flat", *(i.recipe for i in Manifest.load(whole).indexes)):
            build_index(whole, recipe, beside=True)
        name = f"s{len(made)}"
        many = open_searcher(sharded(whole, 4, version=name, recipe=recipe), index=recipe)
        made[whole, recipe] = Searcher.open(whole, index=recipe), many
    return made[whole, recipe]


@pytest.mark.parametrize("recipe", RECIPES)
def test_neighbors_are_never_farther_than_those_of_one_index(whole: Path, recipe: str) -> None:
    one, many = indexed(whole, recipe)
    assert many.index.efforts == one.index.efforts  # as many lists, though each shard has fewer entries
    request = search("toy", build_queries(2), 20)
    near = one.search(request).neighbors.distances
    found = many.search(request).neighbors.distances
    assert (found <= near).all()
    if recipe in ("flat", "ivf24", "ivf24,sq8"):
        np.testing.assert_array_equal(found, near)


def test_shards_rescore_all_candidates_of_an_index_that_rescores_the_nearest_alone(whole: Path) -> None:
    """Their answers are merged by distance, and estimates of different shards are shifted differently."""
    one, many = indexed(whole, "ivf16,pq4x4fs")
    assert one.index.rescored == 256
    assert many.index.rescored is None
    found = many.search(search("toy", build_queries(2), 400, ids=True)).neighbors
    near = one.search(search("toy", build_queries(2), 400, rescore=True)).neighbors.distances
    assert (found.distances <= near).all()
    assert found.ids is not None
    keys = Datastore.open(whole).keys
    np.testing.assert_array_equal(squared_distances(keys, build_queries(2), found.ids), found.distances)


@pytest.mark.parametrize("nprobe", [1, 3, 24])
def test_recall_does_not_fall_with_the_number_of_shards(whole: Path, nprobe: int) -> None:
    exact = exact_neighbors(Datastore.open(whole), build_queries(3), 20).ids
    assert exact is not None
    recalls = []
    for shards in (1, 2, 8):
        searcher = open_searcher(sharded(whole, shards, version=f"n{shards}-{nprobe}"))
        found = searcher.search(search("toy", build_queries(3), 20, nprobe=nprobe, ids=True)).neighbors.ids
        assert found is not None
        recalls.append(np.mean([len(np.intersect1d(a, b)) / 20 for a, b in zip(found, exact, strict=True)]))
    assert recalls == [recalls[0]] * 3
    assert (recalls[0] == 1) == (nprobe == 24)


def test_passages_are_looked_up_in_the_order_of_the_request(whole: Path, in_shards: Path) -> None:
    one, many = Searcher.open(whole), open_searcher(in_shards)
    entries = np.array([3000, 0, 5, 3000, 1500], np.int64)
    expected = one.passages(PassagesRequest("toy", whole.name, entries, 3))
    found = many.passages(PassagesRequest("toy", in_shards.name, entries, 3))
    assert [(p.document, p.entry, p.position) for p in found] == [(p.document, p.entry, p.position) for p in expected]


def test_exact_search_passes_over_all_shards(whole: Path, in_shards: Path) -> None:
    one, many = (exact_neighbors(Datastore.open(p), queries(), 30) for p in (whole, in_shards))
    np.testing.assert_array_equal(one.distances, many.distances)
    assert one.ids is not None
    np.testing.assert_array_equal(one.ids, many.ids)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda r: replace(r, exclude_entries=np.full(12, 99_999, np.int64)),
            InvalidRequest,
            "exclude_entries must lie",
        ),
        (lambda r: replace(r, follow=np.full((12, 1), 99_999, np.int64)), InvalidRequest, "follow must lie"),
        (lambda r: replace(r, follow=np.full((12, 2), 5, np.int64)), InvalidRequest, "names an entry twice"),
        (lambda r: replace(r, queries=r.queries[:, :3]), InvalidRequest, "queries must have shape"),
        (
            lambda r: replace(r, queries=r.queries * np.inf, follow=np.full((12, 1), -1, np.int64)),
            InvalidRequest,
            "query 0 is not finite",
        ),
        (lambda r: replace(r, domain="other"), UnknownDomain, "asked for domain 'other'"),
        (lambda r: replace(r, version="v9"), UnknownVersion, "version 'v9' was asked for"),
        (lambda r: replace(r, options=SearchOptions(k=3, ef_search=9)), InvalidRequest, "ef_search means nothing"),
        (
            lambda r: replace(r, options=SearchOptions(k=3, exclude_documents=("d3", "nobody"))),
            InvalidRequest,
            "'nobody', which is no document of toy",
        ),
    ],
)
def test_bad_requests_are_refused_as_of_one_index(
    in_shards: Path, change: Callable[[SearchRequest], SearchRequest], error: type[KnnlmError], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_searcher(in_shards).search(change(search("toy", queries(), 3)))


def test_unknown_entries_have_no_passages(in_shards: Path) -> None:
    with pytest.raises(InvalidRequest, match="entries must lie in"):
        open_searcher(in_shards).passages(PassagesRequest("toy", in_shards.name, np.array([99_999], np.int64)))


def test_what_it_holds_and_says_is_of_all_shards(whole: Path, in_shards: Path) -> None:
    one, many = Searcher.open(whole, resident=True), open_searcher(in_shards, resident=True)
    assert many.memory.keys_bytes == one.memory.keys_bytes
    assert many.held_bytes >= one.held_bytes
    said, expected = many.info(("a", "b")), one.info(("a", "b"))
    assert replace(said, version="", memory=None, indexes=()) == replace(expected, version="", memory=None, indexes=())
    many.warm()
    many.close()
    many.close()
    with pytest.raises(KnnlmError):
        many.search(search("toy", queries(), 3))
