"""Half of a surrogate pair, wherever a body can hold a text: 400, never 500."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.faults.names import BODIES, IGNORING, broken
from tests.faults.systems import SERVICES, system

JSON = {"content-type": "application/json"}


@asynccontextmanager
async def over_http(name: str, store: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with system(name, store) as host:
        transport = httpx.ASGITransport(host.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=JSON) as client:
            yield client


@pytest.mark.parametrize("name", SERVICES)
async def test_half_a_surrogate_pair_is_refused_in_every_text(name: str, tmp_path: Path) -> None:
    async with over_http(name, tmp_path) as client:
        for path, body in BODIES[name]:
            for content in broken(body, names=path not in IGNORING):
                assert (await client.post(path, content=content)).status_code == 400, (path, content)


@pytest.mark.parametrize("name", SERVICES)
async def test_every_route_that_takes_json_has_a_body(name: str, tmp_path: Path) -> None:
    async with over_http(name, tmp_path) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    found = {path for path, methods in paths.items() if "requestBody" in methods.get("post", {})}
    twins = {"/v1/tokenize", "/v1/detokenize"}  # of /tokenize and /detokenize
    assert found - twins == {path.replace("/toy", "/{domain}", 1) for path, _ in BODIES[name]}
