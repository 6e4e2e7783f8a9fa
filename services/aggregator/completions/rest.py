"""The routes of OpenAI's interface that make text."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Response

from services.aggregator.completions.schemas import Completion, CompletionRequest
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
        call, engine = current(), core.aggregator.completions
        shape, sources = await engine.shape(request, call)
        if request.stream:
            return EventStream(_named(engine.chunks(shape, sources, call), request), call)
        with named_as_asked(request):
            return Response(await engine.whole(shape, sources, call), media_type="application/json")

    completions.__annotations__["request"] = with_sources(CompletionRequest)  # FastAPI reads the body's schema from it
    router.post(
        "/v1/completions",
        tags=["text"],
        summary="Prompts to texts, OpenAI's shape",
        response_model=Completion,
        responses={200: {"content": STREAM}},
    )(completions)


async def _named(chunks: AsyncGenerator[bytes, None], request: Sourced) -> AsyncGenerator[bytes, None]:
    """The chunks; errors name the field as the caller wrote it."""
    with named_as_asked(request):
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
