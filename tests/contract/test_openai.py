"""OpenAI's own client, unmodified, against the aggregator."""

from pathlib import Path
from typing import Any

import openai
import pytest

from knnlm.errors import Unavailable
from knnlm.messages import SearchRequest, SearchResult
from knnlm.testing import byte_tokenizer
from services.aggregator.core import AggregatorCore
from tests.contract.system import store, system  # noqa: F401  a fixture


def client(running: Any) -> openai.AsyncOpenAI:  # Any: tests.contract.system.System
    return openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{running.hosts['aggregator'].port}/v1", api_key="none", max_retries=0
    )


async def test_completions_streams_and_models(store: Path) -> None:  # noqa: F811
    async with system(store) as running, client(running) as asked:
        listed = [model.id async for model in asked.models.list()]
        assert "toy+cat" in listed
        assert (await asked.models.retrieve("toy+cat")).id == "toy+cat"
        given: Any = {"model": "toy+cat", "prompt": "the cat", "max_tokens": 8, "temperature": 0, "logprobs": 2}
        whole = await asked.completions.create(**given)
        (choice,) = whole.choices
        assert choice.logprobs is not None
        assert whole.usage is not None
        assert whole.usage.completion_tokens == len(choice.logprobs.tokens or ()) <= 8
        assert choice.finish_reason in ("stop", "length")
        stream = await asked.completions.create(**given, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == choice.text
        assert chunks[-1].usage == whole.usage
        echoed = await asked.completions.create(
            model="toy", prompt=byte_tokenizer().encode("the")[1:].tolist(), max_tokens=0, echo=True, logprobs=1
        )
        assert echoed.choices[0].text == "the"
        assert echoed.choices[0].logprobs is not None
        assert (echoed.choices[0].logprobs.token_logprobs or [1])[0] is None
        mixed = await asked.completions.create(
            **given | {"model": "toy"}, extra_body={"knn": {"domains": ["cat", "dog"]}}
        )
        assert mixed.model == "toy+cat+dog"


async def test_errors_are_the_classes_that_users_catch(store: Path) -> None:  # noqa: F811
    async with system(store) as running, client(running) as asked:
        with pytest.raises(openai.BadRequestError, match="the prompt has 40 tokens"):
            await asked.completions.create(model="toy", prompt="x" * 40, stream=True)
        with pytest.raises(openai.NotFoundError, match="unknown model 'gpt-4'"):
            await asked.completions.create(model="gpt-4", prompt="x")
        with pytest.raises(openai.BadRequestError, match="suffix"):
            await asked.completions.create(model="toy", prompt="x", suffix="y")


async def test_a_stream_that_fails_raises(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    async with system(store) as running, client(running) as asked:
        core = running.hosts["aggregator"].service.core
        assert isinstance(core, AggregatorCore)
        search, calls = core.aggregator._datastore.search, 0

        async def dying(request: SearchRequest) -> SearchResult:
            nonlocal calls
            calls += 1
            if calls > 2:
                raise Unavailable("no replica answers")
            return await search(request)

        monkeypatch.setattr(core.aggregator._datastore, "search", dying)
        given: Any = {"model": "toy+cat", "prompt": "the", "logprobs": 0, "extra_body": {"ignore_eos": True}}
        seen: list[Any] = []

        async def read() -> None:
            async for chunk in await asked.completions.create(**given, stream=True):
                seen.append(chunk)  # noqa: PERF401  what came before the error

        with pytest.raises(openai.APIError, match="no replica answers"):
            await read()
        assert len(seen) == 2
