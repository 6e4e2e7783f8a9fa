"""Switching a domain on every replica: who is told, who is waited for, and what is said of those that are late."""

import asyncio
from collections.abc import Sequence

import pytest

from knnlm.clients.rpc import DomainReplica, GrpcDatastore
from knnlm.errors import DeadlineExceeded, InvalidRequest, Unavailable, UnknownDomain
from knnlm.transport.context import outgoing
from tests.clients.fakes import DRAINING, Context, Replica, abort, listening, now, until


async def test_every_replica_is_asked_what_it_serves() -> None:
    ready, behind, without, away = Replica(0, law=("v2", "v1")), Replica(1), Replica(2, med=("v1",)), Replica(3)
    async with listening(ready, behind, without, away) as target, GrpcDatastore(target) as client:
        await away.stop()
        said = await client.replicas("law")
    assert [(r.address, r.version, r.state) for r in said] == [
        (ready.address, "v2", "ready"), (behind.address, "v1", "ready"),
        (without.address, None, "absent"), (away.address, None, "down"),
    ]  # fmt: skip
    assert [r.problem is None for r in said] == [True, True, False, False]
    assert "does not answer" in str(said[3].problem)


async def test_waiting_ends_when_every_replica_serves_the_version() -> None:
    seen: list[Sequence[DomainReplica]] = []
    replicas = [Replica(0), Replica(1), Replica(2, med=("v1",))]
    async with listening(*replicas) as target, GrpcDatastore(target) as client:
        waiting = asyncio.create_task(client.activate("law", "v2", wait=True, progress=seen.append))
        await until(lambda: len(seen) >= 2)
        assert not waiting.done()
        told = [replica for replica in replicas if replica.asked["ActivateVersion"]]
        assert len(told) == 1
        for replica in replicas[:2]:
            replica.switch("law", "v2")
        assert (await waiting).version == "v2"
    assert [r.version for r in seen[-1]] == ["v2", "v2", None]
    assert sorted(str(r.version) for r in seen[0]) == ["None", "v1", "v2"]


async def test_without_waiting_one_replica_is_enough() -> None:
    replicas = [Replica(0, med=("v1",)), Replica(1)]
    async with listening(*replicas) as target, GrpcDatastore(target) as client:
        assert (await client.activate("law", "v2")).version == "v2"
    assert [replica.asked["ActivateVersion"] for replica in replicas] == [0, 1]


async def test_those_that_are_late_are_named_with_what_they_say() -> None:
    told, late, away = Replica(0), Replica(1), Replica(2)
    async with listening(told, late, away) as target, GrpcDatastore(target) as client:
        await away.stop()
        begun = now()
        with outgoing(deadline=begun + 1.0), pytest.raises(DeadlineExceeded) as raised:
            await client.activate("law", "v2", wait=True)
        assert now() < begun + 1.0  # there is time left to tell it
    message = raised.value.message
    assert message.startswith("law v2 is not served yet by 2 of 3 replicas: ")
    assert f"{late.address} (serves v1, ready)" in message
    assert f"{away.address} (" in message
    assert told.address not in message


async def test_a_replica_that_hangs_does_not_hide_who_is_late() -> None:
    told, hanging = Replica(0), Replica(1)
    async with listening(told, hanging) as target, GrpcDatastore(target) as client:
        await client.get_domain("law")
        await client.get_domain("law")

        async def hang_soon() -> None:
            await until(lambda: bool(told.asked["ActivateVersion"] + hanging.asked["ActivateVersion"]))
            (hanging if told.asked["ActivateVersion"] else told).hang = True

        soon = asyncio.create_task(hang_soon())
        with outgoing(deadline=now() + 1.0), pytest.raises(DeadlineExceeded, match="by 1 of 2 replicas"):
            await client.activate("law", "v2", wait=True)
        await soon


async def test_a_replica_that_takes_longer_than_its_own_limit_is_waited_for() -> None:
    """A service that ends the call goes on loading; the client sees when it is done."""

    replica = Replica(0)
    seen: list[Sequence[DomainReplica]] = []

    async def too_slow(request: object, context: Context) -> None:
        await abort(context, DeadlineExceeded("version v2 is still being loaded"))

    replica.ActivateVersion = too_slow  # type: ignore[method-assign, assignment]
    async with listening(replica) as target, GrpcDatastore(target) as client:
        with pytest.raises(DeadlineExceeded, match="still being loaded"):
            await client.activate("law", "v2")
        switching = asyncio.create_task(client.activate("law", "v2", wait=True, progress=seen.append))
        await until(lambda: len(seen) >= 2)
        replica.switch("law", "v2")
        assert (await switching).version == "v2"


async def test_nobody_to_tell() -> None:
    replicas = [Replica(0), Replica(1)]
    async with listening(*replicas) as target, GrpcDatastore(target) as client:
        with pytest.raises(UnknownDomain):
            await client.activate("cow", "v1", wait=True)
        assert [replica.asked["ActivateVersion"] for replica in replicas] == [1, 1]
        for replica in replicas:
            replica.refuse = InvalidRequest("no such version")
        with pytest.raises(InvalidRequest, match="no such version"):
            await client.activate("law", "v9", wait=True)
        for replica in replicas:
            replica.refuse = DRAINING
        with pytest.raises(Unavailable, match="draining"):
            await client.activate("law", "v2", wait=True)
        assert [replica.asked["ActivateVersion"] for replica in replicas] == [1, 1]
