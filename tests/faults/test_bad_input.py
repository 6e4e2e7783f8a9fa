"""Far more bad input than the default run takes: drawn from what services say of themselves, and from nothing."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from knnlm.lm.model import LanguageModel
from knnlm.v1 import datastore_pb2, lm_pb2
from tests.faults.damage import indexed
from tests.faults.figures import report, span
from tests.faults.hostile import LARGE, MANIFESTS
from tests.faults.knocking import codes, datastore, lm, random_messages
from tests.faults.messages import methods
from tests.faults.reading import bounded, outcome
from tests.faults.schemas import explored
from tests.faults.systems import SERVICES, system
from tests.faults.threads import in_a_thread
from tests.reference import POCKET

pytestmark = pytest.mark.faults

EXAMPLES = int(span(120) * 2)  # of every operation, right ones and as many wrong ones
MESSAGES = int(span(120) * 100)
AT_ONCE = 500  # messages to one life of a service


@pytest.mark.parametrize("name", SERVICES)
def test_drawn_requests(name: str, tmp_path: Path) -> None:
    with in_a_thread(lambda: system(name, tmp_path)) as host:
        seen = explored(f"http://127.0.0.1:{host.port}", examples=EXAMPLES)
    statuses = Counter(answer.rpartition(" ")[2] for answer in seen.elements())
    report("schemathesis", service=name, requests=seen.total(), statuses=statuses)
    assert not [status for status in statuses if status >= "500"]


@pytest.mark.parametrize("name", ["datastore", "lm"])
def test_random_messages(name: str, tmp_path: Path) -> None:
    """The lm service with the real model: what it refuses is not what the toy does."""
    module = {"datastore": datastore_pb2, "lm": lm_pb2}[name]

    async def check() -> Counter[str]:
        seen: Counter[str] = Counter()
        model = LanguageModel.load(str(POCKET)) if name == "lm" else None
        for seed in range(MESSAGES // AT_ONCE + 1):
            # a new store each time: every document that is added makes a version, and nothing here compacts them
            async with datastore(tmp_path / str(seed)) if model is None else lm(model) as host:
                seen += await codes(host, random_messages(list(methods(module)), AT_ONCE, seed=100 + seed))
        return seen

    seen = asyncio.run(check())
    report("messages", service=name, messages=seen.total(), codes=seen)
    assert seen.total() >= MESSAGES


@pytest.mark.parametrize("name", sorted(LARGE))
def test_a_manifest_of_a_hundred_megabytes_is_refused_before_it_is_read(name: str, tmp_path: Path) -> None:
    path = indexed(tmp_path, "ivf8,sq8")
    MANIFESTS[name](path)
    with bounded(32 << 20):
        assert "manifest.json" in outcome(path)
