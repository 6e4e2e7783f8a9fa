"""Rounds over a toy model and a datastore that searches by brute force."""

import asyncio
import time
from collections.abc import Sequence

import numpy as np
import pytest

from knnlm.errors import DeadlineExceeded, InvalidRequest, KnnlmError, TooLarge, Unavailable
from knnlm.joined import JoinedSearches
from knnlm.messages import ForwardRequest, ForwardResult, SearchRequest, SearchResult
from knnlm.mixer import Mixer
from knnlm.options import DomainOptions, KnnOptions, MemoryOptions, SearchOptions
from knnlm.rounds import Rounds
from knnlm.rows import Row, StepRequest
from knnlm.sources import Plan
from knnlm.transport.context import outgoing
from tests.test_mixer import TOY, BruteForce, Lm

CONTEXTS = [TOY.tokenizer.encode(text) for text in ("the cat", "a dog sat", "x", "on the mat")]


def made(
    lm: Lm | None = None, datastore: BruteForce | None = None, *, partly: bool = False
) -> tuple[Mixer, Rounds, Lm, BruteForce]:
    lm, datastore = lm or Lm(), datastore or BruteForce()
    mixer = Mixer(lm, JoinedSearches(datastore), TOY.info)
    return mixer, Rounds(mixer, whole_row_tokens=10, likeliest=30) if partly else Rounds(mixer), lm, datastore


def knn(lmbda: float = 0.3, k: int = 5, fail: str = "fail") -> KnnOptions:
    return KnnOptions((DomainOptions("toy", lmbda=lmbda),), SearchOptions(k=k), on_datastore_error=fail)


async def test_those_who_ask_together_share_a_forward_pass_and_a_search_for_each_way() -> None:
    mixer, rounds, lm, datastore = made()
    plans = [await mixer.plan(o) for o in (knn(0.3), knn(0.3), knn(0.6), None)]
    asked = [StepRequest(plan, context) for plan, context in zip(plans, CONTEXTS, strict=True)]
    rows = await asyncio.gather(*map(rounds.step, asked))
    assert lm.events.count("forward") == 1
    assert [len(request.queries) for request in datastore.asked] == [3]
    for plan, context, row in zip(plans, CONTEXTS, rows, strict=True):
        alone = await mixer.step(plan, [context])
        np.testing.assert_allclose(row.known.log_probs, alone.mixed.log_probs[0], rtol=0, atol=1e-9)
        np.testing.assert_array_equal(row.lm_log_probs, alone.mixed.lm_log_probs[0])
    other = await mixer.plan(knn(k=7))
    await asyncio.gather(*(rounds.step(StepRequest(plan, CONTEXTS[0])) for plan in (plans[0], other)))
    assert sorted(request.k for request in datastore.asked[-2:]) == [5, 7]


