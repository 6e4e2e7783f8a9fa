"""What a version of shards stores: damage is named, indexes are built on all shards, and shards do not change."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.updates.compact import compact
from knnlm.datastore.updates.documents import add, remove
from knnlm.datastore.updates.revise import with_default_index, with_index, with_tuning
from knnlm.datastore.verify import verify
from knnlm.errors import Conflict, DatastoreCorrupt, InvalidRequest
from knnlm.evaluation.index_report import refuse_shards
from knnlm.index.build import build_index, remove_index
from knnlm.index.files import named, remove_unnamed
from knnlm.index.searcher import Searcher
from knnlm.index.sharded_searcher import Shard, open_searcher
from knnlm.index.table import family
from knnlm.index.verify import verify as verify_with_indexes
from knnlm.messages import Document
from knnlm.testing import TEXTS, ToyLanguageModel
from knnlm.tuning_records import Tuning
from tests.index.shards import equal, in_shards, queries, whole
from tests.searching import search
from tests.sharding import sharded

__all__ = ["in_shards", "whole"]


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


def test_shards_of_the_same_documents_are_sound_and_remarked_on(tmp_path: Path) -> None:
    documents = [Document(f"{number}.txt", text) for number, text in enumerate(TEXTS)]
    path = build([*documents, *documents], ToyLanguageModel(), Catalog(tmp_path), "toy")
    in_two = sharded(path, 2)
    checks = list(verify_with_indexes(in_two))
    assert [check.problem for check in checks if check.problem] == []
    assert {check.name: check.remark for check in checks if check.remark} == {
        "shard-00001: is what was published": (
            "the version says that it holds the same documents and keys as shard-00000"
        )
    }


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
