"""A version of shards answers what the same documents answer in one folder: every option, every kind of index."""

import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import Manifest, ShardRecord
from knnlm.datastore.reader import Datastore
from knnlm.datastore.updates.compact import compact
from knnlm.datastore.updates.documents import add, remove
from knnlm.datastore.updates.revise import with_default_index, with_index, with_tuning
from knnlm.datastore.verify import verify
from knnlm.errors import Conflict, DatastoreCorrupt, InvalidRequest, KnnlmError, UnknownDomain, UnknownVersion
from knnlm.evaluation.index_report import refuse_shards
from knnlm.index import sharding
from knnlm.index.build import build_index, remove_index
from knnlm.index.exact import exact_neighbors
from knnlm.index.files import named, remove_unnamed
from knnlm.index.searcher import Searcher
from knnlm.index.sharded_searcher import Shard, ShardedSearcher, open_searcher
from knnlm.index.sharding import ShardResult
from knnlm.index.table import family
from knnlm.index.verify import verify as verify_with_indexes
from knnlm.messages import Document, PassagesRequest, SearchRequest, SearchResult
from knnlm.neighbors import Neighbors
from knnlm.options import SearchOptions
from knnlm.testing import ToyLanguageModel
from knnlm.tuning_records import Tuning
from tests.searching import search
from tests.sharding import sharded

DIM = 16
WORDS = ("the", "cat", "sat", "on", "mat", "and", "dog", "log", "key", "value", "near", "far", "of", "a")
RECIPES = ("flat", "ivf24", "ivf24,sq8", "pca8,ivf24+fp16", "ivf16,pq8x4fs", "hnsw8")


