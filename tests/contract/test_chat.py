"""/v1/chat/completions over the three services, and by OpenAI's own client."""

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

import knnlm
from knnlm.errors import InvalidRequest, Unavailable
from knnlm.messages import PassagesRequest
from knnlm.testing import ToyLanguageModel
from services.aggregator.core import AggregatorCore
from tests.contract.system import store, system  # noqa: F401  a fixture
from tests.contract.test_completions import events
from tests.contract.test_openai import client

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'bird' %}{{ raise_exception('no birds') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
ASKED: list[Any] = [{"role": "user", "content": "the cat"}]
PROMPT = "<s>u:the cat</s>a:"  # 13 tokens
GREEDY = {"temperature": 0, "ignore_eos": True}


def chatting(template: str | None = TEMPLATE) -> ToyLanguageModel:
    lm = ToyLanguageModel()
    lm.tokenizer.chat_template = template
    return lm


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": ASKED, "model": "toy+cat", "max_tokens": 6, **GREEDY, **fields}


async def test_an_answer_is_the_completion_of_the_rendered_prompt(store: Path) -> None:  # noqa: F811
    async with system(store, lm=chatting()) as running:
        for more in ({}, {"n": 2, "temperature": 1.2, "seed": 7}, {"stop": ["e", " "]}, {"logit_bias": {"70": 5}}):
            chat = await running.post("/v1/chat/completions", body(**more))
            made = await running.post("/v1/completions", body(prompt=PROMPT, **more))
            assert (chat["object"], chat["model"], chat["domains"]) == ("chat.completion", "toy+cat", made["domains"])
            assert chat["id"].startswith("chatcmpl-")
            assert chat["usage"] == made["usage"]
            assert chat["usage"]["prompt_tokens"] == 13
            for one, other in zip(chat["choices"], made["choices"], strict=True):
                assert one["message"] == {"role": "assistant", "content": other["text"]}
                assert (one["finish_reason"], one["stop_reason"]) == (other["finish_reason"], other["stop_reason"])
        parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "cat"}]
        given = body(messages=[{"role": "user", "content": parts, "name": "me"}])
        lines = body(messages=[{"role": "user", "content": "the\ncat"}])
        assert await text(running, given) == await text(running, lines)


async def test_an_assistant_may_have_said_nothing(store: Path) -> None:  # noqa: F811
    async with system(store, lm=chatting()) as running:
        asked = [*ASKED, {"role": "assistant", "content": ""}]
        nulls = [*ASKED, {"role": "assistant", "content": None}]
        assert await text(running, body(messages=nulls)) == await text(running, body(messages=asked))


async def text(running: Any, given: Any) -> str:
    return str((await running.post("/v1/chat/completions", given))["choices"][0]["message"]["content"])


async def test_log_probabilities_are_those_of_the_completion(store: Path) -> None:  # noqa: F811
    async with system(store, lm=chatting()) as running:
        chat = await running.post("/v1/chat/completions", body(logprobs=True, top_logprobs=2))
        made = await running.post("/v1/completions", body(prompt=PROMPT, logprobs=2))
        listed, expected = chat["choices"][0]["logprobs"]["content"], made["choices"][0]["logprobs"]
        assert [one["token"] for one in listed] == expected["tokens"]
        assert [one["logprob"] for one in listed] == expected["token_logprobs"]
        assert b"".join(bytes(one["bytes"]) for one in listed).decode(errors="replace") == made["choices"][0]["text"]
        for one in listed:
            first, second = one["top_logprobs"]
            assert (first["token"], first["logprob"], first["bytes"]) == (one["token"], one["logprob"], one["bytes"])
            assert second["logprob"] < first["logprob"]
        (choice,) = (await running.post("/v1/chat/completions", body(logprobs=True)))["choices"]
        assert [one["top_logprobs"] for one in choice["logprobs"]["content"]] == [[]] * 6
        (choice,) = (await running.post("/v1/chat/completions", body(knn={"explain": 1})))["choices"]
        assert [token["token"] for token in choice["explained"]] == expected["tokens"]


