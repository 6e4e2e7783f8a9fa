"""The HTTP face of any service: its routers, the standard routes, the page at /docs, and the one error shape.

What happens to a request before FastAPI sees it (keys, limits, request ids, metrics) is in middleware.py.
"""

import json
import platform
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import knnlm
from knnlm.errors import InvalidRequest, KnnlmError, NotFound
from services.runtime import errors
from services.runtime.context import current
from services.runtime.middleware import HttpMiddleware
from services.runtime.service import Admission, Readiness, Service


def build_app(service: Service, admission: Admission) -> ASGIApp:
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
        responses=_ANY_ERROR,
    )
    for route in (route for router in service.routers for route in router.routes):
        if isinstance(route, APIRoute):
            route.responses = _ANY_ERROR | route.responses
        app.routes.append(route)  # include_router would build each route again, when the first request comes
    _add_standard_routes(app, service, admission.readiness)
    return HttpMiddleware(app, service, admission)


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
_ANY_ERROR: dict[int | str, dict[str, Any]] = {  # Any: JSON
    "default": {"description": "Any error", "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
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
        return HTMLResponse(docs_page(app.openapi()))


def _response(err: KnnlmError) -> JSONResponse:
    current().error = err.code
    return JSONResponse(errors.body(err), errors.row(err).status, errors.headers(err))


async def _answer_error(request: Request, exc: Exception) -> Response:
    # FastAPI types every handler as taking Exception; it is called with KnnlmError only
    return _response(exc) if isinstance(exc, KnnlmError) else await _answer_internal(request, exc)


async def _answer_validation(request: Request, exc: Exception) -> Response:
    if isinstance(exc, RequestValidationError):
        return _response(errors.from_validation(exc.errors()[0], exc.body))
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


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
summary{cursor:pointer;padding:.4rem 0}code,pre{font:14px/1.45 ui-monospace,monospace}
pre{background:#f4f4f2;padding:.8rem;overflow:auto}b.m{display:inline-block;min-width:4rem}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}pre{background:#242424}}
"""


def docs_page(openapi: Mapping[str, Any]) -> str:
    """The page at /docs: every route with its fields, without a script from elsewhere. openapi: the document of
    /openapi.json, whose values are of any JSON type.
    """
    title = escape(f"{openapi['info']['title']} {openapi['info']['version']}")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
        f"<p>The same for programs: <a href=openapi.json>openapi.json</a></p>"
        f"{''.join(_routes(openapi))}</html>"
    )


def _routes(openapi: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            summary = escape(operation.get("summary", ""))
            yield f"<details><summary><b class=m>{method.upper()}</b> <code>{escape(path)}</code> {summary}</summary>"
            yield f"<p>{escape(operation.get('description', ''))}</p>"
            if "requestBody" in operation:
                yield _block("Request", _schema(operation["requestBody"]["content"], openapi))
            for status, response in operation.get("responses", {}).items():
                yield _block(f"{status}: {response['description']}", _schema(response.get("content", {}), openapi))
            yield "</details>"


def _block(title: str, schema: object) -> str:
    return f"<h4>{escape(title)}</h4><pre>{escape(json.dumps(schema, indent=2, ensure_ascii=False))}</pre>"


def _schema(content: Mapping[str, Any], openapi: Mapping[str, Any]) -> object:
    media: Any = next(iter(content.values()), {})
    return _resolved(media.get("schema", {}), openapi, depth=4)


def _resolved(schema: Any, openapi: Mapping[str, Any], depth: int) -> Any:  # any JSON
    if isinstance(schema, list):
        return [_resolved(part, openapi, depth) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return name if depth == 0 else _resolved(openapi["components"]["schemas"][name], openapi, depth - 1)
    return {key: _resolved(part, openapi, depth) for key, part in schema.items() if key != "title"}
