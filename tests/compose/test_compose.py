"""docker-compose.yml on a real engine, under load: replicas killed, stopped and added, a domain switched, grown and
switched back, the language model restarted. No request fails, and every answer is what the library gives in process.

Run by `make test-compose`. One story: each test leaves the stack as the next one needs it.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.compose.stack import Stack, need_engine, started
from tests.faults.figures import percentile
from tests.reference import licence_store, questions
from tests.traffic import Ask, Seen, Traffic

pytestmark = pytest.mark.compose

KEYS = {"KNNLM_INNER_KEY": "inner-secret", "KNNLM_API_KEYS": "caller-secret", "KNNLM_ADMIN_API_KEYS": "admin-secret"}
URL = "http://127.0.0.1:8000"
CALLER = {"authorization": "Bearer caller-secret"}
ADMIN = {"authorization": "Bearer admin-secret"}
ADDED = "The quokka licence is granted to every quokka that has read the Apache License, Version 2.0 (the quokka)."
ENOUGH = 40  # answers before and after each event
NEW_REPLICA_S = 30  # until an added replica gets traffic


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_engine()
    return licence_store(tmp_path_factory.mktemp("compose") / "store")


@pytest.fixture(scope="module")
def asks(store: Path) -> list[Ask]:
    return questions(store)  # before the services have the store, and switch its domains


@pytest.fixture(scope="module")
def stack(store: Path, asks: list[Ask]) -> Iterator[Stack]:
    with started(store, store.parent, KEYS) as stack:
        stack.up(lm=2, datastore=3)
        yield stack


@pytest.fixture(scope="module")
def traffic(stack: Stack, asks: list[Ask]) -> Iterator[Traffic]:
    with Traffic(URL, asks, clients=4, headers=CALLER) as traffic:
        yield traffic
    everything = traffic.since(0)
    print(json.dumps({"requests": len(everything), "failures": len(traffic.failures())}))
    assert not traffic.failures()


@pytest.fixture(autouse=True)
def nobody_failed(traffic: Traffic, request: pytest.FixtureRequest) -> Iterator[None]:
    """Around every test: enough answers before and after, all of them right."""
    traffic.more(ENOUGH)
    begun = time.monotonic()
    yield
    traffic.more(ENOUGH)
    assert not (failed := traffic.failures(begun)), f"{len(failed)} failed, first {failed[0].problem}"
    seen = traffic.since(begun)
    seconds = [one.seconds for one in seen]
    figures = {"p50_ms": 1000 * percentile(seconds, 0.5), "p99_ms": 1000 * percentile(seconds, 0.99)}
    slowest = max(seconds)
    print(json.dumps({"event": request.node.name, "requests": len(seen), **figures, "slowest_s": slowest}))


def until(happened: Callable[[], bool], within: float, what: str) -> float:
    """Seconds it took."""
    begun = time.monotonic()
    while not happened():
        assert time.monotonic() < begun + within, f"not within {within:g} s: {what}"
        time.sleep(0.5)
    return time.monotonic() - begun


def searches(stack: Stack, container: str) -> float:
    return stack.metric(container, 8002, "knnlm_search_queries_total")


def versions(seen: list[Seen], domain: str) -> set[str]:
    used = [one.answer["domains"][0] for one in seen if one.answer]
    return {given["version"] for given in used if given["domain"] == domain}


def activate(version: str) -> Any:  # JSON
    body = {"version": version, "wait": True}
    answer = httpx.post(f"{URL}/v1/domains/licence:activate", json=body, headers=ADMIN, timeout=90)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_every_replica_gets_its_share(stack: Stack, traffic: Traffic) -> None:
    before = {name: searches(stack, name) for name in stack.containers("datastore")}
    assert len(before) == 3
    traffic.more(3 * ENOUGH)
    grown = {name: searches(stack, name) - count for name, count in before.items()}
    assert min(grown.values()) > sum(grown.values()) / 10, grown


def test_containers_cannot_write_what_is_not_theirs(stack: Stack) -> None:
    for service in ("lm", "datastore", "aggregator"):
        host = stack.inspect(stack.containers(service)[0])["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        if service != "datastore":  # it runs as the user who owns the store: here, the test's own
            user = stack.docker("exec", stack.containers(service)[0], "id", "-u").strip()
            assert user != "0", f"{service} runs as root"


def test_no_secret_is_logged(stack: Stack) -> None:
    logs = stack.compose("logs", "--no-color")
    assert "event=request" in logs
    for secret in KEYS.values():
        assert secret not in logs


def test_a_replica_is_killed(stack: Stack) -> None:
    stack.docker("kill", "--signal", "KILL", stack.containers("datastore")[0])
    assert len(stack.containers("datastore")) == 2


def test_a_replica_falls_silent_and_comes_back(stack: Stack, traffic: Traffic) -> None:
    silent = stack.containers("datastore")[0]
    stack.docker("pause", silent)
    time.sleep(8)
    late = time.monotonic()
    traffic.more(2 * ENOUGH)
    slowest = max(one.seconds for one in traffic.since(late))
    assert slowest < 5, f"a request begun 8 s after the pause took {slowest:.1f} s: the silent replica is still asked"
    stack.docker("unpause", silent)
    before = searches(stack, silent)
    until(lambda: searches(stack, silent) > before, NEW_REPLICA_S, "the replica that came back is asked again")


def test_replicas_are_added(stack: Stack) -> None:
    before = set(stack.containers("datastore"))
    stack.up(lm=2, datastore=4)
    added = set(stack.containers("datastore")) - before
    assert added
    for name in added:
        took = until(lambda name=name: searches(stack, name) > 0, NEW_REPLICA_S, f"{name} is asked")  # type: ignore[misc]  # a default binds the name
        print(json.dumps({"new_replica_asked_after_s": took}))


def test_a_domain_is_switched_and_rolled_back(traffic: Traffic) -> None:
    for version in ("v2", "v1"):
        assert activate(version)["version"] == version
        switched = time.monotonic()
        traffic.more(2 * ENOUGH)
        assert versions(traffic.since(switched), "licence") == {version}


def test_documents_are_added_and_removed(traffic: Traffic) -> None:
    ask = {"text": ADDED[: ADDED.index(" (the quokka")] + " (the", "knn": {"domain": "licence"}, "neighbors": 1}

    def nearest() -> str:
        answer = httpx.post(f"{URL}/v1/next_token", json=ask, headers=CALLER, timeout=90).json()
        return str(answer["results"][0]["neighbors"][0]["document"])

    assert nearest() == "LICENSE"
    path = f"{URL}/v1/domains/licence/documents"
    body = {"documents": [{"id": "quokka", "text": ADDED}]}
    assert httpx.post(path, json=body, headers=CALLER, timeout=90).status_code == 403
    added = httpx.post(path, json=body, headers=ADMIN, timeout=90)
    assert added.status_code == 200, added.text
    activate(added.json()["version"])
    assert [nearest() for _ in range(8)] == ["quokka"] * 8
    removed = httpx.post(f"{path}:remove", json={"ids": ["quokka"]}, headers=ADMIN, timeout=90)
    assert removed.status_code == 200, removed.text
    activate(removed.json()["version"])
    assert [nearest() for _ in range(8)] == ["LICENSE"] * 8
    activate("v1")


def test_the_language_model_is_restarted(stack: Stack, traffic: Traffic) -> None:
    before = {name: stack.inspect(name)["State"]["StartedAt"] for name in stack.containers("lm")}
    assert len(before) == 2
    stack.compose("restart", "lm")
    assert all(stack.inspect(name)["State"]["StartedAt"] != begun for name, begun in before.items())
    traffic.more(ENOUGH)


def test_services_end_cleanly_when_told_to(stack: Stack) -> None:
    """The one that no request needs: of four datastores, one."""
    name = stack.containers("datastore")[0]
    stack.docker("stop", name)
    assert stack.inspect(name)["State"]["ExitCode"] == 0
