"""The routes of OpenAI's interface that make text."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Response

from services.aggregator.completions.schemas import ChatCompletion, ChatRequest, Completion, CompletionRequest
from services.aggregator.completions.stream import EventStream
from services.aggregator.core import AggregatorCore
from services.aggregator.retrieval_options import named_as_asked
from services.aggregator.schemas.mixing import Sourced, with_sources
from services.runtime.context import current

STREAM = {"text/event-stream": {"schema": {"type": "string", "description": "data: {...}, ..., data: [DONE]"}}}


def add_completion_routes(router: APIRouter, core: AggregatorCore) -> None:
    """router: refuses bodies that are too large before they are parsed."""

    async def completions(request: CompletionRequest) -> Response:
        """`model` chooses the domain, `knn` in the body chooses more; with `stream` server-sent events."""
        return await answered(request)

    async def chat(request: ChatRequest) -> Response:
        """The model's chat template makes the prompt of the messages; else as /v1/completions."""
        return await answered(request)

    async def answered(request: CompletionRequest | ChatRequest) -> Response:
        call, engine = current(), core.aggregator.completions
        shape, sources = await engine.shape(request, call)
        if request.stream:
            return EventStream(_named(engine.chunks(shape, sources, call), request), call)
        with named_as_asked(request):
            return Response(await engine.whole(shape, sources, call), media_type="application/json")

    for path, endpoint, schema, summary, shape in (
        ("/v1/completions", completions, CompletionRequest, "Prompts to texts, OpenAI's shape", Completion),
        ("/v1/chat/completions", chat, ChatRequest, "Messages to the next one, OpenAI's shape", ChatCompletion),
    ):
        endpoint.__annotations__["request"] = with_sources(schema)  # FastAPI reads the body's schema from it
        described: dict[int | str, dict[str, Any]] = {200: {"content": STREAM}}  # Any: JSON
        router.post(path, tags=["text"], summary=summary, response_model=shape, responses=described)(endpoint)


async def _named(chunks: AsyncGenerator[bytes, None], request: Sourced) -> AsyncGenerator[bytes, None]:
    """The chunks; errors name the field as the caller wrote it."""
    with named_as_asked(request):
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