async def test_a_stream_has_the_role_then_the_text_then_the_end(store: Path) -> None:  # noqa: F811
    async with system(store, lm=chatting()) as running:
        for more in ({}, {"n": 3, "temperature": 1.2, "seed": 7}, {"logprobs": True, "top_logprobs": 1}):
            whole = await running.post("/v1/chat/completions", body(**more))
            given = body(**more, stream=True, stream_options={"include_usage": True})
            response = await running.client.post("/v1/chat/completions", json=given)
            *chunks, last = events(response.text)
            assert (last["choices"], last["usage"]) == ([], whole["usage"])
            assert {chunk["object"] for chunk in (*chunks, last)} == {"chat.completion.chunk"}
            assert [chunk["domains"] for chunk in chunks if "domains" in chunk] == [whole["domains"]]
            for choice in whole["choices"]:
                parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
                assert parts[0]["delta"] == {"role": "assistant", "content": ""}
                assert parts[-1]["delta"] == {}
                assert [p["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
                assert "".join(p["delta"]["content"] for p in parts[1:-1]) == choice["message"]["content"]
                listed = [one for p in parts[1:-1] for one in (p["logprobs"] or {"content": []})["content"]]
                assert listed == (choice["logprobs"] or {"content": []})["content"]


async def test_without_a_limit_the_context_is_filled(store: Path) -> None:  # noqa: F811
    async with system(store, lm=chatting()) as running:
        for limit, made in (({}, 19), ({"max_completion_tokens": 3}, 3), ({"max_tokens": 2}, 2)):
            given = {"messages": ASKED, **GREEDY, **limit}
            assert (await running.post("/v1/chat/completions", given))["usage"]["completion_tokens"] == made


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"messages": []}, 400, "messages"),
    ({"messages": None}, 400, "messages"),
    ({"messages": "hi"}, 400, "messages"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    ({"messages": [*ASKED, {"role": 1, "content": "x"}]}, 400, "messages.1.role"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages.0.content.0.text"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "text": ""}]}]}, 400, "messages.0.content.0.type"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, 400, "messages.0.tool_calls"),
    ({"messages": [{"role": "bird", "content": "x"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 40}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 3_000_000}]}, 413, "messages"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_completion_tokens": 65_537}, 413, "max_completion_tokens"),
    ({"n": 129}, 413, "n"),
    ({"temperature": -1}, 400, "temperature"),
    ({"logprobs": 2}, 400, "logprobs"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 413, "top_logprobs"),
    ({"stop": 7}, 400, "stop"),
    ({"stream_options": {}}, 400, "stream_options"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"functions": [{}]}, 400, "functions"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"modalities": ["audio"]}, 400, "modalities"),
    ({"audio": {"voice": "x"}}, 400, "audio"),
    ({"chat_template": "{{ 1 }}"}, 400, "chat_template"),
    ({"model": "gpt-4"}, 404, "model"),
    ({"knn": {"unknown": 1}}, 400, "knn.unknown"),
    ({"knn": {"domain": "cat", "temperature": 0}, "model": "toy"}, 400, "knn.temperature"),
]  # fmt: skip


async def test_what_cannot_be_is_refused_by_its_name(store: Path) -> None:  # noqa: F811
    async with system(store, lm=chatting()) as running:
        unexpected = []
        for fields, status, param in WRONG:
            for stream in ({}, {} if "stream_options" in fields else {"stream": True}):
                given = json.dumps({**body(), **stream, **fields})
                response = await running.client.post(
                    "/v1/chat/completions", content=given, headers={"content-type": "application/json"}
                )
                error = response.json()["error"] if response.status_code != 200 else {}
                if (response.status_code, error.get("param")) != (status, param):
                    unexpected.append((str(fields)[:100], response.status_code, str(error)[:200]))
        assert not unexpected
        neutral = {
            "frequency_penalty": 0, "presence_penalty": 0.0, "top_p": 1, "n": None, "logprobs": None, "tools": [],
            "tool_choice": "auto", "response_format": {"type": "text"}, "user": "me", "stop": None, "store": True,
            "modalities": ["text"], "parallel_tool_calls": True, "metadata": {"a": 1}, "what_nobody_knows": [1],
        }  # fmt: skip
        assert await text(running, body(**neutral)) == await text(running, body())


