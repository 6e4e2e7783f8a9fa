"""Reports and splits over a version that has grown: its added documents count, its removed ones do not."""

from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.reader import Datastore
from knnlm.evaluation.collect import observe
from knnlm.evaluation.index_candidates import candidates
from knnlm.evaluation.index_report import index_report
from knnlm.evaluation.splits import encode, unseen
from knnlm.index.searcher import Searcher
from knnlm.messages import Document
from knnlm.options import DomainOptions, KnnOptions, SearchOptions
from knnlm.pipeline import Pipeline
from knnlm.testing import ToyLanguageModel, toy_datastore
from tests.grown import base, grow, some_documents

LM = ToyLanguageModel(key_dim=16)
BASE = some_documents("base", [200, 150, 250], seed=0)
ADDED = [some_documents("added", [120, 90], seed=1)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return grow(base(tmp_path / "store", BASE, LM), LM, ADDED, [1, 4])


def test_what_was_added_is_seen_and_what_was_removed_is_not(path: Path) -> None:
    asked = [*BASE, *ADDED[0], Document("other id", ADDED[0][0].text), Document("new", "abc abc abc")]
    found = unseen(encode(asked, LM.tokenizer), path)
    assert [d.id for d in found] == ["base1", "added1", "new"]


def test_a_report_compares_indexes_beside_what_was_added(path: Path, tmp_path: Path) -> None:
    """Exact search is that of a version built of the rest: so are the figures that follow from it."""
    held_out = observe(LM, encode(some_documents("new", [60, 60], seed=5), LM.tokenizer))
    rest = [BASE[0], BASE[2], ADDED[0][0]]
    twin = toy_datastore(tmp_path / "twin", LM, texts=[d.text for d in rest])
    reports = []
    for name, version in (("grown", path), ("twin", twin)):
        size = (Datastore.open(version).manifest.base_entries, 16)
        chosen = candidates(["flat", "ivf4,flat"], *size)
        reports.append(
            index_report(version, held_out, chosen, tmp_path / name, batches=(1,), ks=(8,), seconds=0.01, rounds=1)
        )
    grown, expected = reports
    assert (grown.entries, grown.exact) == (expected.entries, expected.exact)
    flat = grown.lines[0]
    assert flat.quality.recalls == {8: 1.0}
    assert flat.bytes_per_key == 4 * 16
    assert [line.name for line in grown.lines] == [line.name for line in expected.lines]
    assert all(line.quality.recalls[8] > 0.5 for line in grown.lines)
    assert np.isfinite([line.quality.perplexity for line in grown.lines]).all()


def test_a_pipeline_over_it_predicts_as_over_one_built_of_the_rest(path: Path, tmp_path: Path) -> None:
    rest = [BASE[0], BASE[2], ADDED[0][0]]
    twin = toy_datastore(tmp_path / "twin", LM, texts=[d.text for d in rest])
    knn = KnnOptions((DomainOptions("toy", temperature=3.0, lmbda=0.5),), search=SearchOptions(k=20))
    scores = []
    for version in (path, twin):
        with Pipeline(LM, {"toy": Searcher.open(version, expect=LM.info)}) as pipeline:
            scores.append(pipeline.score("abc abd hab", knn))
    np.testing.assert_array_equal(scores[0].log_probs, scores[1].log_probs)


def test_what_was_found_of_a_version_is_not_taken_for_another(path: Path, tmp_path: Path) -> None:
    held_out = observe(LM, encode(some_documents("new", [60], seed=5), LM.tokenizer))
    other = grow(path.with_name("v1"), LM, ADDED, [0], version="v3")
    found = [
        index_report(version, held_out, candidates(["flat"], 600, 16), tmp_path / "work", batches=(1,), ks=(8,),
                     seconds=0.01, rounds=1)
        for version in (path, other)
    ]  # fmt: skip
    assert found[0].exact != found[1].exact
