"""Asking a second replica when the first takes unusually long: when, how often, and what becomes of the loser."""

import asyncio

import numpy as np
import pytest

from knnlm.clients import fleet, hedging
from knnlm.clients.hedging import BURST, CALLS_PER_HEDGE, ENOUGH, WINDOW, Hedging
from knnlm.clients.rpc import GrpcDatastore
from knnlm.errors import InvalidRequest, Overloaded
from tests.clients.fakes import DRAINING, Recorder, Replica, listening, number, search, until

LATE = 0.25  # seconds


def test_what_is_slow_is_what_95_of_100_recent_calls_like_it_beat() -> None:
    rng = np.random.default_rng(0)
    known, seen = Hedging(), LATE + rng.gamma(2.0, 0.05, 400)
    for i, seconds in enumerate(seen, start=1):
        assert (known.delay("search") is None) == (i <= ENOUGH)
        known.record("search", float(seconds))
    recent = np.sort(seen[-WINDOW:])
    assert known.delay("search") == recent[int(0.95 * WINDOW)]
    assert known.delay("forward") is None  # calls of other kinds say nothing about it


def test_quick_calls_are_not_worth_asking_twice() -> None:
    known = Hedging()
    for _ in range(ENOUGH):
        known.record("search", 0.0001)
    assert known.delay("search") == LATE


def test_the_budget_is_one_call_in_twenty_and_a_few_at_once() -> None:
    known = Hedging()
    assert not known.spend()
    spent = 0
    for _ in range(1000):
        known.delay("search")
        spent += known.spend()
    assert spent == 1000 // CALLS_PER_HEDGE
    for _ in range(1000):
        known.delay("search")
    assert sum(known.spend() for _ in range(1000)) == BURST


