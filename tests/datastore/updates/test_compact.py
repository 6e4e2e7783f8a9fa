"""Compacting: what grew becomes what a build of the documents that remain would have made."""

import random
from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.progress import Progress
from knnlm.datastore.reader import Datastore
from knnlm.datastore.updates import compact as module
from knnlm.datastore.updates.documents import add, remove
from knnlm.datastore.updates.revise import with_tuning
from knnlm.errors import Conflict, DatastoreCorrupt, InvalidRequest, UnknownVersion
from knnlm.index.build import build_index
from knnlm.index.compact import compact
from knnlm.index.searcher import Searcher
from knnlm.messages import Document, DomainChange, SearchRequest
from knnlm.options import SearchOptions
from knnlm.testing import ToyLanguageModel, toy_datastore
from knnlm.tuning_records import Tuning
from tests.datastore.growing import folder, forget, grow, listed, live, sound, toy_catalog

SETTINGS = {"context_length": 24, "min_context": 8, "key_dtype": "float32"}


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return toy_catalog(tmp_path)


def folded(catalog: Catalog, recipe: str | None = None) -> DomainChange:
    return compact(catalog, "toy", recipe=recipe, activate=catalog.activate)


def arrays(path: Path) -> dict[str, bytes]:
    """All but what an index adds, and the manifest."""
    return {f.name: f.read_bytes() for f in path.iterdir() if f.suffix != ".faiss" and f.name != "manifest.json"}


