"""The aggregator's HTTP face: decode, one call, encode."""

import asyncio
import time

from fastapi import APIRouter, Depends, Response

from services.aggregator import schemas
from services.aggregator.choices import named_as_asked
from services.aggregator.core import AggregatorCore
from services.runtime.context import current
from services.runtime.schemas import AddDocumentsBody, ChangeAnswer, RemoveDocumentsBody
from services.runtime.security import admin_only


def routes(core: AggregatorCore) -> APIRouter:
    router = APIRouter()
    started = int(time.time())

    @router.post("/v1/next_token", tags=["kNN-LM"], summary="Contexts to next-token distributions")
    async def next_token(request: schemas.NextTokenRequest) -> schemas.NextTokenResponse:
        """The mixture's likeliest tokens with p, p_lm and p_knn; on request the whole distribution and neighbors."""
        with named_as_asked():
            response, timings = await core.aggregator.next_token(request)
        current().timings.update(timings)
        return response

    @router.post("/v1/score", tags=["kNN-LM"], summary="Log-probability of every token of a text of any length")
    async def score(request: schemas.ScoreRequest) -> schemas.ScoreResponse:
        """The text is scored in windows; one version of a domain answers for all of them."""
        with named_as_asked():
            response, timings = await core.aggregator.score(request)
        current().timings.update(timings)
        return response

    @router.get("/v1/models", tags=["models"], summary="The LM, and the LM with each of the domains")
    async def models() -> schemas.ModelList:
        ids = await core.aggregator.model_ids()
        return schemas.ModelList(data=[_model(core, name, started) for name in ids])

    @router.get("/v1/models/{model}", tags=["models"], summary="One of them")
    async def model(model: str) -> schemas.Model:
        domain = core.aggregator.check_model(model)
        if domain is not None:
            await core.aggregator.domain(domain)
        return _model(core, model, started)

    @router.get("/v1/domains", tags=["domains"], summary="Every domain with its versions and tuning")
    async def domains() -> schemas.DomainList:
        return schemas.DomainList(domains=await core.aggregator.domains())

    @router.get("/v1/domains/{domain}", tags=["domains"], summary="One of them, and each replica's version of it")
    async def domain(domain: str) -> schemas.DomainStatus:
        return await core.aggregator.domain_status(domain)

    @router.post(
        "/v1/domains/{domain}:activate",
        tags=["domains"],
        summary="Switch a domain to another version (admin key)",
        dependencies=[Depends(admin_only)],
    )
    async def activate(domain: str, request: schemas.ActivateRequest) -> schemas.Domain:
        """With `wait`, 504 names the replicas that were not there in time; they go on."""
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

    for prefix in ("", "/v1"):
        _add_tokenizer_routes(router, core, prefix)
    return router


def _add_tokenizer_routes(router: APIRouter, core: AggregatorCore, prefix: str) -> None:
    """vLLM's shapes, which evaluation harnesses know, at both places they look."""

    @router.post(
        f"{prefix}/tokenize",
        tags=["tokenizer"],
        summary="Text to token ids",
        response_model=schemas.TokenizeResponse,
    )
    async def tokenize(request: schemas.TokenizeRequest) -> Response:
        answer = await core.aggregator.tokenize(request)
        return Response(await asyncio.to_thread(answer.model_dump_json), media_type="application/json")

    @router.post(f"{prefix}/detokenize", tags=["tokenizer"], summary="Token ids to text")
    async def detokenize(request: schemas.DetokenizeRequest) -> schemas.DetokenizeResponse:
        return await core.aggregator.detokenize(request)

    @router.get(f"{prefix}/tokenizer_info", tags=["tokenizer"], summary="What the tokenizer is")
    async def tokenizer_info() -> dict[str, object]:
        return core.aggregator.tokenizer_info()


def _model(core: AggregatorCore, name: str, started: int) -> schemas.Model:
    return schemas.Model(id=name, created=started, max_model_len=core.aggregator.info.context_length)
