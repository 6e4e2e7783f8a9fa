"""Reports: sums by hand, and what must stand in each."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.errors import InvalidRequest
from knnlm.evaluation.perplexity import DocumentFigures, Report, evaluate
from knnlm.evaluation.splits import encode
from knnlm.index.searcher import Searcher
from knnlm.messages import Document
from knnlm.options import DomainOptions, KnnOptions, SearchOptions
from knnlm.pipeline import Pipeline
from knnlm.testing import TEXTS, ToyLanguageModel, toy_datastore

LM = ToyLanguageModel()
DOCUMENTS = encode([Document("one", "the dög sat on the log"), Document("two", "so did the cat")], LM.tokenizer)
KNN = KnnOptions((DomainOptions("toy", lmbda=0.3, temperature=3.0),), search=SearchOptions(k=8))


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    with Pipeline(LM, {"toy": Searcher.open(toy_datastore(tmp_path, LM))}) as opened:
        yield opened


def test_figures_are_the_sums_over_documents(pipeline: Pipeline) -> None:
    report = evaluate(pipeline, DOCUMENTS, KNN)
    mixed = np.concatenate([pipeline.score(d.tokens, KNN).log_probs for d in DOCUMENTS])
    lm = np.concatenate([pipeline.score(d.tokens).log_probs for d in DOCUMENTS])
    assert report.tokens == len(mixed) == 37  # bytes: the BOS is not predicted
    assert report.lm.perplexity == pytest.approx(np.exp(-lm.mean()), rel=1e-6)
    assert report.knn is not None
    assert report.knn.perplexity == pytest.approx(np.exp(-mixed.mean()), rel=1e-9)
    assert report.knn.bits_per_byte == pytest.approx(-mixed.sum() / math.log(2) / 37, rel=1e-9)
    assert report.knn.word_perplexity == pytest.approx(np.exp(-mixed.sum() / 10), rel=1e-9)
    assert report.improved == pytest.approx((mixed > lm).mean())
    assert [(d.id, d.tokens, d.text_bytes, d.words) for d in report.documents] == [
        ("one", 23, 23, 6),
        ("two", 14, 14, 4),
    ]


def test_lambda_zero_reports_the_model_twice(pipeline: Pipeline) -> None:
    report = evaluate(pipeline, DOCUMENTS, KnnOptions((DomainOptions("toy", lmbda=0.0, temperature=1.0),)))
    assert report.knn is not None
    assert report.knn.perplexity == pytest.approx(report.lm.perplexity, rel=1e-12)
    assert report.improved == 0


def test_without_domains_there_is_only_the_model(pipeline: Pipeline) -> None:
    report = evaluate(pipeline, DOCUMENTS)
    assert report.knn is None
    assert report.domains == ()
    assert report.leaks == {}
    assert report.as_json()["knn"] is None


def test_every_report_names_policy_values_and_versions(pipeline: Pipeline) -> None:
    written = json.loads(json.dumps(evaluate(pipeline, DOCUMENTS, KNN, min_context=7).as_json()))
    assert (written["context_length"], written["min_context"], written["tokens"]) == (32, 7, 37)
    assert written["model_id"] == "toy"
    assert written["domains"] == [
        {"domain": "toy", "version": "v1", "temperature": 3.0, "lambda": 0.3, "k": 8, "rule": "fixed"}
    ]
    assert [d["id"] for d in written["documents"]] == ["one", "two"]


def test_window_policy_changes_the_figure(pipeline: Pipeline) -> None:
    long = encode([Document("long", TEXTS[0])], LM.tokenizer)
    assert evaluate(pipeline, long, min_context=1).lm != evaluate(pipeline, long, min_context=31).lm


def test_stored_documents_raise_the_alarm_and_others_do_not(pipeline: Pipeline) -> None:
    leaked = evaluate(pipeline, encode([Document("copy", TEXTS[1])], LM.tokenizer), KNN)
    assert leaked.leaks == {"toy": 1.0}
    assert "100% of the queries coincide with keys of toy" in leaked.warnings[0]
    fresh = encode([Document("fresh", "?! 123 zyx never QUITE like this; 4567, 89 & 1011 WHO?")], LM.tokenizer)
    assert evaluate(pipeline, fresh, KNN).warnings == ()


def test_stored_text_coincides_wholly_whatever_the_windows_it_was_stored_with(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    path = build([Document("copy", 4 * TEXTS[1])], LM, catalog, "toy", context_length=8, min_context=5)
    documents = encode([Document("again", 4 * TEXTS[1])], LM.tokenizer)
    with Pipeline(LM, {"toy": Searcher.open(path)}) as pipeline:
        report = evaluate(pipeline, documents, KNN)
        assert (report.context_length, report.min_context, report.leaks) == (8, 5, {"toy": 1.0})
        other = evaluate(pipeline, documents, KNN, context_length=32, min_context=16)
        assert (other.context_length, other.min_context) == (32, 16)
        assert other.leaks["toy"] < 1
        assert report.lm != other.lm


def test_progress_counts_to_the_last_token(pipeline: Pipeline) -> None:
    seen: list[int] = []
    evaluate(pipeline, DOCUMENTS, on_progress=seen.append)
    assert seen == [23, 37]


def test_nothing_to_report_on_is_an_error(pipeline: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match="no document"):
        evaluate(pipeline, [])


def test_an_impossible_token_gives_an_infinite_perplexity() -> None:
    document = DocumentFigures("d", tokens=1, text_bytes=1, words=1, lm_nats=1.0, knn_nats=math.inf, improved=0)
    report = Report("m", "t", 32, 16, (document,))
    assert report.knn is not None
    assert report.knn.perplexity == math.inf
