"""What adding and removing make of a version. How changes are made is in test_transaction.py."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.layout import segment_files
from knnlm.datastore.manifest import Manifest, SegmentRecord
from knnlm.datastore.reader import Datastore
from knnlm.datastore.updates.documents import add
from knnlm.datastore.updates.revise import with_tuning
from knnlm.errors import (
    Conflict,
    DatastoreMismatch,
    InvalidRequest,
    ModelError,
    NotFound,
    UnknownDomain,
    UnknownVersion,
)
from knnlm.index.compact import compact
from knnlm.messages import Document, DomainChange
from knnlm.testing import TEXTS, ToyLanguageModel, toy_datastore
from knnlm.tokenizer import Tokenizer
from knnlm.tuning_records import Tuning
from tests.datastore.growing import NEW, folder, forget, grow, listed, live, sound, toy_catalog


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return toy_catalog(tmp_path)


def test_added_documents_are_a_segment_as_a_build_of_them_makes_it(catalog: Catalog, tmp_path: Path) -> None:
    made = grow(catalog)
    twin = build(NEW, ToyLanguageModel(), Catalog(tmp_path / "twin"), "toy")
    for name, as_base in zip(segment_files(1), segment_files(0), strict=True):
        assert (folder(catalog, made) / name).read_bytes() == (twin / as_base).read_bytes()
    old, new, alone = (Manifest.load(p) for p in (catalog.path("toy", "v1"), folder(catalog, made), twin))
    assert new.segments == (SegmentRecord(number=1, entries=alone.entries, documents=3, tokens=alone.tokens),)
    assert (new.entries, new.documents, new.tokens) == (
        old.entries + alone.entries, old.documents + 3, old.tokens + alone.tokens,
    )  # fmt: skip
    assert (new.format_version, new.parent, new.removed, new.version) == (2, "v1", None, "v2")
    assert made == DomainChange("toy", "v2", "v1", 3, alone.entries, advice=made.advice)
    assert catalog.current("toy") == "v2"
    assert sound(folder(catalog, made))
    assert listed(catalog) == ["CURRENT", "v1", "v2"]


def test_everything_else_is_inherited_and_shared(catalog: Catalog) -> None:
    tuning = Tuning(temperature=2.0, lmbda=0.3, k=8, lm_perplexity=9.0, knn_perplexity=8.0, tokens=5, documents=1)
    with_tuning(catalog.path("toy", "v1"), tuning)
    grow(catalog)
    second = forget(catalog, "1")
    old, new = Manifest.load(catalog.path("toy", "v1")), Manifest.load(folder(catalog, second))
    for name in ("model", "key_function", "windows", "key_dim", "key_dtype", "index", "tuning", "domain"):
        assert getattr(new, name) == getattr(old, name)
    assert new.tuning is not None
    for name in old.files:
        assert os.path.samefile(catalog.path("toy", "v1") / name, folder(catalog, second) / name)
    for name in segment_files(1):
        assert os.path.samefile(catalog.path("toy", "v2") / name, folder(catalog, second) / name)


def test_segments_follow_one_another(catalog: Catalog) -> None:
    grow(catalog)
    made = grow(catalog, [Document("d", "another one")])
    assert [(s.number, s.documents) for s in Manifest.load(folder(catalog, made)).segments] == [(1, 3), (2, 1)]
    assert live(folder(catalog, made)) == ["0", "1", "2", "3", "a", "b", "c", "d"]
    assert (made.version, made.parent) == ("v3", "v2")
    assert sound(folder(catalog, made))


def test_windows_and_dtype_are_those_of_the_version(tmp_path: Path) -> None:
    catalog, lm = Catalog(tmp_path), ToyLanguageModel()
    settings = {"context_length": 20, "min_context": 5, "key_dtype": "float32"}
    build([Document("0", TEXTS[0])], lm, catalog, "toy", **settings)  # type: ignore[arg-type]
    catalog.activate("toy", "v1")
    made = grow(catalog)
    twin = build(NEW, lm, Catalog(tmp_path / "twin"), "toy", **settings)  # type: ignore[arg-type]
    assert (folder(catalog, made) / "keys.1.npy").read_bytes() == (twin / "keys.npy").read_bytes()


def test_removed_documents_are_listed_and_counted(catalog: Catalog) -> None:
    grow(catalog)
    made = forget(catalog, "3", "a", "3")
    manifest = Manifest.load(folder(catalog, made))
    assert np.load(folder(catalog, made) / "removed.npy").tolist() == [3, 4]
    lengths = Datastore.open(folder(catalog, made)).documents.lengths
    entries = int(lengths[3] + lengths[4] - 2)
    assert manifest.removed is not None
    assert (manifest.removed.documents, manifest.removed.entries) == (2, entries)
    assert (made.removed_documents, made.removed_entries, made.added_documents) == (2, entries, 0)
    again = forget(catalog, "0")
    assert np.load(folder(catalog, again) / "removed.npy").tolist() == [0, 3, 4]
    assert np.load(folder(catalog, made) / "removed.npy").tolist() == [3, 4]  # what was published does not change
    assert Manifest.load(folder(catalog, again)).live_entries == manifest.live_entries - int(lengths[0] - 1)
    assert live(folder(catalog, again)) == ["1", "2", "b", "c"]
    assert sound(folder(catalog, again))
    assert sound(folder(catalog, made))


def test_all_documents_may_be_removed_and_others_added(catalog: Catalog) -> None:
    made = forget(catalog, "0", "1", "2", "3")
    assert (Manifest.load(folder(catalog, made)).live_entries, live(folder(catalog, made))) == (0, [])
    assert live(folder(catalog, grow(catalog, [Document("0", "back again")]))) == ["0"]


def test_an_unknown_id_removes_nothing(catalog: Catalog) -> None:
    forget(catalog, "2")
    with pytest.raises(NotFound, match=r"v2 has no document '2', 'p', 'q', 'r', 's' and 2 more: nothing was removed"):
        forget(catalog, "0", "2", "p", "q", "r", "s", "t", "u")
    with pytest.raises(InvalidRequest, match="no id of a document"):
        forget(catalog)
    assert listed(catalog) == ["CURRENT", "v1", "v2"]


def test_an_id_of_several_documents_removes_all_of_them(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    build([Document(i, "text") for i in "aba"], ToyLanguageModel(), catalog, "toy")
    catalog.activate("toy", "v1")
    assert live(folder(catalog, forget(catalog, "a"))) == ["b"]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([Document("x", "new"), Document("1", "old")], "version v1 has a document '1' already: replace it"),
        ([Document("x", "new"), Document("y", "new"), Document("x", "other")], "two of the documents have the id 'x'"),
    ],
)
def test_ids_that_clash_add_nothing(catalog: Catalog, documents: list[Document], message: str) -> None:
    with pytest.raises(Conflict, match=message):
        grow(catalog, documents)
    assert listed(catalog) == ["CURRENT", "v1"]


def test_replacing_is_one_change(catalog: Catalog) -> None:
    lengths = Datastore.open(catalog.path("toy", "v1")).documents.lengths
    made = grow(catalog, [Document("1", "another text"), Document("n", "new")], replace=True)
    assert live(folder(catalog, made)) == ["0", "2", "3", "1", "n"]
    assert (made.added_documents, made.removed_documents, made.removed_entries) == (2, 1, lengths[1] - 1)
    again = grow(catalog, [Document("1", "a third text")], replace=True)
    assert live(folder(catalog, again)) == ["0", "2", "3", "n", "1"]
    assert sound(folder(catalog, again))


def test_what_was_removed_may_be_added_again(catalog: Catalog) -> None:
    forget(catalog, "1")
    assert live(folder(catalog, grow(catalog, [Document("1", "another text")]))) == ["0", "2", "3", "1"]


def test_no_document_is_refused_and_one_without_tokens_is_listed(tmp_path: Path) -> None:
    class WithoutBos(ToyLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = Tokenizer(self.tokenizer.json, bos_token_id=None, eos_token_id=None)

    catalog, lm = Catalog(tmp_path), WithoutBos()
    build([Document("0", "text")], lm, catalog, "toy")
    catalog.activate("toy", "v1")
    with pytest.raises(InvalidRequest, match="no document to add"):
        grow(catalog, [], lm)
    assert listed(catalog) == ["CURRENT", "v1"]
    made = grow(catalog, [Document("x", "x"), Document("e", "")], lm)
    assert (made.added_documents, made.added_entries) == (2, 0)
    assert live(folder(catalog, made)) == ["0", "x", "e"]
    assert sound(folder(catalog, made))
    assert forget(catalog, "x").removed_entries == 0


def test_a_version_of_nothing_can_grow(tmp_path: Path) -> None:
    catalog = toy_catalog(tmp_path)
    forget(catalog, *"0123")
    assert live(folder(catalog, compact(catalog, "toy", activate=catalog.activate))) == []
    assert live(folder(catalog, grow(catalog))) == ["a", "b", "c"]


def test_another_model_is_refused(catalog: Catalog) -> None:
    with pytest.raises(DatastoreMismatch, match=r"weights_sha256 \w{64}, model toy has weights_sha256 \w{64}"):
        grow(catalog, NEW, ToyLanguageModel(seed=1))
    other, short, lying = ToyLanguageModel(), ToyLanguageModel(), ToyLanguageModel()
    other.info = dataclasses.replace(other.info, key_function="other")
    with pytest.raises(DatastoreMismatch, match="key_function toy, model toy has key_function other"):
        grow(catalog, NEW, other)
    short.info = dataclasses.replace(short.info, context_length=31)
    with pytest.raises(DatastoreMismatch, match="windows of 32 tokens, model toy takes 31"):
        grow(catalog, NEW, short)
    half = ToyLanguageModel()
    half.info = dataclasses.replace(half.info, dtype="bfloat16")
    with pytest.raises(DatastoreMismatch, match="were made in float32, model toy runs in bfloat16"):
        grow(catalog, NEW, half)
    lying.tokenizer = Tokenizer(lying.tokenizer.json + " ", bos_token_id=0, eos_token_id=1)
    with pytest.raises(ModelError, match="the tokenizer of model toy"):
        grow(catalog, NEW, lying)


@pytest.mark.parametrize("document", [Document("\ud800", "text"), Document("id", "text \udc80")])
def test_what_is_not_text_is_named(catalog: Catalog, document: Document) -> None:
    with pytest.raises(InvalidRequest, match=r"of document '.*' is not text"):
        grow(catalog, [document])
    assert listed(catalog) == ["CURRENT", "v1"]


def test_domains_that_cannot_change_are_named(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    with pytest.raises(UnknownDomain, match="unknown domain 'toy'"):
        grow(catalog)
    toy_datastore(tmp_path, activate=False)
    with pytest.raises(UnknownVersion, match="no current version to change: activate one, it has v1"):
        grow(catalog)
    for name in ("batch_tokens", "part_entries"):
        with pytest.raises(InvalidRequest, match=f"{name} must be >= 1, got 0"):
            add(NEW, ToyLanguageModel(), catalog, "toy", **{name: 0})  # type: ignore[arg-type]


def test_special_tokens_in_documents_are_text_but_where_they_always_counted(catalog: Catalog) -> None:
    def tokens(path: Path) -> list[int]:
        datastore = Datastore.open(path)
        last: list[int] = datastore.tokens_of(len(datastore.documents) - 1).tolist()
        return last

    text, lm = Document("web", "a <s> b"), ToyLanguageModel()
    assert tokens(catalog.path("toy", grow(catalog, [text]).version)) == lm.tokenizer.encode(text.text).tolist()
    path = catalog.path("toy", "v1")
    manifest = Manifest.load(path)
    assert not manifest.windows.parse_special
    manifest.model_copy(update={"windows": manifest.windows.model_copy(update={"parse_special": True})}).save(path)
    assert "parse_special" not in (path / "manifest.json").read_text()  # as before it was recorded
    catalog.activate("toy", "v1")
    assert (
        tokens(catalog.path("toy", grow(catalog, [text]).version))
        == lm.tokenizer.encode(text.text, parse_special=True).tolist()
    )
