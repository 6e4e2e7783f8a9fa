"""--memory of the commands that mix: a folder, a running lm service, and a name at an aggregator."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm import MemoryOptions, Pipeline
from knnlm.cli.main import run
from knnlm.testing import ToyLanguageModel
from services.lm.app import service as lm_service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import running
from tests.cli.conftest import Knnlm
from tests.contract.system import store as toys  # noqa: F401  a fixture
from tests.contract.system import system
from tests.lm import tiny_models

TEXT = "the cat sat on the mat"


@pytest.fixture(scope="module")
def law(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the tokenizer of `model`, and a shorter context."""
    folder = tmp_path_factory.mktemp("memories") / "law"
    config = tiny_models.CONFIGS["llama"]()
    config.max_position_embeddings = 40
    tiny_models.save(tiny_models.random_model(config, seed=7), folder)
    return folder


@pytest.mark.usefixtures("store")
def test_every_command_mixes_a_memory(knnlm: Knnlm, model: Path, law: Path, corpus: Path) -> None:
    mixed = ("--memory", law, "--memory-lambda", "0.4")
    with Pipeline.load(str(model), memories={"law": law}) as pipeline:
        expected = pipeline.score(TEXT, memory=MemoryOptions("law", 0.4))
        following = pipeline.next_token(TEXT, memory=MemoryOptions("law", 0.4))
    scored = knnlm("score", TEXT, *mixed, "--json").json
    np.testing.assert_allclose([t["log_prob"] for t in scored["tokens"]], expected.log_probs, rtol=1e-6)
    memory = expected.mixed.components[0].evidence.of_targets
    np.testing.assert_allclose([t["memory_log_prob"] for t in scored["tokens"]], memory, rtol=1e-6)
    shown = [expected.memories[0].as_json()]
    likeliest = knnlm("next", TEXT, *mixed, "--json").json
    assert likeliest["tokens"][0]["p"] == pytest.approx(float(np.exp(following.mixed.log_probs[0].max())))
    assert likeliest["memories"] == scored["memories"] == shown
    made = knnlm("generate", TEXT, *mixed, "--temperature", "0", "--max-tokens", "3", "--json").json
    assert made["memories"] == shown
    assert knnlm("explain", TEXT, *mixed, "--json").json["memories"] == shown
    report = knnlm("eval", corpus, "--part", "report", *mixed, "--json").json
    assert (report["memories"], report["context_length"]) == (shown, 40)
    assert report["knn"]["perplexity"] != report["lm"]["perplexity"]
    for command in ("next", "score", "explain"):
        assert "law" in knnlm(command, TEXT, *mixed).out or command == "score"
    assert "LM + memory" in knnlm("eval", corpus, "--part", "report", *mixed).out


@pytest.mark.usefixtures("store")
def test_a_memory_stands_beside_a_domain_under_a_name_of_its_own(knnlm: Knnlm, law: Path) -> None:
    both = ("--domain", "toy", "--memory", f"mine={law}", "--memory-lambda", "0.2")
    scored = knnlm("score", TEXT, *both, "--json").json
    assert [m["name"] for m in scored["memories"]] == ["mine"]
    assert scored["domains"][0]["domain"] == "toy"
    for token in scored["tokens"]:
        assert None not in (token["knn_log_prob"], token["memory_log_prob"])


@pytest.mark.usefixtures("store")
def test_weights_are_fitted_alone_and_together(knnlm: Knnlm, law: Path, corpus: Path) -> None:
    asked = (corpus, "--part", "tune", "--domain", "toy", "--memory", law)
    found = knnlm("weigh", *asked, "--json").json
    lm, domain, memory, both = found["mixtures"]
    assert [list(m["weights"]) for m in (lm, domain, memory, both)] == [[], ["toy"], ["law"], ["toy", "law"]]
    assert both["perplexity"] <= min(domain["perplexity"], memory["perplexity"]) * (1 + 1e-9) <= lm["perplexity"]
    weights = [("--domain", "toy", "--lambda", both["weights"]["toy"]),
               ("--memory", law, "--memory-lambda", both["weights"]["law"])]  # fmt: skip
    report = knnlm("eval", corpus, "--part", "tune", *(word for pair in weights for word in pair), "--json").json
    assert report["tokens"] == found["tokens"]
    assert report["knn"]["perplexity"] == pytest.approx(both["perplexity"], rel=1e-4)
    assert report["lm"]["perplexity"] == pytest.approx(lm["perplexity"], rel=1e-4)
    assert "LM + toy + law" in knnlm("weigh", *asked).out
    assert "nothing to weigh" in knnlm("weigh", corpus).err


@pytest.mark.usefixtures("store")
def test_a_memory_may_run_elsewhere(law: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answered(*memory: object) -> Any:  # Any: JSON
        capsys.readouterr()
        assert run(["score", TEXT, "--memory-lambda", "0.4", "--json", "--memory", *map(str, memory)]) == 0
        return json.loads(capsys.readouterr().out)

    async def asked() -> None:
        async with running(lm_service(LmSettings(model=str(law), device="cpu", port=0, grpc_port=0))) as host:
            here = await asyncio.to_thread(answered, law)
            there = await asyncio.to_thread(answered, f"law=127.0.0.1:{host.grpc_port}")
            assert there["tokens"] == here["tokens"]
            assert there["memories"] == here["memories"]

    asyncio.run(asked())


def test_an_aggregator_is_asked_by_name(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    async def asked() -> None:
        async with system(toys, memories={"law": ToyLanguageModel(seed=5)}) as s:
            url = f"http://127.0.0.1:{s.hosts['aggregator'].port}"
            mixed = ["--remote", url, "--memory", "law", "--memory-lambda", "0.4", "--json"]
            answers = []
            for command in (["generate", "the cat", "--max-tokens", "3"], ["explain", "the cat"]):
                capsys.readouterr()
                assert await asyncio.to_thread(run, [*command, *mixed]) == 0
                answers.append(json.loads(capsys.readouterr().out)["memories"])
            assert answers[0] == answers[1]
            assert answers[0][0]["fingerprint"] == ToyLanguageModel(seed=5).info.fingerprint

    asyncio.run(asked())


def weightless(law: Path) -> list[object]:
    return ["--memory", law]


def without(law: Path) -> list[object]:
    del law
    return ["--memory-lambda", "0.3"]


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("given", "message"),
    [(weightless, "memory law has no fitted weight"), (without, "--memory-lambda means nothing without --memory")],
)
def test_what_cannot_be_is_refused(
    knnlm: Knnlm, law: Path, given: Callable[[Path], list[object]], message: str
) -> None:
    answer = knnlm("score", TEXT, *given(law))
    assert answer.code == 2
    assert message in answer.err
