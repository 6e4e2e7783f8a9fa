"""A service of several replicas, as its client sees them: killed, hanging, added, draining, coming back."""

import asyncio
import contextlib
from collections import Counter

import pytest

from knnlm.clients import fleet
from knnlm.clients.call import Connection
from knnlm.clients.rpc import GrpcDatastore
from knnlm.errors import DeadlineExceeded, Unavailable
from knnlm.transport.context import outgoing
from tests.clients.fakes import DRAINING, Names, Recorder, Replica, listening, now, number, quick, search, until

PATIENCE = 20.0


async def test_calls_go_to_the_replicas_in_turn() -> None:
    replicas = [Replica(i) for i in range(3)]
    async with listening(*replicas) as target, GrpcDatastore(target) as client:
        answered = Counter([number(await client.search(search())) for _ in range(9)])
    assert answered == {0: 3, 1: 3, 2: 3}


async def test_a_call_goes_where_the_fewest_are_under_way() -> None:
    busy, idle = Replica(0), Replica(1)
    busy.slow = True
    async with listening(busy, idle) as target, GrpcDatastore(target) as client:
        held: list[asyncio.Task[object]] = []
        while not busy.asked["Search"]:
            held.append(asyncio.create_task(client.search(search())))
            await until(lambda: held[-1].done() or bool(busy.asked["Search"]))
        assert {number(await client.search(search())) for _ in range(5)} == {1}
        busy.let_go.set()
        await asyncio.gather(*held)


async def test_what_is_under_way_on_a_replica_that_is_killed_is_asked_elsewhere() -> None:
    observer = Recorder()
    killed, other = Replica(0), Replica(1)
    killed.slow = True
    async with (
        listening(killed, other) as target,
        GrpcDatastore(Connection(target, observer=observer)) as client,
    ):
        calls = [asyncio.create_task(client.search(search())) for _ in range(8)]
        await until(lambda: killed.asked["Search"] == 4)
        await killed.stop()
        assert {number(result) for result in await asyncio.gather(*calls)} == {1}
        assert [number(await client.search(search())) for _ in range(3)] == [1, 1, 1]
    assert observer.retries == ["datastore"] * 4
    assert observer.problems[0][0] == killed.address
    assert [code for _, code, _ in observer.calls] == ["OK"] * 11


async def test_what_is_under_way_on_a_silent_replica_is_asked_elsewhere() -> None:
    observer = Recorder()
    hanging, other = Replica(0), Replica(1)
    hanging.hang = True
    async with (
        listening(hanging, other) as target,
        quick(target, observer=observer) as client,
    ):
        calls = [client.search(search()) for _ in range(4)]
        assert {number(result) for result in await asyncio.gather(*calls)} == {1}
        assert hanging.asked["Search"] == 2
        assert observer.counts == (1, 1)
        assert [number(await client.search(search())) for _ in range(4)] == [1] * 4
        assert hanging.asked["Search"] == 2


async def test_a_replica_that_is_only_slow_is_not_taken_for_dead() -> None:
    """Searches that take longer than silence may, while probes are answered."""

    observer = Recorder()
    slow = Replica(0)
    slow.slow = True
    async with listening(slow) as target, quick(target, observer=observer) as client:
        call = asyncio.create_task(client.search(search()))
        await until(lambda: slow.asked["ListDomains"] > 20)  # a look each, four times as many as silence takes
        slow.let_go.set()
        assert number(await call) == 0
    assert slow.asked["Search"] == 1
    assert observer.problems == []


async def test_a_silent_replica_comes_back() -> None:
    observer = Recorder()
    replica = Replica(0)
    replica.hang = True
    async with listening(replica) as target, quick(target, observer=observer, wait=PATIENCE) as client:
        call = asyncio.create_task(client.search(search()))
        await until(lambda: observer.counts == (0, 1))
        assert client.problem == "nothing was heard from it for a while"
        replica.hang = False
        assert number(await call) == 0
        await until(lambda: observer.counts == (1, 0))
        assert client.problem is None


