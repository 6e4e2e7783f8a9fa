"""Explaining a text: scores as they are without, the entries that gave each token most, few calls, bounded batches."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from knnlm import mixer as mixer_module
from knnlm.errors import InvalidRequest, Unavailable, UnknownVersion
from knnlm.messages import ForwardRequest, Passage, PassagesRequest
from knnlm.mixer import Mixer
from knnlm.options import DomainOptions, KnnOptions, SearchOptions
from knnlm.scoring import Score
from tests.test_mixer import TEXT, TOY, BruteForce, Lm, knn
from tests.toys import COUNTS, CountOptions, counts  # noqa: F401  a fixture

TOKENS = TOY.tokenizer.encode(TEXT)


class Stored(BruteForce):
    """Stores tokens of the text alone, so that many are found; writes down what was looked up."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        rng = np.random.default_rng(1)
        self.values = {v: rng.choice(TOKENS[1:], 40).astype(np.int32) for v in ("v1", "v2")}
        self.looked_up: list[PassagesRequest] = []

    async def passages(self, request: PassagesRequest) -> Sequence[Passage]:
        self.looked_up.append(request)
        return await super().passages(request)


def by_hand(store: Stored, position: int, window_start: int, k: int, temperature: float) -> dict[int, float]:
    """Share of each of the k nearest entries that store the token at the position, by entry."""
    context = TOKENS[window_start:position]
    forward = TOY.forward(ForwardRequest([context], [np.array([len(context) - 1], np.int32)], keys=True))
    assert forward.keys is not None
    distances = ((forward.keys[0].astype(np.float64) - store.keys) ** 2).sum(axis=1).astype(np.float32)
    nearest = np.argsort(distances, kind="stable")[:k]
    storing = [int(e) for e in nearest if store.values["v1"][e] == TOKENS[position]]
    weights = np.exp(-(distances[storing].astype(np.float64) - distances.min()) / temperature)
    return dict(zip(storing, (weights / weights.sum()).tolist(), strict=True))


async def test_the_entries_that_store_a_token_are_shown_by_their_share() -> None:
    store = Stored()
    options = knn(k=20, temperature=2.0, lmbda=0.3)
    score = await Mixer(Lm(), store, TOY.info).explain_text(
        TOKENS, options, passages=2, passage_tokens=5, min_context=4
    )
    plain = await Mixer(Lm(), store, TOY.info).score_text(TOKENS, options, min_context=4)
    np.testing.assert_array_equal(score.log_probs, plain.log_probs)
    (component,) = score.mixed.components
    carried = component.evidence.carried
    assert len(carried) == len(TOKENS) - 1
    assert sum(len(row) for row in carried) > 20
    windows = [(0, 1, 32), *((s, s + 4, s + 32) for s in range(28, len(TOKENS), 28))]
    for start, first, end in windows:
        for position in range(first, min(end, len(TOKENS))):
            expected = by_hand(store, position, start, 20, 2.0)
            shown = {c.passage.entry: c.share for c in carried[position - 1]}
            best = sorted(expected, key=lambda entry: -expected[entry])[:2]
            assert list(shown) == best, position
            np.testing.assert_allclose(list(shown.values()), [expected[e] for e in best], rtol=1e-5)
            assert all(c.domain == "toy" and c.passage.after[0] == TOKENS[position] for c in carried[position - 1])
    assert {r.passage_tokens for r in store.looked_up} == {5}


async def test_documents_add_up_to_what_retrieval_gave() -> None:
    score = await Mixer(Lm(), Stored(), TOY.info).explain_text(TOKENS, knn(), passages=5)  # k is 5: all that store it
    with np.errstate(divide="ignore"):
        assert score.knn_log_probs is not None
        given = score.weight * np.exp(score.knn_log_probs)
    assert sum(d.probability for d in score.documents) == pytest.approx(given.sum())
    assert sum(d.share for d in score.documents) == pytest.approx(1)
    assert [d.probability for d in score.documents] == sorted((d.probability for d in score.documents), reverse=True)
    assert {d.document for d in score.documents} <= {"0", "1", "2", "3"}
    some = await Mixer(Lm(), Stored(), TOY.info).explain_text(TOKENS, knn(), passages=1)
    assert 0 < sum(d.share for d in some.documents) < 1


async def test_each_batch_is_searched_once_and_looked_up_once() -> None:
    store = Stored()
    await Mixer(Lm(), store, TOY.info, batch_tokens=64).explain_text(TOKENS, knn(), min_context=4)
    batches = store.events.count("search")
    assert batches >= 2
    assert store.events.count("passages") == batches
    assert all(r.ids and not r.passages for r in store.asked)
    for request in store.looked_up:
        assert request.version == "v1"
        assert len(set(request.entries.tolist())) == len(request.entries)


