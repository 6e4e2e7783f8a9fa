"""The datastore service over HTTP: decode, one call, encode."""

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse

from knnlm.wire import jsonable
from services.datastore.engine import Engine
from services.datastore.schemas import ActivateBody, DomainAnswer, DomainsAnswer, SearchAnswer, SearchBody
from services.runtime.auth import admin_only
from services.runtime.calls import current

__all__ = ["routes"]


def routes(engine: Engine) -> APIRouter:
    router = APIRouter(tags=["datastore"])

    @router.post("/v1/domains/{domain}/search", summary="k neighbors of each query", response_model=SearchAnswer)
    async def search(domain: str, body: SearchBody) -> JSONResponse:
        """The answer names the version it came from; pin it in the next request to stay on it."""
        request = jsonable.search_request_from_json(domain, vars(body))
        result = await engine.search(request, current())
        return JSONResponse(jsonable.search_result_to_json(result, body.encoding))

    @router.get("/v1/domains", summary="Every domain that is served", response_model=DomainsAnswer)
    async def list_domains() -> JSONResponse:
        return JSONResponse({"domains": [jsonable.domain_to_json(info) for info in await engine.list_domains()]})

    @router.get("/v1/domains/{domain}", summary="One of them", response_model=DomainAnswer)
    async def get_domain(domain: str, version: str | None = None) -> JSONResponse:
        """As it is, or as a version that is still loaded says."""
        return JSONResponse(jsonable.domain_to_json(await engine.get_domain(domain, version)))

    @router.post(
        "/v1/domains/{domain}:activate",
        summary="Switch a domain to another version (admin key)",
        response_model=DomainAnswer,
        dependencies=[Depends(admin_only)],
    )
    async def activate(domain: str, body: ActivateBody) -> JSONResponse:
        """Loads and warms the version, makes it current on disk, and returns when this replica answers from it."""
        return JSONResponse(jsonable.domain_to_json(await engine.activate(domain, body.version, current())))

    return router
