"""/v1/completions asked with values that are extreme, and answers that are long: refused or given, never a 500."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from knnlm.clients.explained import explained_token
from knnlm.rows import stored_tokens
from services.aggregator.completions.choices import Listed
from services.aggregator.completions.shapes import finite
from tests.contract.system import store, system  # noqa: F401  a fixture

NUMBER = "9" * 4300  # the longest integer that JSON is read with
KNN = {"lambda": 0.3, "temperature": 2.0, "k": 4}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (f'"n": {NUMBER}', "n"),
        (f'"best_of": {NUMBER}', "best_of"),
        ('"best_of": 1000', "best_of"),
        ('"n": 1000', "n"),
        (f'"max_tokens": {NUMBER}', "max_tokens"),
        ('"temperature": 1e9', "temperature"),
        ('"temperature": 1e-9', "temperature"),
        ('"knn": {"temperature": -1.0}', "knn.temperature"),
        ('"logit_bias": {"a": 1}', "logit_bias"),
        ('"truncate_prompt_tokens": 0', "truncate_prompt_tokens"),
    ],
)
async def test_the_field_that_is_wrong_is_named(store: Path, given: str, param: str) -> None:  # noqa: F811
    async with system(store) as running:
        body = f'{{"prompt": {json.dumps(["a"] * 20)}, "model": "toy+cat", {given}}}'
        answer = await running.client.post(
            "/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code in (400, 413), answer.text[:200]
        error = answer.json()["error"]
        assert error["param"] == param
        assert "{{" not in error["message"]


async def test_the_likeliest_tokens_are_listed_where_most_have_no_probability(store: Path) -> None:  # noqa: F811
    knn = {"lambda": 1.0, "temperature": 1e-30, "k": 1}
    given = {"prompt": "the cat", "model": "toy+cat", "max_tokens": 3, "logprobs": 3, "knn": knn, "temperature": 0}
    async with system(store) as running:
        (choice,) = (await running.post("/v1/completions", given))["choices"]
        for value, top in zip(choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True):
            assert value == max(top.values()) == 0.0
            assert sorted(top.values())[0] == -9999.0


async def test_a_long_answer_is_put_together_beside_the_event_loop(
    store: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is done for each token of a prompt that is echoed."""
    seen: list[threading.Thread] = []

    def noted(work: Any) -> Any:
        def run(*args: Any) -> Any:
            seen.append(threading.current_thread())
            return work(*args)

        return run

    monkeypatch.setattr("knnlm.prompts.stored_tokens", noted(stored_tokens))
    monkeypatch.setattr("services.aggregator.completions.choices.Listed", noted(Listed))
    monkeypatch.setattr("services.aggregator.completions.shapes.finite", noted(finite))
    given = {"prompt": "the cat sat", "model": "toy+cat", "max_tokens": 0, "logprobs": 2, "echo": True, "knn": KNN}
    async with system(store) as running:
        for stream in (False, True):
            seen.clear()
            answer = await running.client.post("/v1/completions", json={**given, "stream": stream})
            assert answer.status_code == 200
            assert len(seen) > 30
            assert threading.main_thread() not in seen


async def test_what_made_a_token_is_put_together_beside_the_event_loop(
    store: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[threading.Thread] = []

    def noted(*args: Any) -> Any:
        seen.append(threading.current_thread())
        return explained_token(*args)

    monkeypatch.setattr("services.aggregator.completions.choices.explained_token", noted)
    given = {"prompt": "the cat", "model": "toy+cat", "max_tokens": 3, "ignore_eos": True, "knn": {**KNN, "explain": 2}}
    async with system(store) as running:
        await running.post("/v1/completions", given)
    assert len(seen) == 3
    assert threading.main_thread() not in seen
