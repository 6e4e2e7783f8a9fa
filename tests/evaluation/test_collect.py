"""What is collected is what scoring would see."""

from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.reader import Datastore
from knnlm.datastore.text import Document
from knnlm.errors import InvalidRequest
from knnlm.evaluation.collect import coincide, collect
from knnlm.evaluation.splits import encode
from knnlm.evaluation.tuning import mean_loss
from knnlm.index.searcher import Searcher
from knnlm.messages import ForwardRequest
from knnlm.neighbors import Neighbors
from knnlm.options import DomainOptions, KnnOptions
from knnlm.pipeline import Pipeline
from knnlm.testing import TEXTS, ToyLanguageModel, toy_datastore

LM = ToyLanguageModel()
DOCUMENTS = encode(
    [Document("a", "the dog looked at the cat, and the cat looked at the log."), Document("b", "queries!")],
    LM.tokenizer,
)


@pytest.mark.parametrize(("temperature", "lmbda"), [(2.0, 0.25), (50.0, 0.8)])
def test_loss_of_the_collected_equals_the_loss_of_scoring(tmp_path: Path, temperature: float, lmbda: float) -> None:
    with Pipeline(LM, {"toy": Searcher.open(toy_datastore(tmp_path, LM))}) as pipeline:
        observations = collect(LM, pipeline.searchers["toy"], "toy", DOCUMENTS, k=9)
        knn = KnnOptions((DomainOptions("toy", lmbda=lmbda, temperature=temperature),), k=9)
        scored = np.concatenate([pipeline.score(d.tokens, knn).log_probs for d in DOCUMENTS])
    assert mean_loss(observations, temperature, lmbda) == pytest.approx(-scored.mean(), rel=1e-9)
    assert len(observations.targets) == sum(len(d.tokens) - 1 for d in DOCUMENTS)
    assert observations.documents == 2


def test_neighbors_are_those_of_brute_force(tmp_path: Path) -> None:
    path = toy_datastore(tmp_path, LM)
    observations = collect(LM, Searcher.open(path), "toy", DOCUMENTS[1:], k=5)
    tokens = DOCUMENTS[1].tokens
    keys = LM.forward(ForwardRequest([tokens], [np.arange(len(tokens) - 1, dtype=np.int32)], keys=True)).keys
    assert keys is not None
    stored = Datastore.open(path)
    squared = ((keys[:, None, :].astype(np.float64) - stored.keys[None].astype(np.float64)) ** 2).sum(axis=2)
    # float32 distances of FAISS: 1e-5 relative
    np.testing.assert_allclose(observations.neighbors.distances, np.sort(squared, axis=1)[:, :5], rtol=1e-4, atol=1e-4)


def test_batches_change_nothing(tmp_path: Path) -> None:
    searcher = Searcher.open(toy_datastore(tmp_path, LM))
    seen: list[int] = []
    small = collect(LM, searcher, "toy", DOCUMENTS, k=4, batch_tokens=1, on_progress=seen.append)
    large = collect(LM, searcher, "toy", DOCUMENTS, k=4)
    np.testing.assert_array_equal(small.lm_log_probs, large.lm_log_probs)
    np.testing.assert_array_equal(small.neighbors.values, large.neighbors.values)
    assert seen == sorted(seen)
    assert seen[-1] == len(small.targets)
    assert len(seen) > 2


def test_leak_is_seen_where_the_text_is_stored_and_only_there(tmp_path: Path) -> None:
    searcher = Searcher.open(toy_datastore(tmp_path, LM))
    stored = encode([Document("stored", TEXTS[0])], LM.tokenizer)
    fresh = encode([Document("fresh", "?! 123 zyx never QUITE like this; 4567")], LM.tokenizer)
    assert collect(LM, searcher, "toy", stored, k=1).leak == 1.0
    assert collect(LM, searcher, "toy", fresh, k=1).leak == 0.0


def test_common_beginnings_are_no_leak(tmp_path: Path) -> None:
    searcher = Searcher.open(toy_datastore(tmp_path, LM))
    alike = encode([Document("alike", TEXTS[0][:12] + "?! 123 zyx never QUITE like this; 4567")], LM.tokenizer)
    assert collect(LM, searcher, "toy", alike, k=1).leak == 0.0
    short = encode([Document("short", TEXTS[0][:12])], LM.tokenizer)  # all there is to judge by
    assert collect(LM, searcher, "toy", short, k=1).leak == 1.0


def test_nothing_found_coincides_with_nothing() -> None:
    neighbors = Neighbors(np.zeros((2, 1), np.float32), np.array([[-1], [3]], np.int32))
    assert coincide(np.ones((2, 4), np.float32), neighbors, 1e-6).tolist() == [False, True]


def test_nothing_to_collect_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no document"):
        collect(LM, Searcher.open(toy_datastore(tmp_path, LM)), "toy", [], k=1)
