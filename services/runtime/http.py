"""The HTTP face of any service: its routers, the standard routes, and the one error shape.

What happens to a request before FastAPI sees it (keys, limits, request ids, metrics) is in edge.py.
"""

import platform
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import knnlm
from knnlm.errors import InvalidRequest, KnnlmError, NotFound
from services.runtime import errors
from services.runtime.calls import current
from services.runtime.docs import page
from services.runtime.edge import Edge
from services.runtime.service import Door, Readiness, Service

__all__ = ["build_app"]


def build_app(service: Service, door: Door) -> ASGIApp:
    """The ASGI application of a service: uvicorn runs it, tests call it through httpx.ASGITransport."""
    app = FastAPI(
        title=service.title,
        version=knnlm.__version__,
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            KnnlmError: _answer_error,
            RequestValidationError: _answer_validation,
            HTTPException: _answer_http,
            Exception: _answer_internal,
        },
        responses={"default": {"description": "Any error", "content": {"application/json": {"schema": _ERROR_SCHEMA}}}},
    )
    for router in service.routers:
        app.include_router(router)
    _add_standard_routes(app, service, door.readiness)
    return Edge(app, service, door)


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def _add_standard_routes(app: FastAPI, service: Service, readiness: Readiness) -> None:
    @app.get("/livez", tags=["service"], summary="The process answers")
    async def livez() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/readyz", tags=["service"], summary="Requests can be answered; 503 with reasons when not")
    async def readyz() -> JSONResponse:
        reasons = readiness.reasons()
        status = "ready" if not reasons else readiness.phase if readiness.phase != "ready" else "unavailable"
        return JSONResponse({"status": status, "reasons": reasons}, 503 if reasons else 200)

    @app.get("/metrics", tags=["service"], summary="Counters for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.expose(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", tags=["service"], summary="What is running")
    async def version() -> dict[str, str]:
        return {"service": service.name, "version": knnlm.__version__, "python": platform.python_version()}

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()))


def _response(err: KnnlmError) -> JSONResponse:
    current().error = err.code
    return JSONResponse(errors.body(err), errors.row(err).status, errors.headers(err))


async def _answer_error(request: Request, exc: Exception) -> Response:
    # FastAPI types every handler as taking Exception; it is called with KnnlmError only
    return _response(exc) if isinstance(exc, KnnlmError) else await _answer_internal(request, exc)


async def _answer_validation(request: Request, exc: Exception) -> Response:
    if isinstance(exc, RequestValidationError):
        problems: list[dict[str, Any]] = list(exc.errors())  # pydantic's dicts hold values of any type
        return _response(errors.from_validation(problems))
    return await _answer_internal(request, exc)


async def _answer_http(request: Request, exc: Exception) -> Response:
    if not isinstance(exc, HTTPException):
        return await _answer_internal(request, exc)
    if exc.status_code == 404:
        return _response(NotFound(f"there is no {request.method} {request.url.path}"))
    if exc.status_code == 405:
        refused = _response(errors.MethodNotAllowed(f"{request.url.path} does not take {request.method}"))
        refused.headers.update(exc.headers or {})
        return refused
    return _response(InvalidRequest(str(exc.detail)))


async def _answer_internal(request: Request, exc: Exception) -> Response:  # noqa: ARG001  FastAPI's handler signature
    return _response(errors.Internal("internal error; the log has it under the id in X-Request-Id"))
