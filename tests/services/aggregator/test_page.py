"""The page's files: public, typed, kept by browsers, and asking for nothing from elsewhere."""

import re

import httpx
import pytest
from pydantic import SecretStr

from services.aggregator.app import service
from services.aggregator.page import FOLDER, page_files
from services.aggregator.settings import AggregatorSettings
from services.runtime.http import build_app
from services.runtime.service import Admission

MAX_LINES = 300
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def client(*, web: bool = True) -> httpx.AsyncClient:
    """Of an aggregator that has not loaded yet, and has keys."""
    made = service(AggregatorSettings(web=web, api_keys=(SecretStr("ordinary"),)))
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(build_app(made, Admission(made))), base_url="http://aggregator"
    )


async def test_every_file_is_public_typed_and_checked_again_before_it_is_used_again() -> None:
    files = page_files()
    assert set(files) == {"/", *(f"/web/{file.name}" for file in FOLDER.iterdir() if file.name != "index.html")}
    async with client() as page:
        for path, file in files.items():
            answer = await page.get(path)
            assert (answer.status_code, answer.content) == (200, file.content)
            kind = TYPES["html" if path == "/" else path.rpartition(".")[2]]
            assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-cache"
            policy = answer.headers["content-security-policy"].split("; ")
            assert "default-src 'self'" in policy
            assert not any("unsafe" in part or "http" in part for part in policy)
            again = await page.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            head = await page.head(path)
            assert (head.status_code, head.headers["etag"]) == (200, answer.headers["etag"])
            assert (await page.post(path)).status_code == 405


async def test_nothing_else_is_public() -> None:
    async with client() as page:
        names = ("/web", "/web/", "/web/../page.py", "/web/%2e%2e/page.py", "/web/none.js", "/web/main.js/")
        for path in (*names, "http://aggregator//", "http://aggregator//web/main.js"):
            assert (await page.get(path)).status_code == 401, path
            assert (await page.get(path, headers={"authorization": "Bearer ordinary"})).status_code in (404, 503), path


async def test_without_the_page_there_is_none() -> None:
    async with client(web=False) as page:
        assert (await page.get("/")).status_code == 401


@pytest.mark.parametrize("path", page_files())
def test_files_are_short_and_hold_no_inline_script_or_address_of_elsewhere(path: str) -> None:
    text = page_files()[path].content.decode()
    assert text.count("\n") < MAX_LINES
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)) - {"http://www.w3.org"}  # SVG's name
    assert not addresses
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    if path == "/":
        assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", text)
