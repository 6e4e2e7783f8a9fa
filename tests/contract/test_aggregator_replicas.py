"""The aggregator over services of several replicas, which restart, switch and go while it answers."""

import asyncio
from pathlib import Path
from typing import Any

from knnlm.testing import ToyLanguageModel
from services.lm.app import service as lm_service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import running
from tests.contract.system import System, store, with_system
from tests.services.waiting import until

__all__ = ["store"]

BODY: dict[str, Any] = {"text": "the cat sat on the", "model": "toy+cat"}


def counted(s: System, name: str, **labels: str) -> float:
    return s.hosts["aggregator"].service.metrics.registry.get_sample_value(name, labels) or 0.0


async def replicas(s: System) -> list[dict[str, Any]]:
    answer = await s.client.get("/v1/domains/cat")
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["replicas"]
    return found


def test_switching_may_be_waited_for_on_every_replica(store: Path) -> None:
    async def check(s: System) -> None:
        for version in ("v2", "v1", "v2"):  # rolling back is the same call
            answer = await s.post("/v1/domains/cat:activate", {"version": version, "wait": True})
            assert answer["version"] == version
            said = await replicas(s)
            assert [r["version"] for r in said] == [version] * 3
            assert {r["state"] for r in said} == {"ready"}
            ports = [f"127.0.0.1:{host.grpc_port}" for name, host in s.hosts.items() if name.startswith("datastore")]
            assert [r["address"] for r in said] == ports
            used = {(await s.post("/v1/next_token", BODY))["domains"][0]["version"] for _ in range(6)}
            assert used == {version}

    with_system(store, check, replicas=3)


def test_a_replica_that_does_not_follow_is_named(store: Path) -> None:
    async def check(s: System) -> None:
        late = s.hosts["datastore 2"]
        await late.shut()
        answer = await s.client.post(
            "/v1/domains/cat:activate", json={"version": "v2", "wait": True}, headers={"x-request-timeout": "1.5"}
        )
        assert answer.status_code == 504, answer.text
        message = answer.json()["error"]["message"]
        assert f"cat v2 is not served yet by 1 of 2 replicas: 127.0.0.1:{late.grpc_port} (" in message
        assert [(r["version"], r["state"]) for r in await replicas(s)] == [("v2", "ready"), (None, "down")]

    with_system(store, check, replicas=2)


def test_a_replica_less_fails_no_request(store: Path) -> None:
    async def check(s: System) -> None:
        async def ask() -> None:
            for _ in range(12):
                await s.post("/v1/next_token", BODY)

        asking = [asyncio.create_task(ask()) for _ in range(3)]
        await s.post("/v1/next_token", BODY)
        await s.hosts["datastore"].shut()
        await asyncio.gather(*asking)

    with_system(store, check, replicas=2)


def test_a_restart_of_the_lm_service_loses_no_request(store: Path) -> None:
    async def check(s: System) -> None:
        before = await s.post("/v1/next_token", BODY)
        port = s.hosts["lm"].grpc_port
        await s.hosts["lm"].shut()
        asked = [asyncio.create_task(s.post("/v1/next_token", BODY)) for _ in range(3)]
        await until(lambda: counted(s, "knnlm_upstream_retries_total", service="lm") >= 3)
        assert not any(call.done() for call in asked)
        again = LmSettings(model="toy", port=0, grpc_port=port or 0)
        async with running(lm_service(again, lambda _: ToyLanguageModel())):
            assert await asyncio.gather(*asked) == [before] * 3

    with_system(store, check)


def test_what_is_known_to_be_down_is_not_waited_for_by_who_can_do_without(store: Path) -> None:
    async def check(s: System) -> None:
        body = {**BODY, "on_datastore_error": "lm_only"}
        await s.post("/v1/next_token", body)
        await s.hosts["datastore"].shut()
        upstream = s.hosts["aggregator"].service.core._upstream  # type: ignore[attr-defined]  # of its own core
        await until(lambda: upstream.datastore.problem is not None)
        async with asyncio.timeout(20):  # a small part of --datastore-wait-s
            for path in ("/v1/next_token", "/v1/score"):
                answer = await s.post(path, body)
                assert "does not answer" in answer["degraded"] or "draining" in answer["degraded"]
                assert answer["domains"] == []
        assert counted(s, "knnlm_knn_degraded_total") == 2
        assert counted(s, "knnlm_upstream_replicas", service="datastore", state="down") == 1

    with_system(store, check, datastore_wait_s=3600.0, request_timeout_s=3600.0)


def test_calls_to_other_services_are_counted(store: Path) -> None:
    async def check(s: System) -> None:
        await s.post("/v1/next_token", BODY)
        await s.post("/v1/next_token", {**BODY, "knn": {"version": "v9"}}, status=404)
        for service, code, least in (("lm", "OK", 3), ("datastore", "OK", 2), ("datastore", "NOT_FOUND", 1)):
            assert counted(s, "knnlm_upstream_seconds_count", service=service, code=code) >= least
        assert counted(s, "knnlm_upstream_replicas", service="datastore", state="up") == 2
        assert counted(s, "knnlm_upstream_replicas", service="lm", state="up") == 1
        text = (await s.client.get("/metrics")).text
        for name in ("knnlm_upstream_retries_total", "knnlm_knn_degraded_total"):
            assert f"# TYPE {name} counter" in text

    with_system(store, check, replicas=2)
