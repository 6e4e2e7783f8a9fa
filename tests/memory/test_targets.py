"""p_kNN of every entry against brute force over the stored keys; what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.reader import Datastore
from knnlm.datastore.updates.documents import add, remove
from knnlm.errors import DatastoreCorrupt, InvalidRequest
from knnlm.index.build import build_index
from knnlm.index.searcher import Searcher
from knnlm.memory.examples import Examples
from knnlm.memory.making import LEAST_MASS, target_rows
from knnlm.memory.manifest import FitRecord, StoreRecord, TargetSettings
from knnlm.memory.targets import Targets
from knnlm.messages import Document, SearchRequest, SearchResult
from knnlm.neighbors import Neighbors, TokenMasses
from knnlm.options import SearchOptions
from knnlm.testing import TEXTS, ToyLanguageModel, toy_datastore
from tests.memory.making import TWINS, K, T, make, store

__all__ = ["store"]


def brute_force(
    datastore: Datastore, entry: int, exclude: str, k: int = K, temperature: float = T
) -> npt.NDArray[np.float64]:
    """(V,) p_kNN by its definition, for the key of an entry without itself, or without its document."""
    keys = datastore.keys.astype(np.float64)
    distances = ((keys - keys[entry]) ** 2).sum(axis=1)
    document, _ = datastore.document_of(np.arange(datastore.entries))
    gone = document == document[entry] if exclude == "document" else np.arange(datastore.entries) == entry
    distances[gone] = np.inf
    nearest = np.argsort(distances, kind="stable")[:k]
    p = np.zeros(datastore.manifest.model.vocab_size)
    np.add.at(p, datastore.values[nearest], np.exp((distances.min() - distances[nearest]) / temperature))
    whole: npt.NDArray[np.float64] = p / p.sum()
    return whole


def dense(rows: TokenMasses, vocab_size: int) -> npt.NDArray[np.float64]:
    return np.exp(rows.dense(vocab_size))


@pytest.mark.parametrize("exclude", ["entry", "document"])
def test_targets_are_p_knn_by_its_definition(store: Path, tmp_path: Path, exclude: str) -> None:
    made = make(store, tmp_path / "targets", exclude=exclude, top=300)
    targets = Targets.open(tmp_path / "targets", check="all")
    datastore = Datastore.open(store / "toy/v1")
    assert made.rows == len(targets) == datastore.entries
    ids = np.arange(datastore.entries)
    rows, kept = targets.rows(ids)
    found = dense(rows, datastore.manifest.model.vocab_size)
    expected = np.array([brute_force(datastore, i, exclude) for i in ids.tolist()])
    expected[expected < LEAST_MASS] = 0
    np.testing.assert_allclose(found, expected / expected.sum(axis=1, keepdims=True), atol=1e-3)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(kept, expected.sum(axis=1), atol=1e-4)
    whole = np.array([brute_force(datastore, i, exclude) for i in ids.tolist()])
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(whole > 0, whole * np.log(whole), 0).sum(axis=1)
    assert made.shape.entropy == pytest.approx(entropy.mean(), abs=1e-4)
    assert made.shape.largest == pytest.approx(whole.max(axis=1).mean(), abs=1e-4)
    assert made.shape.support == pytest.approx((whole > 0).sum(axis=1).mean(), abs=0.1)
    assert made.shape.of_value == pytest.approx(whole[ids, datastore.values].mean(), abs=1e-4)


def test_the_entry_itself_is_left_out_by_its_number_and_its_twin_is_not(store: Path, tmp_path: Path) -> None:
    """At a temperature this low the nearest neighbor alone counts: the twin, at distance 0, stores the same token."""
    make(store, tmp_path / "entry", temperature=1e-6, ks=[1])
    make(store, tmp_path / "document", temperature=1e-6, ks=[1], exclude="document")
    datastore = Datastore.open(store / "toy/v1")
    twins = np.arange(1, len(TEXTS[0]))  # the first entry of every document has the same context
    for name in ("entry", "document"):  # the twin lies in another document
        rows, _ = Targets.open(tmp_path / name).rows(twins)
        np.testing.assert_array_equal(rows.tokens, datastore.values[twins])
    alone = np.arange(len(TEXTS[0]), len(TEXTS[0]) + 8)  # without a twin: distance 0 would be the entry itself
    rows, _ = Targets.open(tmp_path / "entry").rows(alone)
    expected = [brute_force(datastore, i, "entry", 1, 1e-6).argmax() for i in alone.tolist()]
    np.testing.assert_array_equal(rows.tokens, expected)


def test_distances_are_those_to_stored_keys_whatever_the_index_keeps(tmp_path: Path) -> None:
    path = toy_datastore(tmp_path / "store", texts=TWINS)
    build_index(path, "ivf4,pq4")  # a code of 4 bytes for 16 dimensions: its own distances are far off
    k = Datastore.open(path).entries - 1
    make(tmp_path / "store", tmp_path / "coded", ks=[k], top=300)
    toy_datastore(tmp_path / "exact", texts=TWINS)
    make(tmp_path / "exact", tmp_path / "flat", ks=[k], top=300)
    ids = np.arange(k + 1)
    coded, exact = (dense(Targets.open(tmp_path / n).rows(ids)[0], 258) for n in ("coded", "flat"))
    np.testing.assert_allclose(coded, exact, atol=1e-3)


def test_the_tuning_of_the_domain_stays_what_it_was(store: Path, tmp_path: Path) -> None:
    before = (store / "toy/v1/manifest.json").read_bytes()
    make(store, tmp_path / "targets", temperature=0.5)
    assert (store / "toy/v1/manifest.json").read_bytes() == before


def test_targets_that_know_the_rest_of_their_documents_are_too_sharp(tmp_path: Path, store: Path) -> None:
    made = make(store, tmp_path / "targets")
    shape = made.shape.model_copy(update={"largest": made.shape.largest / 1.3})
    fit = FitRecord(tokens=1, documents=1, lmbda=0.5, lm_perplexity=2, knn_perplexity=1, shape=shape)
    assert not made.too_sharp
    assert made.model_copy(update={"fit": fit}).too_sharp
    assert not made.model_copy(update={"fit": fit.model_copy(update={"shape": made.shape})}).too_sharp


def test_only_the_likeliest_tokens_are_kept_and_what_that_loses_is_recorded(store: Path, tmp_path: Path) -> None:
    made = make(store, tmp_path / "targets", top=2, temperature=20.0)
    targets = Targets.open(tmp_path / "targets")
    datastore = Datastore.open(store / "toy/v1")
    rows, kept = targets.rows(np.arange(datastore.entries))
    assert np.diff(rows.offsets).max() == 2
    for entry in range(0, datastore.entries, 40):
        p = brute_force(datastore, entry, "entry", temperature=20.0)
        best = np.sort(p)[-2:]
        assert kept[entry] == pytest.approx(best.sum(), abs=1e-5)
        np.testing.assert_allclose(np.sort(np.exp(rows.row(entry)[1])), best / best.sum(), atol=1e-3)
    assert made.kept == pytest.approx(kept.mean(), abs=1e-6)
    assert made.kept < 0.9


def test_neighbors_in_any_order_give_the_same_targets(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some searches on a GPU do not sort what they find: nothing may depend on a neighbor's rank."""
    searcher = Searcher.open(store / "toy/v1")
    ids = np.arange(0, searcher.datastore.entries, 3)
    settings = TargetSettings(
        store=StoreRecord.of(searcher.manifest), exclude="entry", k=K, temperature=T, top=9, index=searcher.recipe,
        part_entries=100,
    )  # fmt: skip
    rows = target_rows(searcher, searcher.datastore, ids, settings)
    request = SearchRequest("toy", searcher.datastore.keys_of(ids), SearchOptions(k=K))
    assert (np.diff(searcher.search(request).neighbors.distances) >= 0).all()  # smaller k are the first columns
    search = Searcher.search

    def shuffled(self: Searcher, request: SearchRequest) -> SearchResult:
        found = search(self, request)
        near = found.neighbors
        order = np.random.default_rng(0).permutation(near.distances.shape[1])
        return replace(found, neighbors=Neighbors(near.distances[:, order], near.values[:, order]))

    monkeypatch.setattr(Searcher, "search", shuffled)
    other = target_rows(searcher, searcher.datastore, ids, settings)
    np.testing.assert_array_equal(rows.masses.tokens, other.masses.tokens)
    np.testing.assert_allclose(rows.masses.log_masses, other.masses.log_masses, atol=1e-9)
    np.testing.assert_allclose(rows.of_value, other.of_value, atol=1e-9)