async def test_a_client_that_was_held_up_itself_takes_nobody_for_dead() -> None:
    observer = Recorder()
    replica = Replica(0)
    async with listening(replica) as target, quick(target, observer=observer) as client:
        await client.search(search())
        for _ in range(3):
            before = replica.asked["ListDomains"]
            await until(lambda before=before: replica.asked["ListDomains"] > before)  # type: ignore[misc]
            begun = now()
            while now() - begun < 0.4:  # more than silence takes; nothing else runs in this loop
                pass
        await client.search(search())
    assert observer.problems == []


async def test_a_draining_replica_gets_no_more_and_finishes_what_it_has() -> None:
    draining, other = Replica(0), Replica(1)
    draining.slow = True
    async with listening(draining, other) as target, quick(target) as client:
        calls = [asyncio.create_task(client.search(search())) for _ in range(2)]
        await until(lambda: bool(draining.asked["Search"] and other.asked["Search"]))
        draining.refuse = DRAINING
        await until(lambda: not client._caller.fleet.replicas[0].up)
        before = draining.asked["Search"]
        assert [number(await client.search(search())) for _ in range(6)] == [1] * 6
        await until(lambda: draining.asked["ListDomains"] > 10)
        draining.let_go.set()
        assert sorted([number(result) for result in await asyncio.gather(*calls)]) == [0, 1]
        assert draining.asked["Search"] == before == 1


async def test_a_replica_that_restarts_is_used_again() -> None:
    observer = Recorder()
    first, second = Replica(0), Replica(1)
    async with listening(first, second) as target, quick(target, observer=observer) as client:
        await client.search(search())
        await first.stop()
        await until(lambda: observer.counts == (1, 1))
        assert {number(await client.search(search())) for _ in range(4)} == {1}
        await first.start()
        await until(lambda: observer.counts == (2, 0))
        assert {number(await client.search(search())) for _ in range(4)} == {0, 1}
    assert [(address, problem is None) for address, problem in observer.problems] == [
        (first.address, False), (first.address, True),
    ]  # fmt: skip


async def test_a_replica_that_a_name_comes_to_mean_gets_calls_and_one_that_goes_gets_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = Names()
    monkeypatch.setattr(fleet, "resolve", names.resolve)

    observer = Recorder()
    first, second = Replica(0), Replica(1)
    first.slow = True
    async with (
        listening(first, second),
        quick("dns:///datastore:9002", observer=observer) as client,
    ):
        names.ports = [first.port]
        held = asyncio.create_task(client.search(search()))
        await until(lambda: first.asked["Search"] == 1)
        names.ports = [first.port, second.port]
        await until(lambda: observer.counts == (2, 0))
        assert number(await client.search(search())) == 1
        names.ports = [second.port]
        await until(lambda: observer.counts == (1, 0))
        leaving = client._caller.fleet._leaving[0]
        assert [number(await client.search(search())) for _ in range(3)] == [1, 1, 1]
        looks = second.asked["ListDomains"]
        await until(lambda: second.asked["ListDomains"] > looks + 2)
        first.let_go.set()
        assert number(await held) == 0  # what it had is finished
        await until(lambda: not client._caller.fleet._leaving)
        with pytest.raises(Exception, match="closed"):
            await leaving.stub.Search(search(), timeout=1.0)  # type: ignore[arg-type]
        assert first.asked["Search"] == 1


async def test_who_answers_is_kept_while_names_cannot_be_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names()
    monkeypatch.setattr(fleet, "resolve", names.resolve)

    observer = Recorder()
    stays, dies = Replica(0), Replica(1)
    async with listening(stays, dies), quick("datastore:9002", observer=observer) as client:
        names.ports = [stays.port, dies.port]
        await client.search(search())
        names.away = True
        await dies.stop()
        await until(lambda: observer.counts == (1, 0))
        assert [number(await client.search(search())) for _ in range(3)] == [0, 0, 0]


async def test_a_name_that_means_nothing_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names()
    monkeypatch.setattr(fleet, "resolve", names.resolve)

    replica = Replica(0)
    async with listening(replica), quick("datastore:9002", wait=PATIENCE) as client:
        call = asyncio.create_task(client.search(search()))
        await until(lambda: client.problem is not None)
        assert "datastore:9002 has no address" in str(client.problem)
        names.ports = [replica.port]
        assert number(await call) == 0
    async with quick("datastore:9002", wait=0.1) as client:
        names.ports = []
        with pytest.raises(Unavailable, match="datastore:9002 has no address"):
            await client.search(search())


