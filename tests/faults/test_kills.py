"""Replicas killed at random moments while everything is asked: no request fails, no answer is wrong.

KNNLM_FAULTS_SECONDS sets for how long (default 120).
"""

import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from knnlm.datastore.catalog import Catalog
from tests.faults.figures import percentile, report, span
from tests.faults.fleet import Fleet, Replica, fleet
from tests.reference import licence_store, questions
from tests.services.processes import ROOT, environment
from tests.traffic import Ask, Traffic

pytestmark = pytest.mark.faults

SEED = 7
DRAIN_SECONDS = 20


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return licence_store(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="module")
def asks(store: Path) -> list[Ask]:
    return questions(store)


@pytest.fixture(scope="module")
def services(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    flags = ["--drain-timeout-s", str(DRAIN_SECONDS), "--watch-interval-s", "0.2"]
    with fleet(
        store, tmp_path_factory.mktemp("logs"), lms=2, datastores=2, lm_flags=flags[:2], datastore_flags=flags
    ) as whole:
        yield whole


def test_no_request_fails_while_replicas_are_killed(services: Fleet, store: Path, asks: list[Ask]) -> None:
    rng = random.Random(SEED)
    catalog = Catalog(store)
    kinds = [services.lms, services.datastores]
    killed: Counter[str] = Counter()
    switched = 0
    with Traffic(services.aggregator.url, asks, clients=3) as traffic:
        traffic.more(20)
        begun = time.monotonic()
        while time.monotonic() < begun + span(120):
            time.sleep(rng.uniform(1, 3))
            victims = [replica for kind in kinds for replica in kind if _others_ready(replica, kind)]
            if victims:  # never the last of a kind; one that is just starting may be killed, too
                victim = rng.choice(victims)
                victim.kill()
                killed[victim.service] += 1
                time.sleep(rng.uniform(0, 0.5))
                victim.start()
            if rng.random() < 0.5:
                switched += 1
                catalog.activate("licence", ["v1", "v2"][switched % 2])
        for replica in services.replicas:
            replica.wait()
        traffic.more(20)
        seen = traffic.since(begun)
        seconds = time.monotonic() - begun
    failures = traffic.failures()
    taken = [one.seconds for one in seen]
    versions = Counter(one.answer["domains"][0]["version"] for one in seen if one.answer)
    report(
        "kills", seconds=round(seconds), seed=SEED, killed=killed, switched=switched, requests=len(seen),
        failures=len(failures), versions=versions, p50_s=round(percentile(taken, 0.5), 3),
        p99_s=round(percentile(taken, 0.99), 3), slowest_s=round(max(taken), 3),
    )  # fmt: skip
    assert not failures, f"{len(failures)} of {len(seen)}: {[(f.seconds, f.problem) for f in failures[:5]]}"
    assert sum(killed.values()) >= span(120) / 10, killed
    assert len(versions) == 2, "nothing was asked of one of the versions"
    _verified(store)


@pytest.mark.parametrize("kind", ["lms", "datastores"])
def test_no_request_fails_while_replicas_are_stopped(services: Fleet, asks: list[Ask], kind: str) -> None:
    """SIGTERM under load: not ready at once, what was accepted is answered, exit status 0 within the drain time."""
    replicas: list[Replica] = getattr(services, kind)
    drained = []
    with Traffic(services.aggregator.url, asks, clients=3) as traffic:
        traffic.more(20)
        for replica in replicas:
            begun = time.monotonic()
            assert replica.terminate(within=DRAIN_SECONDS + 5) == 0, replica.log.read_text()[-2000:]
            drained.append(round(time.monotonic() - begun, 2))
            traffic.more(20)
            replica.start()
            replica.wait()
            traffic.more(20)
    failures = traffic.failures()
    report(
        "sigterm",
        service=replicas[0].service,
        requests=len(traffic.since(0)),
        failures=len(failures),
        drained_s=drained,
    )
    assert not failures, f"{len(failures)}: {[(f.seconds, f.problem) for f in failures[:5]]}"


def test_what_a_service_accepted_it_answers_after_sigterm(services: Fleet, asks: list[Ask]) -> None:
    """The aggregator itself, of which there is one: who had sent a request before is answered, who comes later is not,
    and the probes say so while it drains."""
    replica = services.aggregator
    with Traffic(replica.url, asks, clients=4) as traffic:
        traffic.more(20)
        begun = time.monotonic()
        readiness = _readiness_while(replica)
    after = [one for one in traffic.since(begun) if one.problem is not None]
    before = [one for one in traffic.failures() if one.begun < begun]
    draining = [said for said in readiness if said != "200"]
    assert readiness[-len(draining) :] == draining, f"ready again while draining: {readiness}"
    report("sigterm", service="aggregator", probes=Counter(readiness), refused_after=len(after), lost=len(before))
    assert not before, before[:3]
    # a connection refused, closed before its answer began, or 503: never half an answer or another status
    assert {one.status for one in after} <= {0, 503}, after[:3]
    replica.start()
    replica.wait()


def _readiness_while(replica: Replica) -> list[str]:
    """What /readyz says over a connection that was open before, from the signal to the end of the process."""
    seen: list[str] = []
    with httpx.Client(base_url=replica.url, timeout=5) as probe:
        assert probe.get("/readyz").status_code == 200
        assert replica.process is not None
        replica.process.terminate()
        while replica.process.poll() is None:
            try:
                seen.append(str(probe.get("/readyz").status_code))
            except httpx.HTTPError:
                seen.append("refused")
            time.sleep(0.01)
        assert replica.process.returncode == 0, replica.log.read_text()[-2000:]
    return seen


def _others_ready(replica: Replica, kind: list[Replica]) -> bool:
    return all(other.ready() for other in kind if other is not replica)


def _verified(store: Path) -> None:
    command = [sys.executable, "-m", "knnlm.cli.main", "verify", "--all", "--store", str(store)]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
