"""Neighbors found by following entries, against their definition, and what is mixed of them."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.errors import InvalidRequest
from knnlm.generation import GenerationOptions
from knnlm.index.searcher import Searcher
from knnlm.local import LocalDatastore, LocalLanguageModel
from knnlm.messages import Passage, PassagesRequest, SearchRequest, SearchResult
from knnlm.mixer import Mixer
from knnlm.neighbors import Neighbors
from knnlm.options import DomainOptions, KnnOptions, ReuseOptions
from knnlm.pipeline import Pipeline
from knnlm.protocols import Searching
from knnlm.rounds import Rounds
from knnlm.rows import StepRequest
from knnlm.sampling import SamplingOptions
from knnlm.testing import ToyLanguageModel
from tests.grown import base, grow, some_documents
from tests.searching import search

TAU = 2
LAMBDA = 0.5


@pytest.fixture
def searcher(tmp_path: Path) -> Iterator[Searcher]:
    """Of a version that has grown and from which a document was removed."""
    lm = ToyLanguageModel()
    first = base(tmp_path, some_documents("a", [30, 1, 25, 40], 0), lm)
    searcher = Searcher.open(grow(first, lm, [some_documents("b", [20, 35], 1)], removed=[2]))
    yield searcher
    searcher.close()


def behind(searcher: Searcher, entry: int) -> int | None:
    """The entry after it in its document, unless it was removed; from the table of documents, one after another."""
    store, start = searcher.datastore, 0
    removed = set(store.removed_documents.tolist())
    for document, length in enumerate(store.documents.lengths.tolist()):
        entries = range(start, start + max(length - 1, 0))
        if entry in entries:
            return entry + 1 if entry + 1 in entries and document not in removed else None
        start = entries.stop
    return None


def test_the_entries_behind_are_the_candidates_by_true_distances(searcher: Searcher) -> None:
    rng, store = np.random.default_rng(3), searcher.datastore
    queries = rng.standard_normal((9, searcher.manifest.key_dim)).astype(np.float32)
    live = store.live_entries()
    follow = np.stack([rng.choice(live, 12, replace=False) for _ in queries])
    follow[2, 5:] = -1
    follow[3] = -1
    for k in (3, 12, 50):
        found = searcher.search(search("toy", queries, k, ids=True, follow=follow)).neighbors
        for i, row in enumerate(follow):
            expected = [b for e in row.tolist() if e >= 0 and (b := behind(searcher, e)) is not None]
            distances = ((store.keys_of(np.array(expected, np.int64)).astype(np.float64) - queries[i]) ** 2).sum(axis=1)
            order = np.lexsort((expected, distances))[:k]
            assert found.ids is not None
            assert [e for e in found.ids[i].tolist() if e >= 0] == [expected[j] for j in order]
            np.testing.assert_allclose(found.distances[i, : len(order)], distances[order], rtol=1e-5)
            np.testing.assert_array_equal(
                found.values[i, : len(order)], store.values_of(np.array([expected[j] for j in order], np.int64))
            )


def test_documents_can_be_excluded_beside_it(searcher: Searcher) -> None:
    queries = np.zeros((1, searcher.manifest.key_dim), np.float32)
    follow = np.arange(0, 20, dtype=np.int64)[None]
    all_of_it = searcher.search(search("toy", queries, 64, ids=True, follow=follow)).neighbors
    without = search("toy", queries, 64, ids=True, follow=follow, exclude_documents=("a0",))
    assert all_of_it.present[0]
    assert not searcher.search(without).neighbors.present[0]


@pytest.mark.parametrize(
    "follow",
    [
        np.zeros((1, 2), np.int64),
        np.zeros((2, 2), np.int32),
        np.array([[0, 0], [1, 2]]),
        np.array([[0, -2], [1, 2]]),
        np.array([[0, 10**6], [1, 2]]),
        np.zeros(2, np.int64),
    ],
)
def test_what_cannot_be_followed_is_refused(searcher: Searcher, follow: npt.NDArray[np.int64]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        searcher.search(search("toy", np.zeros((2, searcher.manifest.key_dim), np.float32), 4, follow=follow))
    assert caught.value.param == "follow"


class Counting:
    """A searcher that counts the queries it searched an index for, and those that followed."""

    def __init__(self, searcher: Searcher) -> None:
        self._searcher = searcher
        self.searched = self.followed = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._searcher, name)

    def search(self, request: SearchRequest) -> SearchResult:
        if request.follow is None:
            self.searched += len(request.queries)
        else:
            self.followed += len(request.queries)
        return self._searcher.search(request)

    def passages(self, request: PassagesRequest) -> Sequence[Passage]:
        return self._searcher.passages(request)


def knn(tau: int | None) -> KnnOptions:
    return KnnOptions((DomainOptions("toy", lmbda=LAMBDA, temperature=1.0),), reuse=ReuseOptions(tau=tau))


def by_definition(
    p: Pipeline, searcher: Searcher, tokens: npt.NDArray[np.int32], start: int
) -> tuple[list[float], int]:
    """Mixed log-probabilities of tokens[start:], place by place, in one window, and how many searches were saved."""
    log_probs, saved, before = [], 0, None
    for place in range(start, len(tokens)):
        step = p.next_token(tokens[:place], knn(None))
        key = p.lm.forward(_keys(tokens[:place])).keys
        assert key is not None
        pointing = np.empty(0, np.int64)
        if before is not None:
            assert before.ids is not None
            pointing = before.ids[0][(before.values[0] == tokens[place - 1]) & (before.ids[0] >= 0)]
        follow = pointing[None] if len(pointing) >= TAU else None
        saved += follow is not None
        before = searcher.search(search("toy", key.astype(np.float32), 1024, ids=True, follow=follow)).neighbors
        log_probs.append(_mixed(step.mixed.lm_log_probs[0, tokens[place]], before, int(tokens[place])))
    return log_probs, saved


def _keys(tokens: npt.NDArray[np.int32]):  # type: ignore[no-untyped-def]
    from knnlm.messages import ForwardRequest

    return ForwardRequest([tokens], [np.array([len(tokens) - 1], np.int32)], keys=True)


def _mixed(lm: float, found: Neighbors, token: int) -> float:
    if not found.present[0]:
        return float(lm)
    weights = np.where(found.values[0] >= 0, np.exp(-found.distances[0].astype(np.float64)), 0)
    p_knn = weights[found.values[0] == token].sum() / weights.sum()
    return float(np.log((1 - LAMBDA) * np.exp(np.float64(lm)) + LAMBDA * p_knn))


def test_scoring_and_generating_follow_the_definition(searcher: Searcher) -> None:
    counting = Counting(searcher)
    with Pipeline(ToyLanguageModel(), {"toy": cast(Searching, counting)}) as p:
        tokens = p.tokenizer.encode("abc abd abc fed abc")
        score = p.score(tokens, knn(TAU), context_length=32)
        saved = score.mixed.components[0].evidence.skipped.sum()
        assert (counting.followed, counting.searched) == (saved, len(tokens) - 1 - saved)
        expected, expected_saved = by_definition(p, searcher, tokens, 1)
        assert saved == expected_saved > 3
        np.testing.assert_allclose(score.log_probs, expected, rtol=1e-5)
        counting.followed = 0
        greedy = GenerationOptions(max_tokens=10, sampling=SamplingOptions(temperature=0.0), ignore_eos=True)
        made = p.generate(tokens, knn(TAU), greedy, seed=0)
        whole = np.concatenate([tokens, np.array(made.tokens, np.int32)])
        expected, expected_saved = by_definition(p, searcher, whole, len(tokens))
        assert counting.followed == expected_saved > 0
        np.testing.assert_allclose(made.log_probs, expected, rtol=1e-5)


def test_a_tau_that_is_never_reached_changes_nothing_bit_for_bit(searcher: Searcher) -> None:
    with Pipeline(ToyLanguageModel(), {"toy": searcher}) as p:
        tokens = p.tokenizer.encode("abc abd abc fed abc")
        plain, never = (p.score(tokens, knn(tau), context_length=8) for tau in (None, 10**6))
        np.testing.assert_array_equal(plain.log_probs, never.log_probs)


def test_options_that_contradict_each_other_are_refused() -> None:
    for given, param in (({"tau": 0}, "reuse.tau"), ({"tau": 2, "ahead": 1}, "reuse")):
        with pytest.raises(InvalidRequest) as caught:
            ReuseOptions(**given)
        assert caught.value.param == param


async def test_what_a_text_keeps_holds_no_other_rows(searcher: Searcher) -> None:
    lm = ToyLanguageModel()
    mixer = Mixer(LocalLanguageModel(lm), LocalDatastore({"toy": searcher}), lm.info)
    rounds, plan = Rounds(mixer), await mixer.plan(knn(TAU))
    asked = [StepRequest(plan, lm.tokenizer.encode(text)) for text in ("abc", "abd", "fed")]
    await asyncio.gather(*(rounds.step(request) for request in asked))
    for request in asked:
        (kept,) = request.state.values()
        assert kept.ids.base is kept.values.base is None
