"""The whole system as an operator runs it: real processes, the pocket LM, a datastore built here, a switch in use."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.text import read_documents
from knnlm.datastore.updates.revise import with_tuning
from knnlm.index.build import build_index
from knnlm.index.searcher import Searcher
from knnlm.lm.model import LanguageModel
from knnlm.messages import Document
from knnlm.pipeline import Pipeline
from knnlm.tuning_records import Tuning
from tests.services.processes import Running, process

ROOT = Path(__file__).resolve().parent.parent.parent
POCKET = ROOT / "models" / "pocket"
TUNING = Tuning(temperature=20.0, lmbda=0.5, k=64, lm_perplexity=1.0, knn_perplexity=1.0, tokens=1, documents=1)
CONTEXT = "Licensed under the Apache License, Version 2.0 (the"
CLIENTS = 4


@dataclass
class System:
    aggregator: str
    store: Path
    services: dict[str, Running]

    def post(self, path: str, body: object) -> Any:  # JSON
        response = httpx.post(self.aggregator + path, json=body, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The domain licence: v1 is the licence of this project, v2 a part of its documentation; both indexed."""
    folder = tmp_path_factory.mktemp("store")
    lm = LanguageModel.load(str(POCKET), device="cpu")
    catalog = Catalog(folder)
    licence = [Document("LICENSE", (ROOT / "LICENSE").read_text(encoding="utf-8"))]
    for version, documents in (("v1", licence), ("v2", list(read_documents([ROOT / "docs" / "architecture.md"])))):
        path = build(documents, lm, catalog, "licence", version=version)
        build_index(path, "ivf8,sq8" if version == "v1" else "flat")
        with_tuning(path, TUNING)
    catalog.activate("licence", "v1")
    return folder


@pytest.fixture(scope="module")
def system(store: Path) -> Iterator[System]:
    with ExitStack() as stack:
        lm = stack.enter_context(process("lm", "--model", str(POCKET), "--device", "cpu"))
        datastore = stack.enter_context(process("datastore", "--store", str(store), "--watch-interval-s", "0.1"))
        flags = ["--lm-target", lm.grpc, "--datastore-target", datastore.grpc]
        aggregator = stack.enter_context(process("aggregator", *flags))
        services = {"aggregator": aggregator, "lm": lm, "datastore": datastore}
        logs: dict[str, list[str]] = {name: [] for name in services}
        readers = [threading.Thread(target=logs[name].extend, args=[r.process.stderr]) for name, r in services.items()]
        for reader in readers:
            reader.start()  # a pipe that nobody reads fills up and stops the service
        for running in services.values():
            wait_until_ready(running)
        yield System(aggregator.http, store, services)
        for name, running in services.items():  # the aggregator first: it depends on the others
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(timeout=60) == 0, f"{name}: {logs[name][-5:]}"
        for reader in readers:
            reader.join()


def wait_until_ready(running: Running) -> None:
    deadline = time.monotonic() + 120
    with httpx.Client(timeout=10) as client:
        while time.monotonic() < deadline:
            if client.get(running.http + "/readyz").status_code == 200:
                return
            time.sleep(0.2)
    raise AssertionError("not ready after two minutes")


def test_answers_equal_one_process(system: System) -> None:
    lm = LanguageModel.load(str(POCKET), device="cpu")
    with Pipeline(lm, {"licence": Searcher.open(system.store / "licence" / "v1", expect=lm.info)}) as pipeline:
        answer = system.post("/v1/next_token", {"text": CONTEXT, "model": "pocket+licence", "full": True})
        expected = np.exp(pipeline.next_token([CONTEXT], "licence").mixed.log_probs[0])
        np.testing.assert_allclose(answer["results"][0]["distribution"]["p"], expected, atol=1e-6)
        text = (ROOT / "LICENSE").read_text(encoding="utf-8")[:4000]
        score = system.post("/v1/score", {"text": text, "model": "pocket+licence"})
        np.testing.assert_allclose(
            [t["log_p"] for t in score["tokens"]], pipeline.score(text, "licence").log_probs, atol=1e-5
        )


def test_lambda_zero_is_the_plain_hugging_face_loss(system: System) -> None:
    lm = LanguageModel.load(str(POCKET), device="cpu")
    tokens = lm.tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8"))[:400]
    plain = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    with torch.inference_mode():
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        loss = float(plain(input_ids=ids, labels=ids).loss)
    body = {"tokens": tokens.tolist(), "knn": {"domain": "licence", "lambda": 0}}
    score = system.post("/v1/score", body)
    assert -score["total_log_p"] / len(score["tokens"]) == pytest.approx(loss, abs=1e-5)
    assert score["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)


def test_the_memory_knows_what_it_has_read(system: System) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")[2000:5000]
    score = system.post("/v1/score", {"text": text, "model": "pocket+licence"})
    assert score["perplexity"] < 0.5 * score["perplexity_lm"]
    body = {"text": CONTEXT, "model": "pocket+licence", "neighbors": 3}
    neighbors = system.post("/v1/next_token", body)["results"][0]["neighbors"]
    assert {n["document"] for n in neighbors} == {"LICENSE"}
    assert "License" in neighbors[0]["before"] + neighbors[0]["after"]


def test_a_switch_under_requests_fails_none_and_mixes_none(system: System) -> None:
    """Clients ask without pause while the domain is switched to and fro: every answer is wholly one version's."""
    body = {"text": CONTEXT, "model": "pocket+licence", "full": True}
    versions = ("v1", "v2")
    expected = {
        v: system.post("/v1/next_token", {**body, "knn": {"version": v}})["results"][0]["distribution"]["p"]
        for v in [system.post("/v1/domains/licence:activate", {"version": v})["version"] for v in versions]
    }
    assert expected["v1"] != expected["v2"]
    seen: list[str] = []
    wrong: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=system.aggregator, timeout=60) as client:
            while not stop.is_set():
                response = client.post("/v1/next_token", json=body)
                if response.status_code != 200:
                    wrong.append(response.text)
                    continue
                answer = response.json()
                version = answer["domains"][0]["version"]
                seen.append(version)
                if not np.allclose(answer["results"][0]["distribution"]["p"], expected[version], atol=1e-6):
                    wrong.append(f"an answer that names {version} is not of {version}")

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        for version in ("v1", "v2", "v1", "v2"):
            system.post("/v1/domains/licence:activate", {"version": version})
            answered = len(seen)
            while len(seen) < answered + 2 * CLIENTS and any(t.is_alive() for t in threads):
                time.sleep(0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert set(seen) == {"v1", "v2"}
    assert (system.store / "licence" / "CURRENT").read_text().strip() == "v2"
    system.post("/v1/domains/licence:activate", {"version": "v1"})


def test_every_service_describes_itself(system: System) -> None:
    for running in system.services.values():
        for path in ("/livez", "/version", "/docs", "/openapi.json"):
            assert httpx.get(running.http + path, timeout=10).status_code == 200
        metrics = httpx.get(running.http + "/metrics", timeout=10).text
        assert "knnlm_requests_total{" in metrics
    answer = httpx.post(system.aggregator + "/v1/next_token", json={"text": "x"}, headers={"x-request-id": "abc"})
    assert answer.headers["x-request-id"] == "abc"
    assert "lm;dur=" in answer.headers["server-timing"]