def documents(count: int = 60, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(count)]
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents in one folder, some 4,000 entries."""
    store = tmp_path_factory.mktemp("store")
    path = build(documents(), ToyLanguageModel(), Catalog(store), "toy")
    build_index(path, "ivf24")
    return path


@pytest.fixture(scope="module")
def in_shards(whole: Path) -> Path:
    return sharded(whole, 4)


def queries(n: int = 12, seed: int = 1) -> npt.NDArray[np.float32]:
    keys = build_queries(seed)
    return keys[:n]


def build_queries(seed: int) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (2 * rng.standard_normal((64, DIM))).astype(np.float32)


def equal(one: SearchResult, other: SearchResult) -> None:
    np.testing.assert_array_equal(one.neighbors.distances, other.neighbors.distances)
    np.testing.assert_array_equal(one.neighbors.values, other.neighbors.values)
    assert (one.neighbors.ids is None) == (other.neighbors.ids is None)
    if one.neighbors.ids is not None and other.neighbors.ids is not None:
        np.testing.assert_array_equal(one.neighbors.ids, other.neighbors.ids)
    assert (one.domain, one.passages.__len__()) == (other.domain, other.passages.__len__())
    for mine, others in zip(one.passages, other.passages, strict=True):
        assert [(p.document, p.entry, p.position, p.before.tolist(), p.after.tolist()) for p in mine] == [
            (p.document, p.entry, p.position, p.before.tolist(), p.after.tolist()) for p in others
        ]


def test_what_is_stored_is_the_same_in_the_same_order(whole: Path, in_shards: Path) -> None:
    one, many = Datastore.open(whole), Datastore.open(in_shards, check="all")
    ids = np.arange(one.entries)
    assert many.entries == one.entries == many.manifest.entries
    np.testing.assert_array_equal(np.concatenate([keys for _, keys in many.parts_of_keys()]), one.keys)
    np.testing.assert_array_equal(many.values_of(ids), one.values)
    assert [(n, row.id, row.start, row.tokens) for n, row in many.live_rows()] == [
        (n, row.id, row.start, row.tokens) for n, row in one.live_rows()
    ]
    for document in (0, 17, 59):
        np.testing.assert_array_equal(many.tokens_of(document), one.tokens_of(document))
    assert many.passage(1000, 5, 5).document == one.passage(1000, 5, 5).document
    shards = many.manifest.shards
    assert len(shards) == 4
    assert max(s.entries for s in shards) < 1.5 * one.entries / 4


def test_a_shard_is_a_version_by_itself(in_shards: Path) -> None:
    manifest = Manifest.load(in_shards)
    first = 0
    for shard in manifest.shards:
        searcher = Searcher.open(in_shards / shard.name, check="all")
        assert searcher.recipe == "ivf24"
        found = searcher.search(search("toy", queries(), 3, ids=True)).neighbors
        assert found.ids is not None
        assert found.ids.max() < shard.entries
        assert searcher.datastore.passage(0, 2, 2).document == Datastore.open(in_shards).passage(first, 2, 2).document
        assert all(check.problem is None for check in verify(in_shards / shard.name))
        first += shard.entries
    with pytest.raises(InvalidRequest, match="has shards"):
        Searcher.open(in_shards)


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


@pytest.mark.parametrize("recipe", ["flat", "ivf24", "ivf24,sq8"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_means_the_same(whole: Path, recipe: str, options: dict[str, Any]) -> None:
    one, many = indexed(whole, recipe)
    request = search("toy", queries(), **{"k": 10, **options})
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
    request = search("toy", queries(), **{"k": 10, **OPTIONS[options]})
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


def damaged(path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / path.name))


def with_forged_index(folder: Path, made: Callable[[Path], None]) -> None:
    """Give a shard the index that `made` writes, under a manifest that vouches for it."""
    index = Manifest.load(folder).index
    made(folder / "forged")
    files = named(folder / "forged")
    with_index(folder, index.model_copy(update={"file": next(iter(files))}), files)
    remove_unnamed(folder)


def problems(path: Path) -> dict[str, str]:
    return {check.name: check.problem for check in verify_with_indexes(path) if check.problem}


@pytest.mark.parametrize("recipe", ["ivf24", "pca8,ivf24+fp16", "hnsw8", "sq8"])
def test_verify_finds_an_index_of_other_keys(whole: Path, tmp_path: Path, recipe: str) -> None:
    path = damaged(sharded(whole, 2, version=f"forged-{recipe[:3]}", recipe=recipe), tmp_path)
    assert not problems(path)
    trained = (path / str(Manifest.load(path).index.file)).read_bytes()
    folders = [path / shard.name for shard in Manifest.load(path).shards]
    keys = Datastore.open(folders[1]).keys
    with_forged_index(folders[1], lambda file: void(family(recipe).add(trained, keys[::-1], file, lambda *_: None)))
    ((name, problem),) = problems(path).items()
    assert name == f"shard-00001/index {recipe}: is of these keys"
    assert "is not built from keys.npy" in problem


def void(made: object) -> None:
    del made


def test_verify_finds_the_index_of_another_shard(in_shards: Path, tmp_path: Path) -> None:
    path = damaged(in_shards, tmp_path)
    one, other = path / "shard-00001", path / "shard-00002"
    theirs = (other / str(Manifest.load(other).index.file)).read_bytes()
    with_forged_index(one, lambda file: void(file.write_bytes(theirs)))
    ((name, problem),) = problems(path).items()
    assert name == "shard-00001/index ivf24: is of these keys"
    assert re.search(r"holds \(\d+, 16\) keys, expected", problem)


def test_verify_finds_an_entry_that_is_twice_in_an_index(in_shards: Path, tmp_path: Path) -> None:
    path = damaged(in_shards, tmp_path)
    folder = path / "shard-00001"
    index: Any = faiss.read_index(str(folder / str(Manifest.load(folder).index.file)))
    ids = next(
        faiss.rev_swig_ptr(index.invlists.get_ids(n), index.invlists.list_size(n))
        for n in range(index.nlist) if index.invlists.list_size(n) > 1
    )  # fmt: skip
    ids[1] = ids[0]
    with_forged_index(folder, lambda file: faiss.write_index(index, str(file)))
    assert list(problems(path).values()) == [f"does not hold each of the entries [0, {index.ntotal}) once"]


def test_verify_finds_a_shard_that_is_a_copy_of_another(in_shards: Path, tmp_path: Path) -> None:
    path = damaged(in_shards, tmp_path)
    shutil.rmtree(path / "shard-00002")
    shutil.copytree(path / "shard-00001", path / "shard-00002")
    manifest = Manifest.load(path)
    shards = list(manifest.shards)
    shards[2] = ShardRecord.of(2, Manifest.load(path / "shard-00002"))
    counts = {name: sum(getattr(s, name) for s in shards) for name in ("entries", "documents", "tokens")}
    manifest.model_copy(update={"shards": tuple(shards), **counts}).save(path)
    assert problems(path) == {"shard-00002: is what was published": "holds the same documents and keys as shard-00001"}


def test_a_missing_shard_is_named(in_shards: Path, tmp_path: Path) -> None:
    path = damaged(in_shards, tmp_path)
    shutil.rmtree(path / "shard-00002")
    with pytest.raises(DatastoreCorrupt, match=r"shard-00002/manifest\.json is missing"):
        open_searcher(path)
    assert [c.name for c in verify(path) if c.problem] == [
        "shard-00002: is what was published", "shard-00002/manifest.json"
    ]  # fmt: skip


def test_another_shard_in_its_place_is_refused(in_shards: Path, tmp_path: Path) -> None:
    path = damaged(in_shards, tmp_path)
    shutil.rmtree(path / "shard-00002")
    shutil.copytree(path / "shard-00001", path / "shard-00002")
    with pytest.raises(DatastoreCorrupt, match=r"shard-00002 has (entries|documents|tokens|content)"):
        open_searcher(path)
    with pytest.raises(DatastoreCorrupt, match=r"shard-00002 has (entries|documents|tokens|content)"):
        Shard.open(path, Manifest.load(path), 2)  # as a node of a cluster does, which sees no other shard


def test_what_a_shard_of_another_model_differs_in_is_named(in_shards: Path, tmp_path: Path) -> None:
    path = damaged(in_shards, tmp_path)
    mine = Manifest.load(path / "shard-00001")
    mine.model_copy(update={"model": mine.model.model_copy(update={"weights_sha256": "f" * 64})}).save(
        path / "shard-00001"
    )
    for opening in (lambda: open_searcher(path), lambda: Shard.open(path, Manifest.load(path), 1)):
        with pytest.raises(DatastoreCorrupt, match=r"shard-00001 has model .*ffff.*, the version says"):
            opening()


def test_verify_reads_every_byte_of_every_shard(in_shards: Path, tmp_path: Path) -> None:
    path = damaged(in_shards, tmp_path)
    checks = list(verify(path))
    assert not [check for check in checks if check.problem]
    assert sum(check.name.endswith("keys.npy: are finite") for check in checks) == 4
    file = path / "shard-00003" / "keys.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert [c.name for c in verify(path) if c.problem] == ["shard-00003/keys.npy"]
    with pytest.raises(DatastoreCorrupt, match="has sha256"):
        open_searcher(path, check="all")


def test_indexes_are_built_used_and_removed_on_all_shards(whole: Path, tmp_path: Path) -> None:
    path = damaged(sharded(whole, 3, version="three"), tmp_path)
    shards = [path / s.name for s in Manifest.load(path).shards]
    build_index(path, "hnsw8", beside=True)
    assert [i.recipe for i in Manifest.load(path).indexes] == ["ivf24", "hnsw8"]
    assert all(Searcher.open(s).recipe == "ivf24" for s in shards)
    assert open_searcher(path, index="hnsw8").search(search("toy", queries(), 3)).neighbors.present.all()
    with_default_index(path, "hnsw8")
    assert open_searcher(path).recipe == "hnsw8"
    assert all(Searcher.open(s).recipe == "hnsw8" for s in shards)
    remove_index(path, "ivf24")
    for folder in (path, *shards):
        assert [i.recipe for i in Manifest.load(folder).indexes] == ["hnsw8"]
        assert len([*folder.glob("index.*")]) == 1
    with pytest.raises(Conflict, match="default"):
        remove_index(path, "hnsw8")
    build_index(path, "ivf24")
    assert [i.recipe for i in Manifest.load(path).indexes] == ["ivf24"]
    with pytest.raises(Conflict, match="of another training"):
        build_index(path, "ivf24", seed=7)
    build_index(path, "flat")
    assert not [file for folder in (path, *shards) for file in folder.glob("index.*")]
    assert not [check for check in verify(path) if check.problem]


def test_an_index_that_was_stopped_between_shards_changes_nothing_and_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knnlm.index import sharded_build

    path = damaged(sharded(whole, 3, version="stopped"), tmp_path)
    before = open_searcher(path).search(search("toy", queries(), 5, ids=True))
    add, calls = sharded_build.add_shard, []

    def killed(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return add(*arguments)

    monkeypatch.setattr(sharded_build, "add_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index(path, "ivf16,sq8")
    equal(open_searcher(path).search(search("toy", queries(), 5, ids=True)), before)
    monkeypatch.setattr(sharded_build, "add_shard", add)
    build_index(path, "ivf16,sq8")
    assert open_searcher(path).recipe == "ivf16,sq8"
    assert [i.recipe for i in Manifest.load(path / "shard-00000").indexes] == ["ivf16,sq8"]
    assert not [check for check in verify(path) if check.problem]


def test_a_version_of_shards_is_tuned_as_a_whole(in_shards: Path, tmp_path: Path) -> None:
    path = damaged(in_shards, tmp_path)
    with_tuning(path, Tuning(2.0, 0.3, 8, 10.0, 9.0, 100, 3))
    tuning = open_searcher(path).info(()).tuning
    assert tuning is not None
    assert tuning.temperature == 2.0


def test_growing_is_refused_and_says_what_helps(whole: Path, tmp_path: Path) -> None:
    path = sharded(Path(shutil.copytree(whole.parent, tmp_path / "toy")) / whole.name, 2)
    catalog = Catalog(tmp_path)
    catalog.activate("toy", path.name)
    changes: list[Callable[[], object]] = [
        lambda: add([Document("new", "text")], ToyLanguageModel(), catalog, "toy"),
        lambda: remove(["d1"], catalog, "toy"),
        lambda: compact(catalog, "toy", index=lambda *_: None),
    ]
    for change in changes:
        with pytest.raises(
            Conflict, match=r"has 2 shards, and shards do not change: build another .*cluster build toy"
        ):
            change()
    assert catalog.current("toy") == path.name


def test_reports_of_shards_are_refused(in_shards: Path) -> None:
    with pytest.raises(InvalidRequest, match="has 4 shards"):
        refuse_shards(in_shards)


@pytest.mark.parametrize("shards", [0, 10_001, 61])
def test_numbers_of_shards_that_cannot_be_are_refused(whole: Path, shards: int) -> None:
    with pytest.raises(InvalidRequest, match="shards"):
        sharded(whole, shards, version="none")