@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_a_build_of_the_remaining_documents_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Twin: the same documents in the same order, through the model."""
    monkeypatch.setattr(module, "SLICE_BYTES", [64, 1000, 5000, 1 << 20][seed])
    rng, lm, catalog = random.Random(seed), ToyLanguageModel(), Catalog(tmp_path / "store")
    texts = ["", *("".join(rng.choices("the cat sat ", k=rng.choice([1, 5, 70]))) for _ in range(29))]
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    build(documents[:10], lm, catalog, "toy", **SETTINGS)  # type: ignore[arg-type]
    catalog.activate("toy", "v1")
    left = {d.id: d for d in documents[:10]}
    for lo in (10, 20):
        for name in rng.sample(sorted(left), 4):
            del left[name]
        remove([d.id for d in documents[:lo] if d.id not in left and d.id in live_ids(catalog)], catalog, "toy",
               activate=catalog.activate)  # fmt: skip
        left |= {d.id: d for d in documents[lo : lo + 10]}
        add(documents[lo : lo + 10], lm, catalog, "toy", activate=catalog.activate)
    changed = Document(next(iter(left)), "another text for it")
    del left[changed.id]
    left[changed.id] = changed
    add([changed], lm, catalog, "toy", replace=True, activate=catalog.activate)
    made = folded(catalog)
    twin = build(list(left.values()), lm, Catalog(tmp_path / "twin"), "toy", **SETTINGS)  # type: ignore[arg-type]
    assert arrays(folder(catalog, made)) == arrays(twin)
    mine, other = Manifest.load(folder(catalog, made)), Manifest.load(twin)
    same = {"version": "v1", "created": other.created}
    assert mine.model_copy(update=same) == other.model_copy(update=same)
    assert sound(folder(catalog, made))
    assert catalog.current("toy") == made.version


def live_ids(catalog: Catalog) -> set[str]:
    return set(live(catalog.path("toy", catalog.current("toy") or "")))


def test_it_answers_as_the_version_it_was_made_of(catalog: Catalog) -> None:
    grow(catalog)
    parent = forget(catalog, "0", "b")
    made = folded(catalog)
    queries = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float32)
    request = SearchRequest("toy", queries, SearchOptions(k=20))
    old, new = (Searcher.open(p).search(request).neighbors for p in (folder(catalog, parent), folder(catalog, made)))
    np.testing.assert_array_equal(old.distances, new.distances)
    np.testing.assert_array_equal(old.values, new.values)


def test_tuning_is_kept_and_the_default_index_is_built_again(catalog: Catalog) -> None:
    build_index(catalog.path("toy", "v1"), "ivf4,sq8")
    build_index(catalog.path("toy", "v1"), "hnsw8", beside=True)
    grow(catalog)
    tuned = with_tuning(catalog.path("toy", "v2"), Tuning(2.0, 0.3, 8, 9.0, 8.0, 5, 1))
    manifest = Manifest.load(folder(catalog, folded(catalog)))
    assert manifest.tuning == tuned.tuning is not None
    assert [index.recipe for index in manifest.indexes] == ["ivf4,sq8"]
    assert manifest.entries == tuned.live_entries
    assert sound(catalog.path("toy", "v3"))


def test_another_index_may_be_asked_for(catalog: Catalog) -> None:
    build_index(catalog.path("toy", "v1"), "ivf4,sq8")
    grow(catalog)
    with pytest.raises(InvalidRequest, match="unknown index recipe 'magic'"):
        folded(catalog, "magic")
    assert catalog.versions("toy") == ["v1", "v2"]  # refused before anything was copied
    assert Manifest.load(folder(catalog, compact(catalog, "toy", recipe="hnsw8"))).index.recipe == "hnsw8"
    again = compact(catalog, "toy", recipe="auto")
    assert (again.version, Manifest.load(folder(catalog, again)).index.recipe) == ("v3", "flat")  # not copied twice


def test_an_index_that_does_not_suit_leaves_the_former_version(catalog: Catalog) -> None:
    grow(catalog)
    with pytest.raises(InvalidRequest, match="index pq3 does not suit"):
        folded(catalog, "pq3")
    assert (catalog.current("toy"), catalog.versions("toy")) == ("v2", ["v1", "v2", "v3"])
    assert folded(catalog, "flat").version == "v3"


def test_fewer_entries_than_the_index_had_lists(catalog: Catalog) -> None:
    build_index(catalog.path("toy", "v1"), "ivf100,flat")
    forget(catalog, "0", "1")
    made = folded(catalog)
    assert Manifest.load(folder(catalog, made)).entries < 100
    assert sound(folder(catalog, made))
    request = SearchRequest("toy", np.zeros((1, 16), np.float32), SearchOptions(k=3))
    assert Searcher.open(folder(catalog, made)).search(request).neighbors.distances.shape == (1, 3)


def test_nothing_to_fold_does_nothing(catalog: Catalog) -> None:
    assert folded(catalog) == DomainChange("toy", "v1", "v1")
    grow(catalog)
    folded(catalog)
    assert folded(catalog).version == "v3"
    assert listed(catalog) == ["CURRENT", "v1", "v2", "v3"]


def test_all_documents_removed(catalog: Catalog) -> None:
    build_index(catalog.path("toy", "v1"), "ivf4,flat")
    forget(catalog, "0", "1", "2", "3")
    made = folded(catalog)
    assert Datastore.open(folder(catalog, made)).keys.shape == (0, 16)
    assert sound(folder(catalog, made))
    assert live(folder(catalog, grow(catalog))) == ["a", "b", "c"]


def test_nothing_is_shared_but_the_tokenizer(catalog: Catalog) -> None:
    grow(catalog)
    made = folded(catalog)
    for version in ("v1", "v2"):
        catalog.remove("toy", version)
    assert {f.name for f in folder(catalog, made).iterdir() if f.stat().st_nlink > 1} == set()
    assert sound(folder(catalog, made))


def test_damage_is_found_and_not_copied(catalog: Catalog) -> None:
    made = grow(catalog)
    damaged = bytearray((folder(catalog, made) / "keys.1.npy").read_bytes())
    damaged[-1] ^= 1
    (folder(catalog, made) / "keys.1.npy").write_bytes(damaged)
    with pytest.raises(DatastoreCorrupt, match=r"keys\.1\.npy has sha256"):
        folded(catalog)
    assert listed(catalog) == ["CURRENT", "v1", "v2"]


def test_a_rollback_meanwhile_is_not_overruled(catalog: Catalog) -> None:
    grow(catalog)

    def roll_back(progress: Progress) -> None:
        catalog.activate("toy", "v1")

    with pytest.raises(Conflict, match=r"version v3 .* is not activated: it was made of v2, .* switched to v1"):
        compact(catalog, "toy", activate=catalog.activate, on_progress=roll_back)
    assert catalog.current("toy") == "v1"


def test_no_current_version_is_named(tmp_path: Path) -> None:
    toy_datastore(tmp_path, activate=False)
    with pytest.raises(UnknownVersion, match="no current version to change"):
        folded(Catalog(tmp_path))


def test_progress_is_enough_for_a_display(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE_BYTES", 1000)
    grow(catalog)
    seen: list[Progress] = []
    made = compact(catalog, "toy", recipe="ivf4", on_progress=seen.append)
    entries = Manifest.load(folder(catalog, made)).entries
    assert list(dict.fromkeys(p.phase for p in seen)) == ["copy", "index"]
    for phase in ("copy", "index"):
        done = [p.entries_done for p in seen if p.phase == phase]
        assert done == sorted(done)
        assert done[-1] == entries
    assert len([p for p in seen if p.phase == "copy"]) > 5
    assert seen[-1].seconds_left == 0
