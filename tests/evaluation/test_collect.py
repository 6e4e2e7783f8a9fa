"""What is collected is what scoring would see."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest
from knnlm.evaluation import collect as collect_module
from knnlm.evaluation.collect import coincide, find, leak, observe
from knnlm.evaluation.splits import Encoded, encode
from knnlm.evaluation.tuning import Observations, mean_loss
from knnlm.index.build import build_index
from knnlm.index.searcher import Searcher
from knnlm.messages import Document, ForwardRequest, SearchRequest
from knnlm.neighbors import Neighbors
from knnlm.options import DomainOptions, KnnOptions, SearchOptions
from knnlm.pipeline import Pipeline
from knnlm.testing import TEXTS, ToyLanguageModel, toy_datastore

LM = ToyLanguageModel()
DOCUMENTS = encode(
    [Document("a", "the dog looked at the cat, and the cat looked at the log."), Document("b", "queries!")],
    LM.tokenizer,
)


def collect(searcher: Searcher, documents: Sequence[Encoded], k: int) -> Observations:
    return find(searcher, "toy", observe(LM, documents), SearchOptions(k=k))


def leaked(searcher: Searcher, documents: Sequence[Encoded]) -> float:
    held_out = observe(LM, documents)
    found = find(searcher, "toy", held_out, SearchOptions(k=1)).neighbors
    return leak(held_out, found, LM.info.dtype, searcher.info(()).model_dtype)


@pytest.mark.parametrize(("temperature", "lmbda"), [(2.0, 0.25), (50.0, 0.8)])
def test_loss_of_the_collected_equals_the_loss_of_scoring(tmp_path: Path, temperature: float, lmbda: float) -> None:
    path = toy_datastore(tmp_path, LM)
    with Pipeline(LM, {"toy": Searcher.open(path)}) as pipeline:
        observations = collect(Searcher.open(path), DOCUMENTS, 9)
        knn = KnnOptions((DomainOptions("toy", lmbda=lmbda, temperature=temperature),), search=SearchOptions(k=9))
        scored = np.concatenate([pipeline.score(d.tokens, knn).log_probs for d in DOCUMENTS])
    assert mean_loss(observations, temperature, lmbda) == pytest.approx(-scored.mean(), rel=1e-9)
    assert len(observations.targets) == sum(len(d.tokens) - 1 for d in DOCUMENTS)
    assert observations.documents == 2


def test_neighbors_are_those_of_brute_force(tmp_path: Path) -> None:
    path = toy_datastore(tmp_path, LM)
    observations = collect(Searcher.open(path), DOCUMENTS[1:], 5)
    tokens = DOCUMENTS[1].tokens
    keys = LM.forward(ForwardRequest([tokens], [np.arange(len(tokens) - 1, dtype=np.int32)], keys=True)).keys
    assert keys is not None
    stored = Datastore.open(path)
    squared = ((keys[:, None, :].astype(np.float64) - stored.keys[None].astype(np.float64)) ** 2).sum(axis=2)
    # float32 distances of FAISS: 1e-5 relative
    np.testing.assert_allclose(observations.neighbors.distances, np.sort(squared, axis=1)[:, :5], rtol=1e-4, atol=1e-4)


def test_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = Searcher.open(toy_datastore(tmp_path, LM))
    asked: list[int] = []
    small = observe(LM, DOCUMENTS, batch_tokens=1, on_progress=asked.append)
    large = observe(LM, DOCUMENTS)
    np.testing.assert_array_equal(small.lm_log_probs, large.lm_log_probs)
    np.testing.assert_array_equal(small.queries, large.queries)
    assert asked == sorted(asked)
    assert asked[-1] == len(small.targets)
    assert len(asked) > 2
    whole = find(searcher, "toy", small, SearchOptions(k=4))
    monkeypatch.setattr(collect_module, "BLOCK_ROWS", 7)
    searched: list[int] = []
    in_blocks = find(searcher, "toy", small, SearchOptions(k=4), on_progress=searched.append)
    np.testing.assert_array_equal(in_blocks.neighbors.values, whole.neighbors.values)
    np.testing.assert_array_equal(in_blocks.neighbors.distances, whole.neighbors.distances)
    assert searched == [*range(7, len(small.targets), 7), len(small.targets)]


@pytest.mark.parametrize("k", [2, 40])
def test_what_is_found_is_what_a_request_with_that_k_is_answered(tmp_path: Path, k: int) -> None:
    """Of an index whose answer to a large k, cut, is better than its answer to a small one."""
    path = toy_datastore(tmp_path, LM, texts=[text * 12 for text in TEXTS])
    build_index(path, "pq2x4fs")
    held_out = observe(LM, DOCUMENTS)
    searcher = Searcher.open(path)
    answered = searcher.search(SearchRequest("toy", held_out.queries, SearchOptions(k=k))).neighbors
    found = find(searcher, "toy", held_out, SearchOptions(k=k)).neighbors
    np.testing.assert_array_equal(found.values, answered.values)
    np.testing.assert_array_equal(found.distances, answered.distances)
    wide = find(searcher, "toy", held_out, SearchOptions(k=400)).neighbors
    assert (wide.distances[:, :k].sum(axis=1) < found.distances.sum(axis=1)).any()


def test_leak_is_seen_where_the_text_is_stored_and_only_there(tmp_path: Path) -> None:
    searcher = Searcher.open(toy_datastore(tmp_path, LM))
    stored = encode([Document("stored", TEXTS[0])], LM.tokenizer)
    fresh = encode([Document("fresh", "?! 123 zyx never QUITE like this; 4567")], LM.tokenizer)
    assert leaked(searcher, stored) == 1.0
    assert leaked(searcher, fresh) == 0.0


def test_common_beginnings_are_no_leak(tmp_path: Path) -> None:
    searcher = Searcher.open(toy_datastore(tmp_path, LM))
    alike = encode([Document("alike", TEXTS[0][:12] + "?! 123 zyx never QUITE like this; 4567")], LM.tokenizer)
    assert leaked(searcher, alike) == 0.0
    short = encode([Document("short", TEXTS[0][:12])], LM.tokenizer)  # all there is to judge by
    assert leaked(searcher, short) == 1.0


def test_nothing_found_coincides_with_nothing() -> None:
    neighbors = Neighbors(np.zeros((2, 1), np.float32), np.array([[-1], [3]], np.int32))
    assert coincide(np.ones((2, 4), np.float32), neighbors, 1e-6).tolist() == [False, True]


def test_nothing_to_observe_is_an_error() -> None:
    with pytest.raises(InvalidRequest, match="no document"):
        observe(LM, [])
