"""/v1/completions over the three services."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from knnlm.testing import byte_tokenizer
from tests.contract.system import store, system  # noqa: F401  a fixture

TOKENIZER = byte_tokenizer()
PROMPT = "the cat"
IDS = TOKENIZER.encode(PROMPT)[1:].tolist()
GREEDY = {"temperature": 0, "ignore_eos": True}


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": 6, "model": "toy+cat", **GREEDY, **fields}


async def test_each_token_is_the_likeliest_of_next_token(store: Path) -> None:  # noqa: F811
    async with system(store) as running:
        made = await running.post("/v1/completions", body(logprobs=2))
        (choice,) = made["choices"]
        context = list(IDS)
        for i, log_prob in enumerate(choice["logprobs"]["token_logprobs"]):
            one = await running.post("/v1/next_token", {"tokens": [context], "model": "toy+cat", "top_n": 2})
            first, second = one["results"][0]["top"]
            assert log_prob == pytest.approx(math.log(first["p"]), abs=1e-6)
            likeliest = choice["logprobs"]["top_logprobs"][i]
            assert log_prob == max(likeliest.values())
            assert sorted(likeliest.values()) == pytest.approx([math.log(second["p"]), math.log(first["p"])], abs=1e-6)
            context.append(first["token_id"])
        assert choice["text"] == TOKENIZER.decode(context[len(IDS) :])
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
        assert made["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13, "searches_skipped": 0}
        assert (made["model"], made["degraded"], made["domains"][0]["domain"]) == ("toy+cat", None, "cat")


async def test_a_prompt_that_is_echoed_is_scored(store: Path) -> None:  # noqa: F811
    async with system(store) as running:
        for model in ("toy", "toy+cat"):
            given = {"prompt": [IDS], "model": model, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
            (choice,) = (await running.post("/v1/completions", given))["choices"]
            listed = choice["logprobs"]
            score = await running.post("/v1/score", {"tokens": IDS, "model": model, "context_length": 32})
            expected = [token["log_p"] for token in score["tokens"]]
            assert listed["token_logprobs"][0] is listed["top_logprobs"][0] is None
            assert listed["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-6)
            assert {len(values) for values in listed.values()} == {len(IDS) + 1}
            assert choice["text"].startswith(PROMPT)
            assert listed["text_offset"] == list(range(len(IDS) + 1))
            for i, token in enumerate(IDS[1:], 1):
                one = await running.post("/v1/next_token", {"tokens": [IDS[:i]], "model": model, "top_n": 1})
                (top,) = one["results"][0]["top"]
                likeliest = listed["top_logprobs"][i]
                assert max(likeliest.values()) == pytest.approx(math.log(top["p"]), abs=1e-6)
                assert likeliest[TOKENIZER.token(token)] == listed["token_logprobs"][i]
                assert (max(likeliest.values()) == listed["token_logprobs"][i]) == (top["token_id"] == token)


async def test_nothing_is_generated_for_an_echo_alone(store: Path) -> None:  # noqa: F811
    async with system(store) as running:
        made = await running.post("/v1/completions", body(max_tokens=0, echo=True, logprobs=0))
        (choice,) = made["choices"]
        assert choice["text"] == PROMPT
        assert [len(d) for d in choice["logprobs"]["top_logprobs"][1:]] == [1] * 6
        assert made["usage"] == {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7, "searches_skipped": 0}
        made = await running.post("/v1/completions", body(max_tokens=0))
        assert made["choices"] == [
            {"index": 0, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        ]


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_a_stream_is_the_whole_answer_in_parts(store: Path) -> None:  # noqa: F811
    async with system(store) as running:
        for more in ({}, {"echo": True, "logprobs": 2}, {"stop": [" "], "temperature": 1.3, "seed": 3}):
            given = body(prompt=[PROMPT, "naïve café"], n=2, max_tokens=12, **more) | more
            whole = await running.post("/v1/completions", given)
            given |= {"stream": True, "stream_options": {"include_usage": True}}
            response = await running.client.post("/v1/completions", json=given)
            assert response.headers["content-type"].startswith("text/event-stream")
            *chunks, last = events(response.text)
            assert last["choices"] == []
            assert last["usage"] == whole["usage"]
            assert {chunk["id"] for chunk in chunks} == {last["id"]}
            for choice in whole["choices"]:
                parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
                assert "".join(part["text"] for part in parts) == choice["text"]
                assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
                assert parts[-1]["finish_reason"] == choice["finish_reason"]
                if choice["logprobs"] is not None:
                    for name, values in choice["logprobs"].items():
                        assert [value for part in parts for value in part["logprobs"][name]] == values


async def test_what_made_each_token_is_what_explain_says_of_it(store: Path) -> None:  # noqa: F811
    async with system(store) as running:
        knn = {"domains": ["cat", "dog"], "lambda": 0.3}
        asked = {"prompt": IDS, "knn": {**knn, "explain": 2, "explain_tokens": 3}, "max_tokens": 6, **GREEDY}
        (choice,) = (await running.post("/v1/completions", {**asked, "logprobs": 0}))["choices"]
        tokens = [one["token_id"] for one in choice["explained"]]
        assert TOKENIZER.decode(tokens) == choice["text"]
        given = {"prompt": IDS, "completion": tokens, "knn": knn, "passages": 2, "passage_tokens": 3}
        explained = await running.post("/v1/explain", {**given, "context_length": 32})
        assert sum(len(c["passages"]) for token in explained["tokens"] for c in token["components"]) > 3
        for mine, theirs in zip(choice["explained"], explained["tokens"], strict=True):
            assert mine["log_p"] == pytest.approx(theirs["log_p"], abs=1e-6)
            for component, expected in zip(mine["components"], theirs["components"], strict=True):
                assert (component["name"], component["kind"]) == (expected["name"], expected["kind"])
                assert component["weight"] == pytest.approx(expected["weight"])
                assert component["log_p"] == (expected["log_p"] and pytest.approx(expected["log_p"], abs=1e-5))
                for passage, other in zip(component["passages"], expected["passages"], strict=True):
                    for name, value in other.items():
                        assert passage[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4))
        response = await running.client.post("/v1/completions", json={**asked, "stream": True})
        parts = [c for chunk in events(response.text) for c in chunk["choices"]]
        assert [one["token_id"] for part in parts for one in part["explained"]] == tokens
        too_many = await running.post("/v1/completions", {**asked, "knn": {**knn, "explain": 257}}, 413)
        assert too_many["error"]["param"] == "knn.explain"
