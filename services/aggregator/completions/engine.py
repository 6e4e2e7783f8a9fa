"""Requests for text to answers and streams. Knows no HTTP."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from knnlm.errors import TooLarge
from knnlm.generation import Generator
from knnlm.messages import ModelInfo
from knnlm.mixer import Mixer
from knnlm.rounds import Rounds
from knnlm.tokenizer import Tokenizer
from services.aggregator.completions.choices import Choices, Piece
from services.aggregator.completions.metrics import CompletionMetrics
from services.aggregator.completions.reading import CheckedRequest, RequestReader
from services.aggregator.completions.schemas import ChatRequest, CompletionRequest
from services.aggregator.completions.shapes import ChatShape, CompletionShape, Gathered, Json, Shape
from services.aggregator.requests import CacheMemory, MemoryBudget
from services.aggregator.retrieval_options import chosen, named_as_asked
from services.aggregator.settings import AggregatorSettings
from services.runtime.context import RequestContext

MAX_LISTED = 1 << 20  # log-probabilities, and tokens of prompts that are echoed, in one answer
MAX_ALL_LISTED = 1 << 22  # the same in all answers that are made at a time


class Completions:
    """Makes the texts of one model. degraded: told of each answer by the LM alone that was to have been mixed."""

    def __init__(
        self,
        mixer: Mixer,
        rounds: Rounds,
        tokenizer: Tokenizer,
        settings: AggregatorSettings,
        caches: CacheMemory,
        metrics: CompletionMetrics,
        degraded: Callable[[], None],
    ) -> None:
        self._mixer = mixer
        self._generator = Generator(mixer, tokenizer, rounds)
        self._tokenizer = tokenizer
        self._settings = settings
        self._caches = caches
        self._metrics = metrics
        self._degraded = degraded
        self._reader = RequestReader(mixer.info, tokenizer, settings)
        self._running = MemoryBudget(settings.max_running_choices, "others' choices had ended (--max-running-choices)")
        self._listed = MemoryBudget(MAX_ALL_LISTED, "memory for its log-probabilities was free")

    async def start(self) -> None:
        """Start what renders chats. Raises Unavailable."""
        if self._reader.template is not None:
            await self._reader.template.start()

    async def close(self) -> None:
        if self._reader.template is not None:
            await self._reader.template.close()

    @property
    def info(self) -> ModelInfo:
        return self._mixer.info

    async def shape(
        self, request: CompletionRequest | ChatRequest, call: RequestContext
    ) -> tuple[Shape, dict[str, Any]]:
        """The checked request with the shape of its answer, and the options of the sources that are mixed."""
        with named_as_asked(request):  # of retrieval alone: the request has a temperature of its own, too
            name, sources = chosen(request, self.info.model_id, self._settings)
        if isinstance(request, ChatRequest):
            return ChatShape(
                await self._reader.chat(request, call.remaining()), name, call.id, self._tokenizer
            ), sources
        checked = await self._reader.completion(request)
        return CompletionShape(checked, name, call.id, self._tokenizer), sources

    async def whole(self, shape: Shape, sources: dict[str, Any], call: RequestContext) -> bytes:
        """The whole answer as JSON. Raises KnnlmError for everything that cannot be answered."""
        made = [Gathered() for _ in range(shape.checked.choices)]
        async with self._under_way(shape.checked, sources, call) as choices:
            degraded = choices.plan.degraded
            async for piece in choices.pieces():
                made[piece.index].add(piece)
                degraded = degraded or piece.degraded
            if degraded is not None:
                self._degraded()
            return await asyncio.to_thread(lambda: _encoded(shape.whole(made, choices.plan, degraded)))

    async def chunks(self, shape: Shape, sources: dict[str, Any], call: RequestContext) -> AsyncGenerator[bytes, None]:
        """The answer in parts, as JSON; what is wrong with a request is raised before the first chunk."""
        generated, told = 0, False

        def made(piece: Piece) -> list[bytes]:
            return [_encoded(chunk) for chunk in shape.chunks(piece, choices.plan, generated=generated)]

        async with self._under_way(shape.checked, sources, call) as choices:
            async for piece in choices.pieces():
                generated += piece.generated
                if not told and (piece.degraded or choices.plan.degraded) is not None:
                    told = True
                    self._degraded()
                large = len(piece.tokens) > 1 or piece.explained is not None  # a prompt that is echoed, or passages
                for chunk in await asyncio.to_thread(made, piece) if large else made(piece):
                    yield chunk
            for last in shape.closing(generated):
                yield _encoded(last)

    @asynccontextmanager
    async def _under_way(
        self, checked: CheckedRequest, sources: dict[str, Any], call: RequestContext
    ) -> AsyncIterator[Choices]:
        """The choices, when the first token of any of them is there; all are closed at the end."""
        generator, options = self._generator, checked.options
        generator.check_tokens(options)
        rooms = [generator.room(prompt, options.max_tokens) for prompt in checked.prompts]
        listed = 0
        if checked.logprobs is not None or checked.echo:
            tokens = sum(rooms) + (checked.prompt_tokens if checked.echo else 0)
            listed = checked.made * tokens * (1 + (checked.logprobs or 0))
        if listed > MAX_LISTED:
            raise TooLarge(
                f"echo and logprobs list {listed} values, at most {MAX_LISTED} are listed in one answer: ask for fewer "
                "prompts, choices or tokens",
                param="echo" if checked.echo else "logprobs",
            )
        choices = Choices(
            checked, generator, self._mixer, self._tokenizer, self._metrics, call.started, timings=call.timings
        )
        caches = self._caches.hold(sources, checked.choices, call.remaining())
        running = self._running.hold(checked.choices, call.remaining())
        async with self._listed.hold(listed, call.remaining()), running, caches:
            try:
                await self._mixer.planned(sources, choices.begin)
                yield choices
            finally:
                await choices.close()


def _encoded(answer: Json) -> bytes:
    """The answer as compact JSON. Raises ValueError for a number that JSON does not have."""
    return json.dumps(answer, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
