"""To which replica a call goes, whether it is made again when it fails, and what it carries."""

import asyncio
import re
from collections.abc import Sequence

import grpc
import pytest

from knnlm.clients.call import Connection
from knnlm.clients.rpc import GrpcDatastore
from knnlm.errors import (
    DatastoreCorrupt,
    InvalidRequest,
    KnnlmError,
    Overloaded,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnknownDomain,
    UnknownVersion,
)
from knnlm.messages import Document
from knnlm.transport.context import outgoing
from tests.clients.fakes import DRAINING, Recorder, Replica, listening, now, number, probed, quick, search, until

PATIENCE = 20.0


def searches(replicas: Sequence[Replica]) -> list[int]:
    return [replica.asked["Search"] for replica in replicas]


async def test_domains_may_lie_on_different_replicas() -> None:
    replicas = [Replica(0, law=("v1",)), Replica(1, med=("v1",)), Replica(2, law=("v1",), med=("v1",))]
    async with listening(*replicas) as target, quick(target) as client:
        for _ in range(6):  # before anything is known of them
            assert number(await client.search(search("law"))) in (0, 2)
            assert number(await client.search(search("med"))) in (1, 2)
        await until(lambda: probed(*replicas))
        before = searches(replicas)
        answered = [number(await client.search(search("law"))) for _ in range(10)]
        assert sorted(set(answered)) == [0, 2]
        assert sum(searches(replicas)) - sum(before) == 10  # none went astray
        assert [info.domain for info in await client.list_domains()] == ["law", "med"]


async def test_a_pinned_version_is_asked_for_where_it_is() -> None:
    replicas = [Replica(i, law=("v1",)) for i in range(3)]
    replicas[2] = Replica(2, law=("v2", "v1"))
    async with listening(*replicas) as target, quick(target) as client:
        for _ in range(4):  # before anything is known of them
            result = await client.search(search(version="v2"))
            assert (number(result), result.version) == (2, "v2")
        await until(lambda: probed(*replicas))
        before = sum(searches(replicas))
        assert [number(await client.search(search(version="v2"))) for _ in range(6)] == [2] * 6
        assert sum(searches(replicas)) - before == 6
        assert {number(await client.search(search(version="v1"))) for _ in range(6)} == {0, 1}
        replicas[0].domains["law"] = replicas[1].domains["law"] = ("v3",)
        assert number(await client.search(search(version="v1"))) == 2  # a former version, which no probe tells of


@pytest.mark.parametrize(
    "status",
    [
        (grpc.StatusCode.CANCELLED, "CANCELLED"),  # what a server that stops says of calls it had not begun
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
        (grpc.StatusCode.UNKNOWN, "Stream removed"),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
    ],
)
async def test_a_call_that_is_broken_off_is_made_again_elsewhere(status: tuple[grpc.StatusCode, str]) -> None:
    replicas = [Replica(i) for i in range(2)]
    async with listening(*replicas) as target, quick(target) as client:
        replicas[0].broken = status
        assert [number(await client.search(search())) for _ in range(6)] == [1] * 6
        assert replicas[0].asked["Search"]
        replicas[1].broken = status
        with pytest.raises(Unavailable):  # a 503 and never a 500
            await client.search(search())


async def test_what_no_replica_has_is_unknown_after_each_was_asked_once() -> None:
    replicas = [Replica(i) for i in range(3)]
    async with listening(*replicas) as target, quick(target, wait=PATIENCE) as client:
        begun = now()
        with pytest.raises(UnknownDomain):
            await client.search(search("cow"))
        with pytest.raises(UnknownVersion):
            await client.search(search(version="v7"))
        assert searches(replicas) == [2, 2, 2]
        await until(lambda: probed(*replicas))
        with pytest.raises(UnknownDomain):
            await client.search(search("cow"))
        assert sum(searches(replicas)) == 7  # by now it is known that nobody has it
        assert now() - begun < PATIENCE


async def test_a_domain_whose_only_replica_restarts_is_waited_for() -> None:
    observer = Recorder()
    law, med = Replica(0, law=("v1",)), Replica(1, med=("v1",))
    async with (
        listening(law, med) as target,
        quick(target, wait=PATIENCE, observer=observer) as client,
    ):
        await client.search(search())
        await until(lambda: probed(law, med))
        await law.stop()
        call = asyncio.create_task(client.search(search("law")))
        await until(lambda: len(observer.retries) > 3)
        await law.start()
        assert number(await call) == 0


