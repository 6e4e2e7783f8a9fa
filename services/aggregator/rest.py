"""The aggregator's HTTP face: decode, one call, encode."""

import asyncio
import time

from fastapi import APIRouter, Depends, Response

from services.aggregator.completions.rest import add_completion_routes
from services.aggregator.core import AggregatorCore
from services.aggregator.responses import tokenized
from services.aggregator.retrieval_options import named_as_asked
from services.aggregator.schemas import mixing
from services.aggregator.schemas.domains import ActivateRequest, Domain, DomainList, DomainStatus, Model, ModelList
from services.aggregator.schemas.explaining import ExplainRequest, ExplainResponse
from services.aggregator.schemas.tokenizer import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from services.aggregator.settings import AggregatorSettings
from services.runtime.bodies import bounded
from services.runtime.context import current
from services.runtime.schemas import MAX_DOCUMENTS, AddDocumentsBody, ChangeAnswer, RemoveDocumentsBody
from services.runtime.security import admin_only

ESCAPED_BYTES = 6  # JSON for one byte of text takes at most: \\u0001
TOKEN_BYTES = 12  # JSON for one token id, with a comma and spaces
OTHER_BYTES = 1 << 16  # a body without its texts and token ids
OTHER_VALUES = 1 << 13  # domains and their fields, documents to leave out, ...


def routes(core: AggregatorCore, settings: AggregatorSettings) -> tuple[APIRouter, APIRouter]:
    """The routes that are asked most, which are tried first, and the others.

    settings: those that bound what a request holds; a body that holds more is not even parsed.
    """
    router = APIRouter(route_class=bounded(settings.max_body_bytes, 4 * MAX_DOCUMENTS, "4 for each document"))
    content = max(ESCAPED_BYTES * settings.max_text_bytes, TOKEN_BYTES * settings.max_score_tokens)
    texts = APIRouter(
        route_class=bounded(
            content + OTHER_BYTES, settings.max_score_tokens + OTHER_VALUES, "--max-text-bytes, --max-score-tokens"
        )
    )
    started = int(time.time())

    async def next_token(request: mixing.NextTokenRequest) -> Response:
        """The mixture's likeliest tokens with p, p_lm and p_knn; on request the whole distribution and neighbors."""
        with named_as_asked(request):
            answer = await core.aggregator.next_token(request, current())
        return Response(answer, media_type="application/json")

    async def score(request: mixing.ScoreRequest) -> mixing.ScoreResponse:
        """The text is scored in windows; one version of a domain answers for all of them."""
        with named_as_asked(request):
            return await core.aggregator.score(request, current())

    async def explain(request: ExplainRequest) -> Response:
        """Each token with its components and the passages that gave it most by retrieval, and the documents of all."""
        with named_as_asked(request):
            answer = await core.aggregator.explain(request, current())
        return Response(answer, media_type="application/json")

    for path, endpoint, schema, summary, answered in (
        (
            "/v1/next_token", next_token, mixing.NextTokenRequest, "Contexts to next-token distributions",
            mixing.NextTokenResponse,
        ),
        (
            "/v1/score", score, mixing.ScoreRequest, "Log-probability of every token of a text of any length",
            mixing.ScoreResponse,
        ),
        ("/v1/explain", explain, ExplainRequest, "Where each token's probability comes from", ExplainResponse),
    ):  # fmt: skip
        endpoint.__annotations__["request"] = mixing.with_sources(schema)  # FastAPI reads the body's schema from it
        texts.post(path, tags=["kNN-LM"], summary=summary, response_model=answered)(endpoint)

    @router.get("/v1/models", tags=["models"], summary="The LM, and the LM with each of the domains")
    async def models() -> ModelList:
        listed = await core.aggregator.models()
        return ModelList(data=[_model(core, name, started, stale) for name, stale in listed.items()])

    @router.get("/v1/models/{model:path}", tags=["models"], summary="One of them")
    async def model(model: str) -> Model:
        domain = core.aggregator.check_model(model)
        if domain is not None:
            await core.aggregator.domain(domain)
        return _model(core, model, started, (await core.aggregator.models()).get(model))

    @router.get("/v1/domains", tags=["domains"], summary="Every domain with its versions and tuning")
    async def domains() -> DomainList:
        return DomainList(domains=await core.aggregator.domains())

    @router.get("/v1/domains/{domain}", tags=["domains"], summary="One of them, and each replica's version of it")
    async def domain(domain: str) -> DomainStatus:
        return await core.aggregator.domain_status(domain)

    @router.post(
        "/v1/domains/{domain}:activate",
        tags=["domains"],
        summary="Switch a domain to another version (admin key)",
        dependencies=[Depends(admin_only)],
    )
    async def activate(domain: str, request: ActivateRequest) -> Domain:
        """504, with `wait`, names the replicas that were not there in time; they go on."""
        return await core.aggregator.activate(domain, request.version, wait=request.wait)

    @router.post(
        "/v1/domains/{domain}/documents",
        tags=["domains"],
        summary="Add documents to a domain while it answers (admin key)",
        dependencies=[Depends(admin_only)],
    )
    async def add_documents(domain: str, request: AddDocumentsBody) -> ChangeAnswer:
        """A new version of the domain; one replica answers from it when this returns, the others in a moment."""
        return await core.aggregator.add_documents(domain, request)

    @router.post(
        "/v1/domains/{domain}/documents:remove",
        tags=["domains"],
        summary="Remove documents from a domain by their ids (admin key)",
        dependencies=[Depends(admin_only)],
    )
    async def remove_documents(domain: str, request: RemoveDocumentsBody) -> ChangeAnswer:
        """A new version of the domain, as above. An id that is no document: 404, and nothing is removed."""
        return await core.aggregator.remove_documents(domain, request)

    add_completion_routes(texts, core)
    for prefix in ("", "/v1"):
        _add_tokenizer_routes(texts, core, prefix)
    return texts, router


def _add_tokenizer_routes(router: APIRouter, core: AggregatorCore, prefix: str) -> None:
    """vLLM's shapes, which evaluation harnesses know, at both places they look."""

    @router.post(
        f"{prefix}/tokenize",
        tags=["tokenizer"],
        summary="Text to token ids",
        response_model=TokenizeResponse,
    )
    async def tokenize(request: TokenizeRequest) -> Response:
        answer = await core.aggregator.tokenize(request)
        return Response(await asyncio.to_thread(tokenized, answer), media_type="application/json")

    @router.post(f"{prefix}/detokenize", tags=["tokenizer"], summary="Token ids to text")
    async def detokenize(request: DetokenizeRequest) -> DetokenizeResponse:
        return await core.aggregator.detokenize(request)

    @router.get(f"{prefix}/tokenizer_info", tags=["tokenizer"], summary="What the tokenizer is")
    async def tokenizer_info() -> dict[str, object]:
        return core.aggregator.tokenizer_info()


def _model(core: AggregatorCore, name: str, started: int, stale: str | None) -> Model:
    return Model(id=name, created=started, max_model_len=core.aggregator.info.context_length, stale=stale)
