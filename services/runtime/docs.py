"""The page at /docs: every route with its fields, from the OpenAPI document, without a script from elsewhere."""

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

__all__ = ["page"]

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
summary{cursor:pointer;padding:.4rem 0}code,pre{font:14px/1.45 ui-monospace,monospace}
pre{background:#f4f4f2;padding:.8rem;overflow:auto}b.m{display:inline-block;min-width:4rem}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}pre{background:#242424}}
"""


def page(openapi: Mapping[str, Any]) -> str:
    """HTML for people; openapi is the document of /openapi.json (its values are of any JSON type)."""
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
