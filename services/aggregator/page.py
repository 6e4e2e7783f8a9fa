"""The web page: the files of web/, read once, each at a path of its own. They are public; what they show is asked for
over the API, with the key of whoever looks."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from knnlm.errors import NotFound

FOLDER = Path(__file__).parent / "web"
INDEX = "index.html"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # kept, and asked for again by its ETag
}


@dataclass(frozen=True)
class PageFile:
    """One file as it is sent. etag: of its content, in quotes."""

    content: bytes
    media_type: str
    etag: str


def page_files() -> Mapping[str, PageFile]:
    """The files by their paths: "/" and "/web/NAME"."""
    files = {}
    for file in sorted(FOLDER.iterdir()):
        if file.suffix in TYPES:
            content = file.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            path = "/" if file.name == INDEX else f"/web/{file.name}"
            files[path] = PageFile(content, f"{TYPES[file.suffix]}; charset=utf-8", etag)
    return files


def page_routes(files: Mapping[str, PageFile]) -> APIRouter:
    """GET and HEAD of each file; 304 where the caller has it already."""
    router = APIRouter()

    async def file(request: Request) -> Response:
        path = request.scope["path"]
        found = files.get(path)
        if found is None:
            raise NotFound(f"there is no {request.method} {path}")
        headers = {**HEADERS, "etag": found.etag}
        if found.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(found.content, headers=headers, media_type=found.media_type)

    for path in ("/", "/web/{name}"):
        router.add_api_route(path, file, methods=["GET", "HEAD"], include_in_schema=False)
    return router