async def test_a_model_without_a_template_says_so(store: Path) -> None:  # noqa: F811
    for template, said in (
        (None, "model toy has no chat template, "),
        ("{% if %}", "template cannot be used"),
        ("{{ 'a\\ud800b' }}", "template cannot be used with these messages: UnicodeEncodeError"),
    ):
        async with system(store, lm=chatting(template)) as running:
            for stream in (False, True):
                error = (await running.post("/v1/chat/completions", body(stream=stream), 400))["error"]
                assert said in error["message"]
                assert error["param"] == "messages"
            assert template is not None or "/v1/completions" in error["message"]
            assert (await running.post("/v1/completions", {"prompt": "the", "max_tokens": 1}))["choices"]


async def test_a_template_that_never_ends_holds_up_no_other_route(store: Path) -> None:  # noqa: F811
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    async with system(store, lm=chatting(endless)) as running:
        asked = running.client.post
        chats = [
            asyncio.create_task(asked("/v1/chat/completions", json=body(), headers={"X-Request-Timeout": "2"}))
            for _ in range(40)  # more than there are threads
        ]
        await asyncio.sleep(0.2)
        assert (await running.post("/v1/next_token", {"text": "the cat"}))["results"]
        assert not any(chat.done() for chat in chats)
        assert {(await chat).status_code for chat in chats} == {504}


async def test_openai_chats(store: Path) -> None:  # noqa: F811
    async with system(store, lm=chatting()) as running, client(running) as asked:
        given: Any = {"model": "toy+cat", "messages": ASKED, "max_completion_tokens": 8, "temperature": 0}
        whole = await asked.chat.completions.create(**given, logprobs=True, top_logprobs=2)
        (choice,) = whole.choices
        assert choice.message.role == "assistant"
        assert choice.logprobs is not None
        assert whole.usage is not None
        assert whole.usage.completion_tokens == len(choice.logprobs.content or ()) <= 8
        stream = await asked.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == choice.message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == choice.finish_reason
        assert chunks[-1].usage == whole.usage
        with pytest.raises(openai.BadRequestError, match="no birds"):
            await asked.chat.completions.create(model="toy", messages=[{"role": "bird", "content": "x"}])  # type: ignore[list-item, misc]  # not as OpenAI has it


async def test_our_client_chats(store: Path) -> None:  # noqa: F811
    async with system(store, lm=chatting()) as running:
        where = f"http://127.0.0.1:{running.hosts['aggregator'].port}"
        async with knnlm.AsyncClient(where) as client:
            asked: Any = {"model": "toy+cat", "max_tokens": 6, "temperature": 0.0, "n": 2, "ignore_eos": True}
            whole = await client.chat(ASKED, logprobs=True, top_logprobs=1, **asked)
            assert [used.domain for used in whole.domains] == ["cat"]
            logprobs = whole.choices[0].logprobs
            assert logprobs is not None
            assert [token.top_logprobs[0].token for token in logprobs.content] == [t.token for t in logprobs.content]
            parts = [part async for part in client.stream_chat(ASKED, **asked)]
            for i, choice in enumerate(whole.choices):
                mine = [c for part in parts for c in part.choices if c.index == i]
                assert "".join(c.text for c in mine) == choice.text
                assert choice.message is not None
                assert choice.message.content == choice.text
            with pytest.raises(InvalidRequest) as raised:
                await client.chat([])
            assert raised.value.param == "messages"


async def test_passages_that_cannot_be_had_make_an_answer_degraded(
    store: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with system(store, lm=chatting()) as running:
        core = running.hosts["aggregator"].service.core
        assert isinstance(core, AggregatorCore)
        passages, calls = core.aggregator._datastore.passages, 0

        async def dying(request: PassagesRequest) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise Unavailable("no replica answers")
            return await passages(request)

        monkeypatch.setattr(core.aggregator._datastore, "passages", dying)
        knn = {"explain": 2, "lambda": 0.9}
        given = {"model": "toy+cat", "knn": knn, "max_tokens": 6, "on_datastore_error": "lm_only", **GREEDY}
        whole = await running.post("/v1/completions", {"prompt": "the cat", **given})
        assert calls > 2
        assert whole["degraded"] == "no replica answers"
        calls = 0
        response = await running.client.post("/v1/completions", json={"prompt": "the cat", "stream": True, **given})
        told = [chunk.get("degraded") for chunk in events(response.text)]
        assert told[0] is None
        assert set(told) == {None, "no replica answers"}
        given["on_datastore_error"] = "fail"
        assert (await running.post("/v1/completions", {"prompt": "the cat", **given}, 503))["error"]["param"] is None