async def test_next_tokens_that_are_asked_for_together_share_a_round_and_are_each_as_alone() -> None:
    for partly in (False, True):
        mixer, rounds, lm, datastore = made(partly=partly)
        options = [knn(0.3), knn(0.3), knn(0.6), None]
        asked = [rounds.next_token(c, o, passages=1) for c, o in zip(CONTEXTS, options, strict=True)]
        answers = await asyncio.gather(*asked)
        assert lm.events.count("forward") == 1
        assert [len(request.queries) for request in datastore.asked] == [3]
        for context, chosen, answer in zip(CONTEXTS, options, answers, strict=True):
            alone = await mixer.next_token([context], chosen, passages=1)
            np.testing.assert_allclose(answer.mixed.log_probs, alone.mixed.log_probs, rtol=0, atol=1e-9)
            np.testing.assert_array_equal(answer.mixed.lm_log_probs, alone.mixed.lm_log_probs)
            assert [d.as_json() for d in answer.domains] == [d.as_json() for d in alone.domains]
            for mine, theirs in zip(answer.mixed.components, alone.mixed.components, strict=True):
                np.testing.assert_allclose(mine.weight, theirs.weight)
                (row, expected_row) = (mine.row(0, 258), theirs.row(0, 258))
                assert row is not None
                assert expected_row is not None
                np.testing.assert_allclose(np.exp(row), np.exp(expected_row), atol=1e-12)
            for found, expected in zip(answer.found, alone.found, strict=True):
                np.testing.assert_array_equal(found.neighbors.values, expected.neighbors.values)
                assert found.passages == expected.passages


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
async def test_a_part_of_a_row_agrees_with_the_whole(lmbda: float) -> None:
    mixer, rounds, lm, _ = made(partly=True)
    plan = await mixer.plan(knn(lmbda))
    request = StepRequest(plan, CONTEXTS[1], temperature=0.7, known=[255], cache=True)
    row = await rounds.step(request)
    assert lm.events.count("forward") == 2
    whole = (await mixer.step(plan, [CONTEXTS[1]])).mixed.log_probs[0]
    known = row.known.tokens
    assert 255 in known
    assert len(known) < 60
    np.testing.assert_allclose(row.known.log_probs, whole[known], rtol=0, atol=1e-9)
    others = np.delete(whole, known)
    assert others.max() <= row.known.bound + 1e-12
    rest = np.logaddexp.reduce(others / 0.7)
    np.testing.assert_allclose(np.exp(row.known.log_rest), np.exp(rest), rtol=1e-4, atol=1e-12)
    completed = await rounds.completed(row, request)
    assert completed.complete
    np.testing.assert_allclose(completed.known.log_probs, whole[completed.known.tokens], rtol=0, atol=1e-9)
    assert len(completed.known.tokens) == (len(whole) if lmbda < 1 else len(known))  # at 1 nothing else has a share
    likeliest = row.top(3)
    assert likeliest is not None
    assert dict(likeliest) == pytest.approx(dict(completed.top(3) or ()))
    assert row.log_probs_of(255) == pytest.approx(completed.log_probs_of(255))
    assert row.components(255) == completed.components(255)


async def test_what_one_row_takes_to_be_completed_is_not_counted_for_the_others() -> None:
    mixer, rounds, _, _ = made(partly=True)
    plan = await mixer.plan(knn())
    asked = [StepRequest(plan, context) for context in CONTEXTS[:2]]
    one, other = await asyncio.gather(*map(rounds.step, asked))
    before = dict(other.timings)
    completed = await rounds.completed(one, asked[0])
    assert completed.timings["lm"] > before["lm"]
    assert other.timings == one.timings == before


