"""The aggregator follows the lm service: a restart with another model is taken over."""

import asyncio
import json
import time

import pytest

from knnlm.domains import NoDatastore
from knnlm.errors import DeadlineExceeded, Unavailable
from knnlm.messages import ForwardRequest, ForwardResult, ModelInfo
from knnlm.testing import ToyLanguageModel
from services.aggregator.completions.schemas import ChatRequest
from services.aggregator.core import AggregatorCore
from services.aggregator.engine import Aggregator
from services.aggregator.requests import MemoryBudget
from services.aggregator.schemas.mixing import NextTokenRequest
from services.aggregator.settings import AggregatorSettings
from services.aggregator.upstream import UpstreamMetrics
from services.runtime.context import RequestContext
from services.runtime.observability import Metrics
from tests.services.waiting import until

CALL = RequestContext("test", "none", time.monotonic() + 1e6)  # as long as the tests run


class Lm:
    """A client whose service can be restarted with another model, or be away."""

    def __init__(self) -> None:
        self.model = ToyLanguageModel()
        self.away = False

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        return self.model.forward(request)

    async def get_model(self) -> ModelInfo:
        if self.away:
            raise Unavailable("the lm service is away")
        return self.model.info

    async def get_tokenizer(self) -> str:
        return self.model.tokenizer.json

    async def get_chat_template(self) -> str | None:
        return self.model.tokenizer.chat_template


async def test_another_model_is_taken_over() -> None:
    lm, settings = Lm(), AggregatorSettings()
    core = AggregatorCore(settings, UpstreamMetrics(Metrics("aggregator")))
    core._aggregator = first = await Aggregator.connect(lm, NoDatastore(), settings)
    request = NextTokenRequest(text="the cat")
    before = await core.aggregator.next_token(request, CALL)
    await core.look(lm, NoDatastore())
    assert core.aggregator is first
    lm.model = ToyLanguageModel(seed=1)
    with pytest.raises(Unavailable, match="another model"):
        await core.aggregator.next_token(request, CALL)
    lm.away = True
    await core.look(lm, NoDatastore())
    assert core.aggregator is first
    lm.away = False
    await core.look(lm, NoDatastore())
    after = await core.aggregator.next_token(request, CALL)
    assert json.loads(after)["results"][0]["top"] != json.loads(before)["results"][0]["top"]


async def test_the_process_of_a_chat_template_ends_with_its_model() -> None:
    lm, settings = Lm(), AggregatorSettings()
    lm.model.tokenizer.chat_template = "{{ messages[0].content }}"
    core = AggregatorCore(settings, UpstreamMetrics(Metrics("aggregator")))
    core._aggregator = first = await Aggregator.connect(lm, NoDatastore(), settings)
    lm.model = ToyLanguageModel(seed=1)
    lm.model.tokenizer.chat_template = "{{ messages[0].role }}"
    await core.look(lm, NoDatastore())
    request = ChatRequest(messages=[{"role": "user", "content": "the"}], max_tokens=1)
    with pytest.raises(Unavailable, match="no longer served"):
        await first.completions.shape(request, CALL)
    shape, _ = await core.aggregator.completions.shape(request, CALL)
    assert shape.checked.prompt_tokens == len("user")
    await core.close()
    with pytest.raises(Unavailable, match="no longer served"):
        await core.aggregator.completions.shape(request, CALL)


async def test_who_comes_first_goes_first_and_nobody_passes_the_bound() -> None:
    log: list[int] = []
    budget, gates = MemoryBudget(10), [asyncio.Event() for _ in range(4)]

    async def hold(number: int, size: int) -> None:
        async with budget.hold(size, 60):
            log.append(number)
            await gates[number].wait()

    tasks = [asyncio.create_task(hold(i, size)) for i, size in enumerate((6, 10, 1, 1))]
    await until(lambda: log == [0])
    gates[0].set()
    await until(lambda: log == [0, 1])  # those behind it would have fitted before
    tasks[2].cancel()
    gates[1].set()
    await until(lambda: log == [0, 1, 3])
    gates[3].set()
    await asyncio.gather(*tasks, return_exceptions=True)
    with pytest.raises(DeadlineExceeded):
        async with budget.hold(4, 60), budget.hold(7, 0.01):
            raise AssertionError("more than the budget was held")
    async with budget.hold(10, 5):
        pass
