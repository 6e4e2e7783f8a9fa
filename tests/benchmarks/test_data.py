"""The datastore of the benchmarks: which documents, how many entries, queries of other documents, made once."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data
from knnlm.datastore.document_table import read_rows
from knnlm.datastore.layout import DOCUMENTS, KEYS
from knnlm.datastore.manifest import Manifest
from knnlm.evaluation.splits import Part, part_of
from knnlm.index.searcher import Searcher
from knnlm.lm.model import LanguageModel
from knnlm.messages import Document, ForwardRequest, SearchRequest
from knnlm.options import SearchOptions

NUMBERED = [Document(f"d{i}", "x" * (1 + i % 7)) for i in range(400)]


def entries(document: Document) -> int:
    return len(document.text)


def test_no_document_is_cut_and_the_size_never_exceeded() -> None:
    for size in (10, 100, 333):
        chosen = data.cut(NUMBERED, size, entries)
        assert size - 7 < sum(map(entries, chosen)) <= size
        assert {part_of(d.id) for d in chosen} == {Part.STORE}


def test_the_order_of_the_documents_does_not_matter() -> None:
    assert data.cut(NUMBERED[::-1], 100, entries) == data.cut(NUMBERED, 100, entries)


def test_a_smaller_datastore_is_mostly_part_of_a_larger_one() -> None:
    small, large = ({d.id for d in data.cut(NUMBERED, size, entries)} for size in (100, 200))
    assert len(small - large) <= 2


def test_a_document_that_is_too_long_is_passed_over() -> None:
    long = [Document(f"d{i}", "x" * 1000) for i in range(20)]
    chosen = data.cut([*NUMBERED, *long], 100, entries)
    assert sum(map(entries, chosen)) > 93


def test_too_little_text_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"gives 1,\d+ entries, 5,000 were asked for"):
        data.cut(NUMBERED, 5000, entries)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "docs.jsonl"
    rows = [{"id": f"doc{i}", "text": f"Return item {i} of the list, or None. " * 4} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def prepared(text: Path, tmp_path_factory: pytest.TempPathFactory) -> data.Prepared:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "FOLDER", tmp_path_factory.mktemp("bench"))
        return data.prepare(900, [text], queries=64)


def test_the_datastore_has_about_the_entries_that_were_asked_for(prepared: data.Prepared) -> None:
    assert 800 < prepared.entries <= 900
    assert Manifest.load(prepared.path).tuning is not None


def test_the_queries_are_of_documents_that_are_not_stored(prepared: data.Prepared) -> None:
    stored = {row.id for row in read_rows(prepared.path / DOCUMENTS)}
    assert prepared.documents
    assert not stored & {d.id for d in prepared.documents}
    assert prepared.queries.shape == (64, Manifest.load(prepared.path).key_dim)
    assert prepared.queries.dtype == np.float32
    assert prepared.targets.shape == prepared.lm_log_probs.shape == (64,)


def test_queries_and_log_probs_are_what_the_model_says(prepared: data.Prepared) -> None:
    lm = LanguageModel.load(str(prepared.model))
    tokens = lm.tokenizer.encode(prepared.documents[0].text)
    n = len(tokens) - 1
    answer = lm.forward(ForwardRequest([tokens], [np.arange(n, dtype=np.int32)], targets=tokens[1:], keys=True))
    assert answer.keys is not None
    assert answer.target_log_probs is not None
    np.testing.assert_array_equal(prepared.targets[:n], tokens[1:])
    np.testing.assert_allclose(prepared.queries[:n], answer.keys, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(prepared.lm_log_probs[:n], answer.target_log_probs, rtol=1e-4, atol=1e-4)


def test_it_can_be_searched(prepared: data.Prepared) -> None:
    searcher = Searcher.open(prepared.path)
    try:
        found = searcher.search(SearchRequest(prepared.domain, prepared.queries, SearchOptions(k=8))).neighbors
    finally:
        searcher.close()
    assert found.values.shape == (64, 8)
    assert (found.values >= 0).all()


def test_what_is_there_is_not_made_again(prepared: data.Prepared, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "FOLDER", prepared.store.parent.parent)
    before = (prepared.path / KEYS).stat().st_mtime_ns
    again = data.prepare(900, [text], queries=64)
    assert (again.path, (again.path / KEYS).stat().st_mtime_ns) == (prepared.path, before)
    np.testing.assert_array_equal(again.queries, prepared.queries)


def test_other_text_has_another_place(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text(encoding="utf-8") * 2, encoding="utf-8")
    names = {data._fingerprint(paths) for paths in ([text], [other], [text, other], [])}
    assert len(names) == 4


def test_text_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nowhere\.txt: there is no such file"):
        data.prepare(10, [tmp_path / "nowhere.txt"])


def test_too_little_text_ends_with_what_to_do(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match=r"100,000 were asked for: give more with --text"):
        data.prepare(100_000, [text])


def options(**given: object) -> Namespace:
    return Namespace(**{"size": 900, "text": [], "datastore": None, **given})


def test_a_datastore_of_ones_own_is_asked_what_it_does_not_hold(prepared: data.Prepared, text: Path) -> None:
    own = data.asked_for(options(datastore=prepared.path, text=[text]), queries=32)
    assert (own.path, own.store, own.domain) == (prepared.path, prepared.store, prepared.domain)
    stored = {row.id for row in read_rows(prepared.path / DOCUMENTS)}
    assert own.queries.shape == (32, prepared.queries.shape[1])
    assert not stored & {d.id for d in own.documents}


def test_a_datastore_of_ones_own_needs_text_it_does_not_hold(
    prepared: data.Prepared, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="needs --text"):
        data.asked_for(options(datastore=prepared.path))
    stored = {row.id for row in read_rows(prepared.path / DOCUMENTS)}
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if json.loads(line)["id"] in stored]
    file = tmp_path / "stored.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(SystemExit, match="holds every document"):
        data.asked_for(options(datastore=prepared.path, text=[file]))