class Slow(Lm):
    """Waits until it is let go, when it is held."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.go = asyncio.Event()
        self.go.set()

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        self.sizes.append(len(request.tokens))
        await self.go.wait()
        return await super().forward(request)


async def test_who_comes_during_a_round_is_in_the_next_and_who_left_is_in_none() -> None:
    lm = Slow()
    _, rounds, _, _ = made(lm)
    lm.go.clear()
    first = asyncio.create_task(rounds.step(StepRequest(Plan(), CONTEXTS[0])))
    for _ in range(10):
        await asyncio.sleep(0)
    later = [asyncio.create_task(rounds.step(StepRequest(Plan(), context))) for context in CONTEXTS]
    await asyncio.sleep(0)
    later[0].cancel()
    lm.go.set()
    await first
    rows = await asyncio.gather(*later, return_exceptions=True)
    assert lm.sizes == [1, 3]
    assert isinstance(rows[0], asyncio.CancelledError)
    assert all(isinstance(row, Row) for row in rows[1:])


async def test_the_callers_time_ends_its_wait_and_nobody_elses() -> None:
    lm = Slow()
    _, rounds, _, _ = made(lm)
    lm.go.clear()

    async def limited() -> Row:
        with outgoing(deadline=time.monotonic() + 0.05):
            return await rounds.step(StepRequest(Plan(), CONTEXTS[0]))

    hurried = asyncio.create_task(limited())
    patient = asyncio.create_task(rounds.step(StepRequest(Plan(), CONTEXTS[1])))
    with pytest.raises(DeadlineExceeded):
        await hurried
    lm.go.set()
    assert isinstance(await patient, Row)


class Choosy(Lm):
    """Refuses a request for what one of its sequences is."""

    def __init__(self, error: KnnlmError) -> None:
        super().__init__()
        self.error = error

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        if any(np.array_equal(tokens, CONTEXTS[0]) for tokens in request.tokens):
            raise self.error
        return await super().forward(request)


async def outcomes(rounds: Rounds, plans: Sequence[Plan]) -> list[Row | BaseException]:
    asked = [StepRequest(plan, context) for plan, context in zip(plans, CONTEXTS, strict=False)]
    return await asyncio.gather(*map(rounds.step, asked), return_exceptions=True)


async def test_nobody_fails_by_what_a_stranger_asked() -> None:
    _, rounds, _, _ = made(Choosy(InvalidRequest("no", param="tokens")))
    first, *others = await outcomes(rounds, [Plan()] * 3)
    assert isinstance(first, InvalidRequest)
    assert all(isinstance(row, Row) for row in others)


async def test_a_failure_reaches_everybody_as_an_error_of_their_own() -> None:
    _, rounds, _, _ = made(Choosy(Unavailable("away")))
    first, second = await outcomes(rounds, [Plan()] * 2)
    assert isinstance(first, Unavailable)
    assert isinstance(second, Unavailable)
    assert first is not second
    assert first.message == second.message
    assert isinstance(await rounds.step(StepRequest(Plan(), CONTEXTS[1])), Row)


async def test_one_way_that_fails_leaves_the_others_and_who_may_go_on_does() -> None:
    datastore = BruteForce()
    mixer, rounds, _, _ = made(datastore=datastore)
    plans = [await mixer.plan(o) for o in (knn(), knn(fail="lm_only"), None)]
    datastore.down = Unavailable("the datastore is away")
    failed, degraded, alone = await outcomes(rounds, plans)
    assert isinstance(failed, Unavailable)
    assert isinstance(degraded, Row)
    assert degraded.plan.degraded == "the datastore is away"
    assert not degraded.shares
    assert isinstance(alone, Row)
    assert alone.plan.degraded is None


async def test_a_search_that_is_too_large_together_is_made_alone() -> None:
    class Small(BruteForce):
        async def search(self, request: SearchRequest) -> SearchResult:
            if len(request.queries) > 1:
                raise TooLarge("one query at a time", param="queries")
            return await super().search(request)

    datastore = Small()
    mixer, rounds, _, _ = made(datastore=datastore)
    plans = [await mixer.plan(knn(lmbda)) for lmbda in (0.1, 0.2, 0.3)]
    assert all(isinstance(row, Row) for row in await outcomes(rounds, plans))
    assert len(datastore.asked) == 3


async def test_a_context_that_the_model_does_not_take_is_refused_at_once() -> None:
    _, rounds, lm, _ = made()
    for context, error in ((CONTEXTS[0][:0], InvalidRequest), (np.zeros(33, np.int32), TooLarge)):
        with pytest.raises(error):
            await rounds.step(StepRequest(Plan(), context))
    assert not lm.events


async def test_what_was_asked_of_sources_beforehand_is_let_go_when_a_step_is_cancelled() -> None:
    asked, let_go = asyncio.Event(), asyncio.Event()

    class Slow(Lm):
        async def forward(self, request: ForwardRequest) -> ForwardResult:
            await asyncio.sleep(60)
            return await super().forward(request)

    class Memory(Lm):
        async def forward(self, request: ForwardRequest) -> ForwardResult:
            asked.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                let_go.set()
                raise
            return await super().forward(request)

    mixer = Mixer(Slow(), None, TOY.info, memories={"m": Memory()})
    plan = await mixer.plan({"memory": MemoryOptions("m", lmbda=0.3)})
    begun = Rounds(mixer).begin(StepRequest(plan, CONTEXTS[0]))
    await asyncio.wait_for(asked.wait(), 5)
    begun.cancel()
    await asyncio.wait_for(let_go.wait(), 5)
