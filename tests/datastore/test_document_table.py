"""The table of documents: finding them by their ids."""

import json
from pathlib import Path

import pytest

from knnlm.datastore import document_table as documents
from knnlm.datastore.document_table import DocumentTable

IDS = ["b", "a", "", "a", "naïve/café", "\ud800", "b\n"]


def table(folder: Path, ids: list[str]) -> DocumentTable:
    rows = [json.dumps({"id": name, "start": 3 * i, "tokens": 3}) + "\n" for i, name in enumerate(ids)]
    (folder / "documents.jsonl").write_text("".join(rows))
    return DocumentTable(folder / "documents.jsonl")


def test_documents_are_found_by_their_ids(tmp_path: Path) -> None:
    found = table(tmp_path, IDS)
    for name in IDS:
        assert found.numbers(name).tolist() == [i for i, other in enumerate(IDS) if other == name]
    assert found.numbers("c").tolist() == []


def test_ids_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(documents, "_hash", lambda name: len(name) % 2)
    found = table(tmp_path, IDS)
    assert found.numbers("a").tolist() == [1, 3]
    assert found.numbers("c").tolist() == []


def test_no_documents_hold_no_id(tmp_path: Path) -> None:
    assert table(tmp_path, []).numbers("a").tolist() == []
