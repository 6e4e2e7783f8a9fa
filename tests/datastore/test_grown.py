"""Reading a version that has grown: as one built of all its documents, numbered on, but for those that were removed."""

from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.document_table import DocumentTable
from knnlm.datastore.manifest import RemovedRecord
from knnlm.datastore.reader import Datastore
from knnlm.errors import DatastoreCorrupt, InvalidRequest
from knnlm.messages import Document
from knnlm.testing import TEXTS, ToyLanguageModel, toy_datastore
from tests.grown import base, grow, resealed

LM = ToyLanguageModel()
BASE = [Document(str(i), text) for i, text in enumerate(TEXTS)]
FIRST = [Document("a", "the cat sat on a log"), Document("none", ""), Document("1", "the other one, added again")]
SECOND = [Document("b", "a dog looked at the mat and sat down")]
REMOVED = (1, 5)  # "1" of the base, and "none", which has no entry


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return base(tmp_path / "store", BASE, LM)


@pytest.fixture
def path(parent: Path) -> Path:
    return grow(parent, LM, [FIRST, SECOND], REMOVED, numbers=[2, 5])


@pytest.fixture
def whole(tmp_path: Path) -> Datastore:
    """All of it, built at once."""
    texts = [d.text for d in (*BASE, *FIRST, *SECOND)]
    return Datastore.open(toy_datastore(tmp_path / "whole", texts=texts))


def test_the_base_stays_what_it_was_and_segments_are_beside_it(parent: Path, path: Path, whole: Datastore) -> None:
    before, store = Datastore.open(parent), Datastore.open(path)
    for name in ("keys", "values", "tokens"):
        np.testing.assert_array_equal(getattr(store, name), getattr(before, name))
        parts = [getattr(store, name), *(getattr(segment, name) for segment in store.segments)]
        assert [segment.number for segment in store.segments] == [2, 5]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(whole, name))
    assert store.entries == whole.entries == len(whole.keys)
    np.testing.assert_array_equal(store.added_keys(), whole.keys[len(before.keys) :])
    np.testing.assert_array_equal(store.added_values(), whole.values[len(before.keys) :])
    assert store.added_keys().dtype == whole.keys.dtype
    assert before.added_keys().shape == (0, 16)
    assert before.added_values().shape == (0,)


def test_one_segment_is_not_copied(parent: Path) -> None:
    store = Datastore.open(grow(parent, LM, [FIRST]))
    assert isinstance(store.added_keys(), np.memmap)


def test_values_and_documents_are_numbered_through_all(path: Path, whole: Datastore) -> None:
    store = Datastore.open(path)
    ids = np.stack(
        [np.r_[-1, np.arange(store.entries)], np.r_[np.random.default_rng(0).permutation(store.entries), -1]]
    )
    np.testing.assert_array_equal(store.values_of(ids), np.where(ids >= 0, np.asarray(whole.values)[ids], -1))
    for found, expected in zip(store.document_of(ids[ids >= 0]), whole.document_of(ids[ids >= 0]), strict=True):
        np.testing.assert_array_equal(found, expected)
    for name in ("starts", "lengths", "first_entries"):
        np.testing.assert_array_equal(getattr(store.documents, name), getattr(whole.documents, name))
    assert [store.documents.id(i) for i in range(8)] == ["0", "1", "2", "3", "a", "none", "1", "b"]
    for i in range(8):
        np.testing.assert_array_equal(store.tokens_of(i), whole.tokens_of(i))
    for wrong in (-2, store.entries):
        with pytest.raises(InvalidRequest, match=rf"no entry {wrong}: expected \[0, {store.entries}\)"):
            store.values_of(np.array([wrong]))


@pytest.mark.parametrize("around", [0, 3, 1000])
def test_passages_are_those_of_the_whole(path: Path, whole: Datastore, around: int) -> None:
    store = Datastore.open(path)
    names = ["0", "1", "2", "3", "a", "none", "1", "b"]
    for entry in range(store.entries):
        found, expected = store.passage(entry, around, around + 1), whole.passage(entry, around, around + 1)
        assert (found.document, found.position) == (names[int(expected.document)], expected.position)
        np.testing.assert_array_equal(found.before, expected.before)
        np.testing.assert_array_equal(found.after, expected.after)


def test_ids_lead_to_documents_that_count(parent: Path, path: Path) -> None:
    table = Datastore.open(path).documents
    assert table.numbers("1").tolist() == [6]  # the one that was added again
    assert table.numbers("none").tolist() == []
    assert table.numbers("b").tolist() == [7]
    assert Datastore.open(parent).documents.numbers("1").tolist() == [1]


def test_live_rows_are_what_remains(path: Path) -> None:
    store = Datastore.open(path)
    rows = list(store.live_rows())
    assert [(number, row.id) for number, row in rows] == [
        (0, "0"), (2, "2"), (3, "3"), (4, "a"), (6, "1"), (7, "b")
    ]  # fmt: skip
    assert [row.start for _, row in rows] == store.documents.starts[[0, 2, 3, 4, 6, 7]].tolist()