def test_targets_of_a_sample_are_those_of_whole_documents(store: Path, tmp_path: Path) -> None:
    made = make(store, tmp_path / "some", max_entries=100)
    make(store, tmp_path / "all")
    some, every = Targets.open(tmp_path / "some"), Targets.open(tmp_path / "all")
    datastore = Datastore.open(store / "toy/v1")
    documents = set(datastore.document_of(some.entries)[0].tolist())
    lengths = {number: row.entries for number, row in datastore.live_rows()}
    assert 100 <= made.entries == len(some) == sum(lengths[d] for d in documents) < len(every)
    np.testing.assert_array_equal(some.rows(some.entries)[0].tokens, every.rows(some.entries)[0].tokens)
    examples = Examples(datastore, some, beta=0.5, seed=0, batch_entries=1, keys=False)
    assert examples.entries == len(some)


def test_rows_are_named_by_entries_in_any_order(store: Path, tmp_path: Path) -> None:
    make(store, tmp_path / "targets")
    targets = Targets.open(tmp_path / "targets")
    all_rows, _ = targets.rows(np.arange(len(targets)))
    some = np.array([7, 3, 3, 200])
    rows, _ = targets.rows(some)
    for place, entry in enumerate(some):
        np.testing.assert_array_equal(rows.row(place)[0], all_rows.row(int(entry))[0])
    with pytest.raises(InvalidRequest, match="no target for entry 99999"):
        targets.rows(np.array([99999]))


