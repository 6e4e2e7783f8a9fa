"""The memory profile of docker-compose.yml: a decoder memory trained here answers from a container of its own, beside
the language model, as it does in process; when it is stopped, what names it fails by name and nothing else does.

Run by `make test-compose`. One story: each test leaves the stack as the next one needs it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import knnlm
from knnlm.lm.distillation import DistilSettings
from knnlm.messages import Document
from tests.compose.stack import Stack, need_engine, started
from tests.reference import CLOSE, CONTEXTS, POCKET, licence_store

pytestmark = pytest.mark.compose

URL = "http://127.0.0.1:8000"
NAME = "licence-memory"
PROMPT = CONTEXTS[0]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_engine()
    return licence_store(tmp_path_factory.mktemp("memory") / "store")


@pytest.fixture(scope="module")
def memory(store: Path) -> Path:
    """A few steps on what the domain stores: enough to say something else than the model that it began as."""
    folder = store.parent / "memories" / NAME
    targets = folder.with_name("targets")
    knnlm.build_targets(store, "licence", str(POCKET), targets, temperature=20.0, ks=[16], device="cpu")
    settings = DistilSettings(steps=8, batch_entries=512, learning_rate=1e-3)
    held_out = [Document("held-out", Path(__file__).with_name("stack.py").read_text(encoding="utf-8"))]
    knnlm.train_memory(store, "licence", held_out, str(POCKET), folder, settings, targets=targets, device="cpu")
    return folder


@pytest.fixture(scope="module")
def stack(store: Path, memory: Path) -> Iterator[Stack]:
    profile = {
        "COMPOSE_PROFILES": "memory", "KNNLM_MEMORY": f"{NAME}=dns:///memory:9001", "KNNLM_MEMORY_DIR": str(memory),
        "KNNLM_INNER_KEY": "inner-secret",
    }  # fmt: skip
    with started(store, store.parent, profile) as stack:
        stack.up()
        yield stack


def asked(path: str, **body: Any) -> httpx.Response:  # JSON
    return httpx.post(f"{URL}{path}", json=body, timeout=60)


def distribution(weight: float) -> dict[int, float]:
    answer = asked("/v1/next_token", text=PROMPT, top_n=20, memory={"name": NAME, "lambda": weight})
    assert answer.status_code == 200, answer.text
    return {one["token_id"]: one["p"] for one in answer.json()["results"][0]["top"]}


def test_the_model_with_its_memory_is_listed_and_answers_as_in_process(stack: Stack, memory: Path) -> None:
    (container,) = stack.containers("memory")
    listed = {model["id"] for model in httpx.get(f"{URL}/v1/models", timeout=60).json()["data"]}
    assert {"pocket", f"pocket~{NAME}", f"pocket+licence~{NAME}"} <= listed
    before = stack.metric(container, 8001, "knnlm_lm_tokens_total")
    with knnlm.Pipeline.load(str(POCKET), memories={NAME: memory}, device="cpu") as pipeline:
        expected = {
            weight: np.exp(pipeline.next_token(PROMPT, memory=knnlm.MemoryOptions(NAME, weight)).mixed.log_probs[0])
            for weight in (0.0, 0.5, 1.0)
        }
        told = pipeline.score(PROMPT, memory=NAME)
    for weight, probs in expected.items():
        for token, p in distribution(weight).items():
            assert p == pytest.approx(float(probs[token]), abs=CLOSE)
    assert np.abs(expected[1.0] - expected[0.0]).max() > 20 * CLOSE  # it learnt something
    assert stack.metric(container, 8001, "knnlm_lm_tokens_total") > before
    scored = asked("/v1/score", text=PROMPT, model=f"pocket~{NAME}")
    assert scored.status_code == 200, scored.text
    assert scored.json()["total_log_p"] == pytest.approx(told.total, abs=0.01)


def test_text_is_generated_with_the_memory_by_its_model_id(stack: Stack) -> None:
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    answer = asked("/v1/completions", model=f"pocket~{NAME}", **body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == f"pocket~{NAME}"
    assert answer.json()["usage"]["completion_tokens"] == 6


def test_its_container_may_write_nothing_and_is_no_root(stack: Stack) -> None:
    (container,) = stack.containers("memory")
    host = stack.inspect(container)["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert stack.docker("exec", container, "id", "-u").strip() != "0"


def test_a_memory_that_is_stopped_fails_by_name_what_names_it_and_comes_back(stack: Stack) -> None:
    (container,) = stack.containers("memory")
    stack.docker("stop", container)
    assert stack.inspect(container)["State"]["ExitCode"] == 0
    failed = asked("/v1/next_token", text=PROMPT, top_n=3, memory={"name": NAME})
    assert failed.status_code == 503
    assert NAME in failed.json()["error"]["message"]
    allowed = asked("/v1/next_token", text=PROMPT, top_n=3, memory={"name": NAME, "on_memory_error": "lm_only"})
    assert allowed.status_code == 200, allowed.text
    assert allowed.json()["degraded"]
    assert asked("/v1/next_token", text=PROMPT, top_n=3, knn={"domain": "licence"}).status_code == 200
    stack.up()
    assert distribution(0.5)