def test_removed_entries_are_ranges_and_neighbors_are_one(parent: Path) -> None:
    ends = np.cumsum([max(len(LM.tokenizer.encode(text)) - 1, 0) for text in TEXTS])
    for removed, expected in (
        ((), []),
        ((0,), [(0, ends[0])]),
        ((1, 3), [(ends[0], ends[1]), (ends[2], ends[3])]),
        ((0, 1, 2), [(0, ends[2])]),
        ((0, 1, 2, 3), [(0, ends[3])]),
    ):
        store = Datastore.open(grow(parent, LM, [], removed, version=f"v-{len(removed)}-{sum(removed)}"))
        assert list(zip(*store.removed, strict=True)) == expected
        assert store.manifest.live_entries == ends[3] - sum(hi - lo for lo, hi in expected)


def test_removed_documents_without_entries_leave_no_range(parent: Path) -> None:
    store = Datastore.open(grow(parent, LM, [[Document("none", ""), Document("c", "text")]], [4]))
    assert len(store.removed[0]) == 0
    assert store.documents.numbers("none").tolist() == []


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([5, 1], r"has document 1 after 5, expected ascending ones"),
        ([1, 1], r"has document 1 after 1"),
        ([1, 8], r"names document 8, expected \[0, 8\)"),
        ([-1, 5], r"names document -1, expected \[0, 8\)"),
        ([0, 5], r"removes 96 entries, expected 105"),
        ([1], r"holds int64 of shape \(1,\), expected int64 of shape \(2,\)"),
    ],
)
def test_removed_documents_that_cannot_be_are_refused(path: Path, numbers: list[int], message: str) -> None:
    np.save(path / "removed.npy", np.array(numbers, "<i8"))
    resealed(path, "removed.npy")
    with pytest.raises(DatastoreCorrupt, match=rf"removed\.npy {message}"):
        Datastore.open(path)


def test_removed_documents_of_another_dtype_are_refused(path: Path) -> None:
    np.save(path / "removed.npy", np.array(REMOVED, "<i4"))
    resealed(path, "removed.npy")
    with pytest.raises(DatastoreCorrupt, match=r"removed\.npy holds int32 .* expected int64 of shape \(2,\)"):
        Datastore.open(path)


def test_a_count_of_removed_entries_that_is_wrong_is_refused(path: Path) -> None:
    resealed(path, removed=RemovedRecord(documents=2, entries=100))
    with pytest.raises(DatastoreCorrupt, match="removes 105 entries, expected 100"):
        Datastore.open(path)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("keys.2.npy", np.zeros((48, 15), "<f2")),
        ("keys.2.npy", np.zeros((48, 16), "<f4")),
        ("values.5.npy", np.zeros(3, "<i4")),
        ("tokens.5.npy", np.zeros(40, "<i8")),
    ],
)
def test_segments_that_are_not_what_the_manifest_says_are_refused(
    path: Path, name: str, array: np.typing.NDArray[np.generic]
) -> None:
    np.save(path / name, array)
    resealed(path, name)
    with pytest.raises(DatastoreCorrupt, match=rf"{name} holds .*, expected "):
        Datastore.open(path)


def test_documents_of_a_segment_that_are_too_few_are_named(parent: Path) -> None:
    path = grow(parent, LM, [FIRST, SECOND])
    file = path / "documents.1.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    resealed(path, file.name)
    store = Datastore.open(path)
    with pytest.raises(DatastoreCorrupt, match=r"documents\.1\.jsonl has 2 documents, .*, expected 3 documents"):
        store.passage(0, 1, 1)


def test_tokens_that_the_model_does_not_have_are_not_shown(path: Path) -> None:
    tokens = np.load(path / "tokens.5.npy")
    tokens[3] = 258
    np.save(path / "tokens.5.npy", tokens)
    store = Datastore.open(path)
    with pytest.raises(DatastoreCorrupt, match=rf"text of entry {store.entries - 1} has tokens in .*\[0, 258\)"):
        store.passage(store.entries - 1, 100, 1)


def test_closed_it_holds_nothing(path: Path) -> None:
    store = Datastore.open(path)
    store.close()
    assert len(store.keys) == len(store.values) == len(store.tokens) == len(store.segments) == 0


def test_a_table_of_a_base_without_documents(tmp_path: Path) -> None:
    for name, text in (("0", ""), ("1", '{"id": "a", "start": 0, "tokens": 3}\n')):
        (tmp_path / name).write_text(text)
    table = DocumentTable(tmp_path / "0", tmp_path / "1")
    assert (table.id(0), table.part(0), table.numbers("a").tolist()) == ("a", 1, [0])
