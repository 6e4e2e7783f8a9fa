"""A datastore service in this process, and one question to it: what damaged versions may do to it, and what not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from services.datastore.app import service
from services.datastore.settings import DatastoreSettings
from services.runtime.lifecycle import Host, running
from tests.faults.damage import QUERIES
from tests.services.waiting import Slow

__all__ = ["Served", "opened_at_last", "served"]

PATIENCE = 20  # seconds
LOOK = 0.01


@dataclass
class Served:
    host: Host
    client: httpx.AsyncClient

    async def activate(self, version: str) -> httpx.Response:
        return await self.client.post("/v1/domains/toy:activate", json={"version": version})

    async def search(self, **options: Any) -> dict[str, Any]:
        """All entries of the version that answers; every number in it a number, every value a token."""
        body = {"queries": QUERIES.tolist(), "k": 400, **options}
        response = await self.client.post("/v1/domains/toy/search", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        kept = np.array(answer["values"]) >= 0
        assert (np.array(answer["values"]) < 258).all()
        assert all(isinstance(d, float) for row in answer["distances"] for d in row), "a distance is no number"
        distances = np.array(answer["distances"], np.float64)
        assert np.isfinite(distances[kept]).all()
        assert (distances[kept] >= 0).all()
        assert (np.diff(distances, axis=1) >= 0).all()
        return answer

    async def state(self) -> str:
        response = await self.client.get("/v1/domains/toy")
        assert response.status_code == 200, response.text
        return str(response.json()["state"])

    async def follows(self, store: Path, text: bytes, *, to: str) -> str:
        """Write CURRENT as another program would, and wait until the domain's state begins with `to`."""
        current = store / "toy" / "CURRENT"
        written = current.with_name(".CURRENT.test")
        written.write_bytes(text)
        written.replace(current)
        async with asyncio.timeout(PATIENCE):
            while not (state := await self.state()).startswith(to):  # noqa: ASYNC110  the service looks at a file
                await asyncio.sleep(LOOK)
        return state


@asynccontextmanager
async def served(store: Path, **settings: Any) -> AsyncIterator[Served]:
    given = {"watch_interval_s": LOOK, "grace_s": 0.0, "log_level": "error", **settings}
    async with (
        running(service(DatastoreSettings(store=store, port=0, grpc_port=0, **given))) as host,
        httpx.AsyncClient(transport=httpx.ASGITransport(host.app), base_url="http://test") as client,
    ):
        yield Served(host, client)


@asynccontextmanager
async def opened_at_last(slow: Slow) -> AsyncIterator[None]:
    """A test that fails while searches wait at the gate must not wait with them when the service is closed."""
    try:
        yield
    finally:
        slow.gate.set()