def test_entries_without_another_document_have_empty_rows(tmp_path: Path) -> None:
    toy_datastore(tmp_path / "store", texts=TEXTS[:1])
    made = make(tmp_path / "store", tmp_path / "targets", exclude="document")
    assert (made.rows, made.empty, made.masses) == (0, len(TEXTS[0]), 0)
    rows, kept = Targets.open(tmp_path / "targets").rows(np.arange(5))
    assert len(rows.tokens) == 0
    assert kept.max() == 0


def test_removed_documents_are_no_neighbors_and_have_no_rows(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "store")
    toy_datastore(tmp_path / "store")
    change = remove(["0"], catalog, "toy", activate=catalog.activate)
    made = make(tmp_path / "store", tmp_path / "targets", top=300)
    targets = Targets.open(tmp_path / "targets")
    datastore = Datastore.open(catalog.path("toy", change.version))
    gone = len(TEXTS[0])
    np.testing.assert_array_equal(targets.entries, np.arange(gone, datastore.entries))
    rows, _ = targets.rows(targets.entries)
    assert made.rows == len(rows)
    spoken = set(datastore.values[gone:].tolist())
    assert set(rows.tokens.tolist()) <= spoken


def test_another_order_of_the_entries_changes_nothing(store: Path, tmp_path: Path) -> None:
    toy_datastore(tmp_path / "store", texts=TWINS)  # without an index
    make(tmp_path / "store", tmp_path / "flat", part_entries=77)
    make(store, tmp_path / "ivf")
    a, b = Targets.open(tmp_path / "flat"), Targets.open(tmp_path / "ivf")
    ids = np.arange(len(a))
    np.testing.assert_array_equal(a.rows(ids)[0].tokens, b.rows(ids)[0].tokens)
    np.testing.assert_array_equal(a.rows(ids)[0].log_masses, b.rows(ids)[0].log_masses)
    grouped = Searcher.open(store / "toy/v1").index.grouped()
    assert grouped is not None
    assert not np.array_equal(grouped, ids)
    np.testing.assert_array_equal(np.sort(grouped), ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "none"}, "exclude must be one of entry, document, got 'none'"),
        ({"ks": [0]}, "k must be at least 1, got 0"),
        ({"top": 0}, "top must be at least 1, got 0"),
        ({"part_entries": 0}, "part_entries must be at least 1"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0"),
        ({"max_entries": 0}, "max_entries must be at least 1, got 0"),
        ({"ks": [8, 16]}, r"a given temperature belongs to one k, got \[8, 16\]"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    store: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(store, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_what_was_changed_on_disk_is_refused(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(store, out)
    data = bytearray((out / "masses.npy").read_bytes())
    data[-1] ^= 1
    (out / "masses.npy").write_bytes(data)
    with pytest.raises(DatastoreCorrupt, match=r"masses\.npy has sha256"):
        Targets.open(out, check="all")
    (out / "kept.npy").write_bytes(b"")
    with pytest.raises(DatastoreCorrupt, match=r"kept\.npy has 0 bytes, expected"):
        Targets.open(out)
    text = (out / "targets.json").read_text()
    (out / "targets.json").write_text(text.replace('"top": 128', '"top": 129'))
    with pytest.raises(DatastoreCorrupt, match=r"targets\.json was changed"):
        Targets.open(out)


def test_what_was_made_from_a_version_is_stale_once_the_domain_says_something_else(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "store")
    toy_datastore(tmp_path / "store")
    made = make(tmp_path / "store", tmp_path / "targets").store
    assert made.stale(catalog) is None
    build_index(catalog.path("toy", "v1"), "ivf2,flat")  # another index is the same content
    assert made.stale(catalog) is None
    remove(["0"], catalog, "toy", activate=catalog.activate)
    assert "made from toy v1" in str(made.stale(catalog))
    assert isinstance(made, StoreRecord)
    assert "whether it is stale cannot be told" in str(made.stale(Catalog(tmp_path / "elsewhere")))


def test_a_version_that_has_grown_is_learnt_whole(tmp_path: Path) -> None:
    """Entries of segments have keys, windows and targets as those of the base; removed ones have none."""
    lm, catalog = ToyLanguageModel(), Catalog(tmp_path / "store")
    build_index(toy_datastore(tmp_path / "store"), "ivf4,flat")
    for i in range(2):
        add([Document(f"more{i}", f"the cat sat on the log, {i}")], lm, catalog, "toy", activate=catalog.activate)
    remove(["1"], catalog, "toy", activate=catalog.activate)
    make(tmp_path / "store", tmp_path / "targets", top=300)
    datastore = Datastore.open(catalog.path("toy", str(catalog.current("toy"))))
    targets = Targets.open(tmp_path / "targets")
    live = datastore.live_entries()
    assert datastore.entries > len(live) == len(targets)
    np.testing.assert_array_equal(targets.entries, live)
    keys = datastore.keys_of(live).astype(np.float64)
    for place in (0, len(live) - 30, len(live) - 1):  # of the base, and of both segments
        distances = ((keys - keys[place]) ** 2).sum(axis=1)
        distances[place] = np.inf
        nearest = np.argsort(distances, kind="stable")[:K]
        p = np.zeros(datastore.manifest.model.vocab_size)
        np.add.at(p, datastore.values_of(live[nearest]), np.exp(-distances[nearest] / T))
        p[p < LEAST_MASS * p.sum()] = 0
        found = dense(targets.rows(live[place : place + 1])[0], len(p))[0]
        np.testing.assert_allclose(found, p / p.sum(), atol=1e-3)
    examples = Examples(datastore, targets, beta=0.5, seed=0, batch_entries=len(live), keys=True)
    batch = next(examples.batches())  # every value is compared with the window that predicts it
    assert examples.entries == len(live)
    assert batch.keys is not None
    order, expected = (np.lexsort(k.T) for k in (batch.keys, keys))
    np.testing.assert_array_equal(batch.keys[order], keys[expected].astype(np.float32))
