import dataclasses
from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.document_table import DocumentTable, read_rows
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.errors import DatastoreCorrupt, DatastoreIncomplete, DatastoreMismatch, InvalidRequest
from knnlm.testing import TEXTS, ToyLanguageModel, toy_datastore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return toy_datastore(tmp_path)


def test_arrays_are_read_only_maps(path: Path) -> None:
    datastore = Datastore.open(path, expect=ToyLanguageModel().info)
    for array in (datastore.keys, datastore.values, datastore.tokens):
        assert isinstance(array, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    datastore.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights_sha256", "0" * 64),
        ("tokenizer_sha256", "0" * 64),
        ("config_sha256", "0" * 64),
        ("bos_token_id", None),
        ("key_function", "other"),
        ("key_dim", 17),
        ("vocab_size", 9),
    ],
)
def test_datastore_of_another_model_is_refused_with_both_values(path: Path, field: str, value: object) -> None:
    info = ToyLanguageModel().info
    with pytest.raises(DatastoreMismatch) as caught:
        Datastore.open(path, expect=dataclasses.replace(info, **{field: value}))  # type: ignore[arg-type]
    for word in (str(path), field, str(value), str(getattr(info, field))):
        assert word in caught.value.message


def test_what_does_not_change_keys_may_differ(path: Path) -> None:
    info = dataclasses.replace(ToyLanguageModel().info, model_id="renamed", device="cuda", dtype="bfloat16")
    Datastore.open(path, expect=info)


def test_what_was_not_recorded_is_not_compared(path: Path) -> None:
    manifest = Manifest.load(path)
    unknown = {"config_sha256": None, "dtype": None, "bos_token_id": None}
    manifest.model_copy(update={"model": manifest.model.model_copy(update=unknown)}).save(path)
    assert "config_sha256" not in (path / "manifest.json").read_text()
    info = dataclasses.replace(ToyLanguageModel().info, config_sha256="other", bos_token_id=None)
    Datastore.open(path, expect=info)


def test_file_of_another_size_is_refused(path: Path) -> None:
    with (path / "values.npy").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DatastoreCorrupt, match=r"values\.npy has 1289 bytes, expected 1288"):
        Datastore.open(path)


def test_missing_file_is_refused(path: Path) -> None:
    (path / "documents.jsonl").unlink()
    with pytest.raises(DatastoreCorrupt, match=r"documents\.jsonl is missing"):
        Datastore.open(path)


@pytest.mark.parametrize("read_before", [False, True])
def test_a_list_of_documents_that_goes_while_it_is_read_is_named(path: Path, read_before: bool) -> None:
    datastore = Datastore.open(path)
    if read_before:
        datastore.passages(np.array([0]), 2, 2)
    (path / "documents.jsonl").unlink()
    with pytest.raises(DatastoreCorrupt, match=r"documents\.jsonl cannot be read: No such file"):
        datastore.passages(np.array([0]), 2, 2)


@pytest.mark.parametrize(("old", "new"), [(b"<f2", b"<i2"), (b"(290, 16)", b"(290, 61)"), (b"NUMPY", b"NUMPI")])
def test_header_that_disagrees_with_the_manifest_is_refused(path: Path, old: bytes, new: bytes) -> None:
    data = (path / "keys.npy").read_bytes()
    assert old in data
    (path / "keys.npy").write_bytes(data.replace(old, new))
    with pytest.raises(DatastoreCorrupt, match=r"keys\.npy .*expected float16 of shape \(290, 16\)"):
        Datastore.open(path)


def test_building_folder_is_incomplete(path: Path) -> None:
    path.rename(path.with_name(".v1.building"))
    with pytest.raises(DatastoreIncomplete):
        Datastore.open(path.with_name(".v1.building"))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (5, 3), (1000, 1000)])
def test_passage_is_the_text_around_the_value_and_never_another_document(path: Path, before: int, after: int) -> None:
    lm, datastore = ToyLanguageModel(), Datastore.open(path)
    entry = 0
    for document, text in enumerate(TEXTS):
        tokens = lm.tokenizer.encode(text)
        for position in range(1, len(tokens)):
            passage = datastore.passage(entry, before, after)
            assert (passage.document, passage.entry, passage.position) == (str(document), entry, position)
            np.testing.assert_array_equal(passage.before, tokens[max(0, position - before) : position])
            np.testing.assert_array_equal(passage.after, tokens[position : position + after])
            entry += 1


def test_passage_can_be_shown_without_the_model(path: Path) -> None:
    from knnlm.tokenizer import Tokenizer

    tokenizer = Tokenizer((path / "tokenizer.json").read_text(), bos_token_id=None, eos_token_id=None)
    passage = Datastore.open(path).passage(4, 3, 3)
    assert (tokenizer.decode(passage.before), tokenizer.decode(passage.after)) == ("he ", "cat")


def test_entries_are_located_all_at_once(path: Path) -> None:
    datastore = Datastore.open(path)
    documents, positions = datastore.document_of(np.arange(datastore.manifest.entries))
    lengths = [len(ToyLanguageModel().tokenizer.encode(t)) for t in TEXTS]
    assert documents.tolist() == [d for d, length in enumerate(lengths) for _ in range(length - 1)]
    assert positions.tolist() == [p for length in lengths for p in range(1, length)]


@pytest.mark.parametrize("entry", [-1, 290, 10**12])
def test_entry_that_does_not_exist_is_refused(path: Path, entry: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"no entry {entry}: expected \[0, 290\)"):
        Datastore.open(path).passage(entry, 1, 1)


def test_negative_passage_is_refused(path: Path) -> None:
    with pytest.raises(InvalidRequest, match="must be >= 0, got -1 and 2"):
        Datastore.open(path).passage(0, -1, 2)


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "1", '{"id": "a"}', '{"id": 1, "start": 0, "tokens": 2}', '{"id": "a", "start": "0", "tokens": 2}'],
)
def test_malformed_document_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"id": "a", "start": 0, "tokens": 2}\n' + line + "\n")
    with pytest.raises(DatastoreCorrupt, match="line 2"):
        DocumentTable(path)


def test_documents_that_overlap_are_named(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"id": "a", "start": 0, "tokens": 2}\n{"id": "b", "start": 1, "tokens": 2}\n')
    with pytest.raises(DatastoreCorrupt, match="'b' starts at token 1, expected 2"):
        list(read_rows(path))
