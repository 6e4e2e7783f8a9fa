"""Stores that former releases made, kept as files: they open, answer as they did then, and grow.

stores/<release>/ was written by that release: domain "plain" (float16, exact, tuned), built with other windows than the
model's, and domain "grown" (float32, two indexes with files, two additions, two removed documents). answers.json: what
was found there for QUERIES. The documents are those of `some_documents`: the same can be built by this program.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.updates.documents import add, remove
from knnlm.datastore.updates.revise import with_tuning
from knnlm.index.build import build_index
from knnlm.index.compact import compact
from knnlm.index.searcher import Searcher
from knnlm.messages import Document, SearchRequest
from knnlm.options import SearchOptions
from knnlm.testing import ToyLanguageModel
from knnlm.tokenizer import Tokenizer
from knnlm.tuning_records import Tuning
from tests.datastore.growing import live, sound
from tests.grown import some_documents

STORES = Path(__file__).parent / "stores"
QUERIES = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
NEW = some_documents("n", [25, 35], 9)
DOCUMENTS = {
    "plain": some_documents("d", [40, 60, 1, 30, 50], 0),
    "grown": [
        *some_documents("d", [60, 80, 1, 70, 60], 1), *some_documents("a", [40, 20], 2), *some_documents("b", [30], 3),
    ],
}  # fmt: skip
REMOVED = {"plain": set[str](), "grown": {"d1", "a1"}}
DOMAINS = list(DOCUMENTS)


@pytest.fixture(params=[folder.name for folder in sorted(STORES.iterdir())])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Catalog:
    """A copy, since versions that are tuned or indexed are written into."""
    return Catalog(shutil.copytree(STORES / request.param, tmp_path / "store"))


def current(catalog: Catalog, domain: str) -> Path:
    version = catalog.current(domain)
    assert version is not None
    return catalog.path(domain, version)


def model(catalog: Catalog) -> ToyLanguageModel:
    """The toy with the tokenizer that it had then."""
    lm = ToyLanguageModel()
    text = (current(catalog, "plain") / "tokenizer.json").read_text()
    lm.tokenizer = Tokenizer(text, bos_token_id=lm.info.bos_token_id, eos_token_id=lm.info.eos_token_id)
    lm.info = replace(lm.info, tokenizer_sha256=lm.tokenizer.sha256)
    return lm


def remaining(domain: str) -> list[Document]:
    return [document for document in DOCUMENTS[domain] if document.id not in REMOVED[domain]]


def answers(catalog: Catalog) -> dict[str, Any]:  # Any: JSON
    found: dict[str, Any] = json.loads((catalog.store / "answers.json").read_text())
    return found


def test_every_version_is_sound(catalog: Catalog) -> None:
    assert catalog.domains() == ["grown", "plain"]
    assert [sound(current(catalog, domain)) for domain in DOMAINS] == [True, True]


@pytest.mark.parametrize(
    ("domain", "index"),
    [("plain", None), ("grown", None), ("grown", "flat"), ("grown", "pca8,ivf4,pq4x4fs+fp16")],
)
def test_searches_find_what_they_found_then(catalog: Catalog, domain: str, index: str | None) -> None:
    expected = answers(catalog)[f"{domain} {index or 'default'}"]
    searcher = Searcher.open(current(catalog, domain), index=index, expect=model(catalog).info, check="all")
    found = searcher.search(SearchRequest(domain, QUERIES, SearchOptions(k=6), ids=True, passages=1, passage_tokens=3))
    assert found.neighbors.ids is not None
    np.testing.assert_array_equal(found.neighbors.ids, expected["ids"])
    np.testing.assert_array_equal(found.neighbors.values, expected["values"])
    np.testing.assert_allclose(found.neighbors.distances, expected["distances"], rtol=1e-5)
    assert [row[0].document for row in found.passages] == expected["documents"]


def test_what_a_version_says_of_itself_is_read(catalog: Catalog) -> None:
    plain, grown = (Searcher.open(current(catalog, domain)).info(["v1"]) for domain in DOMAINS)
    assert plain.tuning == Tuning(2.5, 0.25, 16, 200.0, 20.0, 99, 3)
    assert (plain.context_length, plain.min_context) == (24, 8)
    assert (grown.index, grown.documents, grown.tuning) == ("ivf4,sq8", 6, None)
    assert live(current(catalog, "grown")) == [document.id for document in remaining("grown")]


@pytest.mark.parametrize("domain", DOMAINS)
def test_keys_are_those_that_this_program_makes(catalog: Catalog, domain: str, tmp_path: Path) -> None:
    """What is compacted is, byte for byte, what a build of the same documents gives now."""
    path = current(catalog, domain)
    manifest = Manifest.load(path)
    compact(catalog, domain, recipe="flat", activate=catalog.activate)  # "plain" has nothing to fold
    twin = build(
        remaining(domain), model(catalog), Catalog(tmp_path / "twin"), domain, key_dtype=manifest.key_dtype,
        context_length=manifest.windows.context_length, min_context=manifest.windows.min_context,
    )  # fmt: skip
    for file in twin.iterdir():
        if file.name != "manifest.json":
            assert (current(catalog, domain) / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("domain", DOMAINS)
def test_they_grow(catalog: Catalog, domain: str) -> None:
    before = current(catalog, domain)
    ids = [document.id for document in remaining(domain)]
    made = add(NEW, model(catalog), catalog, domain, activate=catalog.activate)
    assert (made.parent, made.added_documents, made.added_entries) == (before.name, 2, 60)
    remove([ids[0], "n0"], catalog, domain, activate=catalog.activate)
    assert live(current(catalog, domain)) == [*ids[1:], "n1"]
    assert sound(current(catalog, domain))
    datastore = Datastore.open(current(catalog, domain))
    last = np.array(datastore.segments[-1].keys[-1:], np.float32)  # of document n1
    found = Searcher.open(datastore.path).search(SearchRequest(domain, last, SearchOptions(k=1), ids=True))
    assert found.neighbors.ids is not None
    assert found.neighbors.ids.tolist() == [[datastore.entries - 1]]
    compact(catalog, domain, activate=catalog.activate)
    assert live(current(catalog, domain)) == [*ids[1:], "n1"]
    assert sound(current(catalog, domain))
    assert sound(before)


def test_they_are_tuned_and_indexed_in_place(catalog: Catalog) -> None:
    for domain in DOMAINS:
        path = current(catalog, domain)
        tuning = Tuning(1.5, 0.5, 4, 9.0, 8.0, 5, 1)
        with_tuning(path, tuning)
        build_index(path, "ivf2,flat")
        assert sound(path)
        info = Searcher.open(path).info(["v1"])
        assert (info.tuning, info.index) == (tuning, "ivf2,flat")