async def learn(client: GrpcDatastore, calls: int) -> None:
    for _ in range(calls):
        await client.search(search())


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment in which this machine is slow is none in which a replica is."""
    monkeypatch.setattr(hedging, "LEAST_SECONDS", LATE)
    monkeypatch.setattr(fleet, "FIRST_LOOK_SECONDS", 3600.0)  # nothing is known but what calls tell


async def test_the_second_replica_answers_where_the_first_is_slow_and_the_loser_is_cancelled() -> None:
    observer = Recorder()
    slow, quick = Replica(0), Replica(1)
    async with listening(slow, quick) as target, GrpcDatastore(target, observer=observer) as client:
        await learn(client, 2 * CALLS_PER_HEDGE)
        slow.slow = True
        before = quick.asked["Search"]
        assert [number(await client.search(search())) for _ in range(2)] == [1, 1]
        assert quick.asked["Search"] - before == 2
        await until(lambda: slow.cancelled == 1)
        assert observer.hedges == [True]
        assert client._caller.fleet.replicas[0].busy == 0
    assert [code for _, code, _ in observer.calls] == ["OK"] * (2 * CALLS_PER_HEDGE + 2)


async def test_the_first_may_still_win() -> None:
    observer = Recorder()
    replicas = [Replica(0), Replica(1)]
    async with listening(*replicas) as target, GrpcDatastore(target, observer=observer) as client:
        await learn(client, 2 * CALLS_PER_HEDGE)
        for replica in replicas:
            replica.slow = True
        call = asyncio.create_task(client.search(search()))
        await until(lambda: sum(r.asked["Search"] for r in replicas) == 2 * CALLS_PER_HEDGE + 2)
        turn = client._caller.fleet._turn % 2
        first = next(i for i, r in enumerate(client._caller.fleet.replicas) if r.busy and i != turn)
        replicas[first].let_go.set()
        assert number(await call) == first
        await until(lambda: replicas[1 - first].cancelled == 1)
    assert observer.hedges == [False]


@pytest.mark.parametrize("refusal", [DRAINING, Overloaded("full"), InvalidRequest("no")])
async def test_a_second_replica_that_refuses_changes_nothing(refusal: Exception) -> None:
    observer = Recorder()
    slow, refuses = Replica(0), Replica(1)
    async with listening(slow, refuses) as target, GrpcDatastore(target, observer=observer) as client:
        await learn(client, 2 * CALLS_PER_HEDGE)
        slow.slow = True
        call = None
        while not slow.asked["Search"] > CALLS_PER_HEDGE:
            call = asyncio.create_task(client.search(search()))
            await until(lambda call=call: call.done() or slow.asked["Search"] > CALLS_PER_HEDGE)  # type: ignore[misc]
        before = refuses.asked["Search"]
        refuses.refuse = refusal  # type: ignore[assignment]  # all are ours
        await until(lambda: refuses.asked["Search"] > before)
        slow.let_go.set()
        assert call is not None
        assert number(await call) == 0
    assert observer.hedges == [False]


async def test_a_first_replica_that_fails_leaves_the_answer_to_the_second() -> None:
    observer = Recorder()
    dies, slow = Replica(0), Replica(1)
    async with listening(dies, slow) as target, GrpcDatastore(target, observer=observer) as client:
        await learn(client, 2 * CALLS_PER_HEDGE)
        dies.slow = slow.slow = True
        calls = [asyncio.create_task(client.search(search())) for _ in range(2)]
        await until(lambda: dies.asked["Search"] + slow.asked["Search"] == 2 * CALLS_PER_HEDGE + 4)
        await dies.stop()
        slow.let_go.set()
        assert [number(await call) for call in calls] == [1, 1]
        assert sorted(observer.hedges) == [False, True]


async def test_the_budget_holds_when_everything_is_slow() -> None:
    observer = Recorder()
    replicas = [Replica(0), Replica(1)]
    async with listening(*replicas) as target, GrpcDatastore(target, observer=observer) as client:
        await learn(client, ENOUGH)
        for replica in replicas:
            replica.slow = True
        calls = [asyncio.create_task(client.search(search())) for _ in range(3 * CALLS_PER_HEDGE)]
        most = (ENOUGH + len(calls)) // CALLS_PER_HEDGE
        asked = ENOUGH + len(calls) + most
        await until(lambda: sum(r.asked["Search"] for r in replicas) == asked)
        await asyncio.sleep(2 * LATE)  # no more come
        assert sum(r.asked["Search"] for r in replicas) == asked
        for replica in replicas:
            replica.let_go.set()
        await asyncio.gather(*calls)
        assert len(observer.hedges) == most


@pytest.mark.parametrize("why", ["switched off", "one replica", "the other is down", "the other lacks the version"])
async def test_nobody_is_asked_twice_when(why: str) -> None:
    observer = Recorder()
    replicas = [Replica(0), Replica(1)][: 1 if why == "one replica" else 2]
    async with (
        listening(*replicas) as target,
        GrpcDatastore(target, observer=observer, hedge=why != "switched off") as client,
    ):
        await learn(client, 2 * CALLS_PER_HEDGE)
        if why == "the other is down":
            replicas[1].refuse = DRAINING
            await learn(client, 2)
        if why == "the other lacks the version":
            client._caller.fleet.replicas[1].serves({})
            client._caller.fleet.replicas[0].serves({"law": "v1"})
        for replica in replicas:
            replica.slow = True
        before = sum(r.asked["Search"] for r in replicas)
        call = asyncio.create_task(client.search(search()))
        await asyncio.sleep(2 * LATE)
        assert sum(r.asked["Search"] for r in replicas) == before + 1
        for replica in replicas:
            replica.let_go.set()
        await call
    assert observer.hedges == []


async def test_a_caller_that_leaves_takes_both_calls_with_it() -> None:
    replicas = [Replica(0), Replica(1)]
    async with listening(*replicas) as target, GrpcDatastore(target) as client:
        await learn(client, 2 * CALLS_PER_HEDGE)
        for replica in replicas:
            replica.slow = True
        call = asyncio.create_task(client.search(search()))
        await until(lambda: sum(r.asked["Search"] for r in replicas) == 2 * CALLS_PER_HEDGE + 2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: [r.cancelled for r in replicas] == [1, 1])