async def test_a_name_server_that_is_slow_does_not_hold_a_call_beyond_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(name: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(fleet, "resolve", never)

    async with GrpcDatastore(Connection("datastore:9002", wait=PATIENCE, timeout=0.3)) as client:
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable, match="datastore:9002 has no address"):
                await client.search(search())


async def test_nobody_there_is_waited_for_and_then_unavailable() -> None:
    observer = Recorder()
    replica = Replica(0)
    async with listening(replica) as target:
        await replica.stop()
        async with GrpcDatastore(Connection(target, wait=PATIENCE, observer=observer)) as client:
            call = asyncio.create_task(client.search(search()))
            await until(lambda: len(observer.retries) > 2)
            await replica.start()
            assert number(await call) == 0
            await replica.stop()
        async with GrpcDatastore(Connection(target, wait=0.2)) as client:
            with pytest.raises(Unavailable, match=replica.address):
                await client.search(search())
        async with GrpcDatastore(Connection(target, wait=PATIENCE)) as client:
            begun = now()
            with outgoing(deadline=begun + 0.3), pytest.raises(Unavailable, match=replica.address):
                await client.search(search())
            assert now() - begun < PATIENCE


async def test_every_attempt_gets_what_is_left_of_the_time() -> None:
    hanging, other = Replica(0), Replica(1)
    hanging.hang = True
    async with listening(hanging, other) as target, quick(target, timeout=30.0) as client:
        calls = [client.search(search()) for _ in range(2)]
        assert {number(result) for result in await asyncio.gather(*calls)} == {1}
        first, moved = sorted(other.time_left[-2:], reverse=True)
        assert 0 < moved < first <= 31.0  # a deadline crosses the wire rounded, and clocks in it differ a little
    async with listening(hanging) as target, quick(target, timeout=0.2) as client:
        with pytest.raises(DeadlineExceeded, match=hanging.address):
            await client.search(search())


def ours() -> list[str]:
    """Tasks of the client: what the servers in this loop run is their business."""
    coroutines = [task.get_coro() for task in asyncio.all_tasks()]
    return [c.__qualname__ for c in coroutines if "knnlm/clients" in c.cr_code.co_filename]  # type: ignore[union-attr]


async def test_closing_leaves_no_task_and_takes_no_call() -> None:
    hanging = Replica(0)
    hanging.hang = True
    async with listening(hanging) as target:
        client = GrpcDatastore(target)
        call = asyncio.create_task(client.get_domain("law"))
        await until(lambda: len(ours()) >= 3)  # the call, looking at the replicas, a probe
        await client.aclose()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        assert ours() == []
        with pytest.raises(RuntimeError, match="closed"):
            await client.get_domain("law")
        await client.aclose()


async def test_a_caller_that_leaves_is_cancelled_there() -> None:
    replica = Replica(0)
    replica.slow = True
    async with listening(replica) as target, quick(target) as client:
        call = asyncio.create_task(client.search(search()))
        await until(lambda: replica.asked["Search"] == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: replica.cancelled == 1)


async def test_a_caller_that_leaves_while_its_replica_falls_silent_has_left() -> None:
    replicas = [Replica(0), Replica(1)]
    for replica in replicas:
        replica.slow = True
    async with listening(*replicas) as target, GrpcDatastore(target) as client:
        call = asyncio.create_task(client.search(search()))
        await until(lambda: sum(replica.asked["Search"] for replica in replicas) == 1)
        call.cancel()
        for known in client._caller.fleet.replicas:
            while not known.look():
                pass
        with pytest.raises(asyncio.CancelledError):
            await call
    assert sum(replica.asked["Search"] for replica in replicas) == 1


async def test_a_client_is_made_anywhere_and_used_where_the_loop_is() -> None:
    replica = Replica(4)
    async with listening(replica) as target, await asyncio.to_thread(GrpcDatastore, target) as client:
        assert number(await client.search(search())) == 4
    idle = await asyncio.to_thread(GrpcDatastore, "127.0.0.1:1")  # never used
    await idle.aclose()


async def test_the_first_call_waits_for_no_probe() -> None:
    replica = Replica(0)
    async with listening(replica) as target, GrpcDatastore(Connection(target, look_seconds=3600.0)) as client:
        await client.search(search())
    assert replica.asked == {"Search": 1}