async def test_a_domain_whose_only_replica_stays_away_is_unavailable_not_unknown() -> None:
    law, med = Replica(0, law=("v1",)), Replica(1, med=("v1",))
    async with listening(law, med) as target, quick(target, wait=0.3) as client:
        await client.search(search())
        await until(lambda: probed(law, med))
        await law.stop()
        for _ in range(3):
            with pytest.raises(Unavailable, match=law.address):
                await client.search(search("law"))


async def test_a_domain_that_is_broken_on_one_replica_is_asked_for_on_another() -> None:
    """And the replica is not down for it: it serves others."""

    observer = Recorder()
    broken, sound = Replica(0), Replica(1)
    broken.refuse = Unavailable("domain law cannot be served: a checksum is wrong", param="domain")
    async with (
        listening(broken, sound) as target,
        GrpcDatastore(Connection(target, wait=PATIENCE, observer=observer)) as client,
    ):
        assert [number(await client.search(search())) for _ in range(4)] == [1] * 4
        sound.refuse = broken.refuse
        begun = now()
        with pytest.raises(Unavailable, match="a checksum is wrong"):
            await client.search(search())
        assert now() - begun < PATIENCE  # somebody answers, so there is nothing to wait for
    assert observer.problems == []


@pytest.mark.parametrize(
    "error",
    [InvalidRequest("no"), TooLarge("no"), Unauthenticated("no"), DatastoreCorrupt("no"), KnnlmError("no")],
)
async def test_what_every_replica_would_refuse_is_asked_once(error: KnnlmError) -> None:
    replicas = [Replica(0), Replica(1)]
    for replica in replicas:
        replica.refuse = error
    async with listening(*replicas) as target, GrpcDatastore(Connection(target, wait=PATIENCE)) as client:
        with pytest.raises(type(error), match="no"):
            await client.search(search())
    assert sum(searches(replicas)) == 1


async def test_a_full_queue_is_left_for_one_other_replica_and_no_more() -> None:
    replicas = [Replica(i) for i in range(3)]
    for replica in replicas:
        replica.refuse = Overloaded("the queue is full", retry_after=7.0)
    async with listening(*replicas) as target, GrpcDatastore(Connection(target, wait=PATIENCE)) as client:
        with pytest.raises(Overloaded, match="the queue is full") as raised:
            await client.search(search())
        assert raised.value.retry_after == 7.0
        assert sum(searches(replicas)) == 2
        replicas[1].refuse = replicas[2].refuse = None
        assert all([number(await client.search(search())) in (1, 2) for _ in range(6)])
    async with listening(replicas[0]) as target, GrpcDatastore(Connection(target, wait=PATIENCE)) as client:
        before = sum(searches(replicas))
        with pytest.raises(Overloaded):
            await client.search(search())
        assert sum(searches(replicas)) - before == 1


async def test_a_full_queue_is_not_left_for_a_replica_that_is_down() -> None:
    full, down = Replica(0), Replica(1)
    async with listening(full, down) as target, GrpcDatastore(Connection(target, wait=PATIENCE)) as client:
        down.refuse = DRAINING
        assert [number(await client.search(search())) for _ in range(2)] == [0, 0]
        before = down.asked["Search"]
        full.refuse = Overloaded("the queue is full")
        for _ in range(4):
            with pytest.raises(Overloaded):
                await client.search(search())
        assert down.asked["Search"] == before == 1


async def test_what_changes_something_is_never_made_twice() -> None:
    replicas = [Replica(0), Replica(1)]
    async with listening(*replicas) as target, GrpcDatastore(Connection(target, wait=PATIENCE)) as client:
        await client.search(search())
        for error in (Overloaded("full"), Unavailable("no lm service answers")):

            def refuse_changes(replica: Replica, error: KnnlmError = error) -> None:
                async def enter(method: str, context: grpc.aio.ServicerContext[object, object]) -> None:
                    replica.refuse = error if method not in ("GetDomain", "ListDomains", "Search") else None
                    await Replica._enter(replica, method, context)

                replica._enter = enter  # type: ignore[method-assign]

            for replica in replicas:
                refuse_changes(replica)
            changes = (
                client.activate("law", "v2"),
                client.add_documents("law", [Document("a", "text")]),
                client.remove_documents("law", ["a"]),
            )
            for change in changes:
                with pytest.raises(type(error)):
                    await change
        assert client.problem is None  # it says nothing of the replicas that they could not do it
    asked = replicas[0].asked + replicas[1].asked
    assert [asked[name] for name in ("ActivateVersion", "AddDocuments", "RemoveDocuments")] == [2, 2, 2]