async def test_without_passages_nothing_is_looked_up() -> None:
    store = Stored()
    score = await Mixer(Lm(), store, TOY.info).explain_text(TOKENS, knn(), passages=0)
    assert "passages" not in store.events
    assert not store.asked[0].ids
    assert score.documents == []


async def test_batches_are_small_where_neighbors_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Stored()
    monkeypatch.setattr(mixer_module, "EXPLAINED_BYTES", 40 * (16 * 30 + 2 * (256 + 8 * 24)))
    await Mixer(Lm(), store, TOY.info).explain_text(TOKENS, knn(k=30), passages=2, context_length=20)
    assert max(len(r.queries) for r in store.asked) <= 40
    assert len(store.asked) > 2


async def test_a_completion_is_explained_as_it_follows_the_prompt() -> None:
    store = Stored()
    mixer = Mixer(Lm(), store, TOY.info)
    whole = await mixer.explain_text(TOKENS, knn(), min_context=4)
    searched = sum(len(r.queries) for r in store.asked)
    first = 45
    store.asked.clear()
    part = await mixer.explain_text(TOKENS, knn(), first=first, min_context=4)
    assert sum(len(r.queries) for r in store.asked) == searched - first + 1
    np.testing.assert_array_equal(part.log_probs, whole.log_probs[first - 1 :])
    assert part.first == first
    for left, right in zip(part.mixed.components, whole.mixed.components, strict=True):
        assert repr(left.evidence.carried) == repr(right.evidence.carried[first - 1 :])
    for wrong in (0, len(TOKENS)):
        with pytest.raises(InvalidRequest, match="nothing to score"):
            await mixer.explain_text(TOKENS, knn(), first=wrong)


@pytest.mark.usefixtures("counts")
async def test_a_source_that_needs_the_text_in_order_gets_all_of_it() -> None:
    mixer = Mixer(Lm(), Stored(), TOY.info)
    options = {"knn": knn(), COUNTS: CountOptions()}
    whole, part = [await mixer.explain_text(TOKENS, options, first=first, min_context=4) for first in (1, 45)]
    np.testing.assert_array_equal(part.log_probs, whole.log_probs[44:])
    for left, right in zip(part.mixed.components, whole.mixed.components, strict=True):
        np.testing.assert_array_equal(left.weight, right.weight[44:])
        assert repr(left.evidence.carried) == repr(right.evidence.carried[44:])


async def test_domains_in_one_softmax_share_the_mass() -> None:
    store = Stored()
    both = KnnOptions((DomainOptions("toy"), DomainOptions("toy 2")), SearchOptions(k=8), combine="union")
    score = await Mixer(Lm(), store, TOY.info).explain_text(TOKENS, both, passages=16)
    (component,) = score.mixed.components
    rows = [row for row in component.evidence.carried if row]
    assert rows
    for row in rows:  # the same entries in both, so every one of them twice
        assert sum(c.share for c in row) == pytest.approx(1)
        assert {c.domain for c in row} == {"toy", "toy 2"}
    assert {r.domain for r in store.looked_up} == {"toy", "toy 2"}


async def test_a_lookup_that_fails_degrades_as_a_search_does() -> None:
    class Fails(Stored):
        async def passages(self, request: PassagesRequest) -> Sequence[Passage]:
            raise Unavailable(f"{request.domain} is gone")

    mixer = Mixer(Lm(), Fails(), TOY.info)
    with pytest.raises(Unavailable, match="toy is gone"):
        await mixer.explain_text(TOKENS, knn())
    score = await mixer.explain_text(TOKENS, knn(on_datastore_error="lm_only"))
    assert (score.degraded, score.documents, score.mixed.components) == ("toy is gone", [], [])
    np.testing.assert_array_equal(score.log_probs, score.lm_log_probs)


async def test_a_version_that_is_let_go_before_the_lookup_is_planned_anew() -> None:
    class Goes(Stored):
        async def passages(self, request: PassagesRequest) -> Sequence[Passage]:
            if request.version == "v1":
                self.current = "v2"
                raise UnknownVersion("no v1")
            return await super().passages(request)

    async def explained(**options: Any) -> Score:
        return await Mixer(Lm(), Goes(), TOY.info).explain_text(TOKENS, knn(**options))

    assert (await explained()).domains[0].version == "v2"
    with pytest.raises(UnknownVersion):
        await explained(version="v1")


async def test_nothing_is_left_running_after_an_error() -> None:
    class Refuses(Stored):
        async def passages(self, request: PassagesRequest) -> Sequence[Passage]:
            if len(self.looked_up) == 2:
                raise InvalidRequest("no more")
            return await super().passages(request)

    with pytest.raises(InvalidRequest, match="no more"):
        await Mixer(Lm(), Refuses(), TOY.info, batch_tokens=1).explain_text(TOKENS, knn(), min_context=4)
    assert len(asyncio.all_tasks()) == 1