async def test_documents_are_added_and_removed_by_one_replica() -> None:
    other, has_it = Replica(0, med=("v1",)), Replica(1, law=("v1",))
    async with listening(other, has_it) as target, GrpcDatastore(target) as client:
        assert (await client.add_documents("law", [Document("a", "text")])).added_documents == 1
        assert (await client.remove_documents("law", ["a", "b"])).removed_documents == 2
    assert (other.asked["AddDocuments"], other.asked["RemoveDocuments"]) == (0, 0)
    assert (has_it.asked["AddDocuments"], has_it.asked["RemoveDocuments"]) == (1, 1)


async def test_a_key_is_asked_for_with_every_call_and_what_rides_with_the_request_goes_along() -> None:
    keys = iter(["old", "new", *["later"] * 99])
    replica = Replica(0)
    async with listening(replica) as target, GrpcDatastore(Connection(target, api_key=lambda: next(keys))) as client:
        with outgoing(request_id="abc", metadata=[("traceparent", "00-1-2-01")]):
            await client.search(search())
            await client.search(search())
    sent = replica.metadata[:2]
    assert [given["authorization"] for given in sent] == ["Bearer old", "Bearer new"]
    assert {given["x-request-id"] for given in sent} == {"abc"}
    assert {given["traceparent"] for given in sent} == {"00-1-2-01"}


async def test_probes_carry_the_key_and_nothing_of_the_request_that_began_them() -> None:
    replica = Replica(0)
    async with listening(replica) as target, quick(target, api_key="k") as client:
        with outgoing(request_id="abc", deadline=now() + 0.5, metadata=[("traceparent", "00-1-2-01")]):
            await client.search(search())
        await until(lambda: replica.asked["ListDomains"] > 15)  # also after that request's deadline
    probe = replica.metadata[-1]
    assert probe["authorization"] == "Bearer k"
    assert "x-request-id" not in probe
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-00", probe["traceparent"])  # of a trace that is not recorded


async def test_an_observer_hears_how_calls_went() -> None:
    observer = Recorder()
    replica = Replica(0)
    async with listening(replica) as target, GrpcDatastore(Connection(target, wait=0.1, observer=observer)) as client:
        await client.search(search())
        assert observer.counts == (1, 0)
        with pytest.raises(UnknownDomain):
            await client.search(search("cow"))
        replica.refuse = DRAINING
        with pytest.raises(Unavailable):
            await client.search(search())
    assert [code for _, code, _ in observer.calls] == ["OK", "NOT_FOUND", "UNAVAILABLE"]
    assert {service for service, _, _ in observer.calls} == {"datastore"}
    assert observer.calls[2][2] >= 0.1 > 0 < observer.calls[0][2]
    assert len(observer.retries) >= 1
    assert observer.counts == (0, 1)
    assert observer.problems == [(replica.address, "the service is draining")]


async def test_a_list_is_made_of_what_every_replica_says() -> None:
    replicas = [Replica(0, law=("v1",), cow=("v1",)), Replica(1, med=("v3", "v2"), law=("v2", "v1"))]
    async with listening(*replicas) as target, GrpcDatastore(target) as client:
        listed = {info.domain: info.version for info in await client.list_domains()}
        assert listed == {"cow": "v1", "law": "v1", "med": "v3"}
        replicas[0].refuse = InvalidRequest("no")
        assert [info.domain for info in await client.list_domains()] == ["law", "med"]
        replicas[1].refuse = InvalidRequest("no")
        with pytest.raises(InvalidRequest):
            await client.list_domains()


async def test_bad_text_is_refused_before_it_is_sent() -> None:
    async with GrpcDatastore("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest, match="not valid Unicode"):
            await client.add_documents("law", [Document("a", "\ud800")])
